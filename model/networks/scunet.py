"""SCUNet, a blind denoiser (Zhang et al. 2022, https://arxiv.org/abs/2203.13278).

Attribute names are those of the published checkpoints.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from torch import Tensor, nn

from diffbir.model.networks.attention import window_attention
from diffbir.model.networks.swinir import relative_position_index, shift_mask, window_partition, window_reverse


class WindowAttention(nn.Module):
    """SwinIR's attention inside windows, under the names and the bias layout of SCUNet's checkpoints."""

    def __init__(self, dim: int, head_dim: int, window: int, shift: int):
        super().__init__()
        self.heads, self.window, self.shift = dim // head_dim, window, shift
        self.relative_position_params = nn.Parameter(torch.zeros(self.heads, 2 * window - 1, 2 * window - 1))
        self.register_buffer("index", relative_position_index(window), persistent=False)
        self.embedding_layer = nn.Linear(dim, 3 * dim)
        self.linear = nn.Linear(dim, dim)
        trunc_normal_(self.relative_position_params, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C), H and W multiples of the window."""
        H, W = x.shape[1:3]
        x = x.roll((-self.shift, -self.shift), dims=(1, 2))
        windows = window_partition(x, self.window)  # (B, nW, N, C), N = window**2
        bias = self.relative_position_params.flatten(1)[:, self.index]  # (heads, N, N)
        mask = shift_mask(H, W, self.window, self.shift, x.device) if self.shift else None
        h = self.linear(window_attention(self.embedding_layer(windows), self.heads, bias, mask))
        return window_reverse(h, self.window, H, W).roll((self.shift, self.shift), dims=(1, 2))


class TransformerBlock(nn.Module):
    """Window attention and MLP, pre-norm and residual: (B, H, W, C) -> (B, H, W, C)."""

    def __init__(self, dim: int, head_dim: int, window: int, shift: int):
        super().__init__()
        self.ln1 = nn.LayerNorm(dim)
        self.msa = WindowAttention(dim, head_dim, window, shift)
        self.ln2 = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.msa(self.ln1(x))
        return x + self.mlp(self.ln2(x))


class SwinConvBlock(nn.Module):
    """Half of the channels through a residual convolution, half through a Swin block, then fused; residual."""

    def __init__(self, channels: int, head_dim: int, window: int, shift: int):
        super().__init__()
        half = channels // 2
        self.trans_block = TransformerBlock(half, head_dim, window, shift)
        self.conv1_1 = nn.Conv2d(channels, channels, 1)
        self.conv1_2 = nn.Conv2d(channels, channels, 1)
        self.conv_block = nn.Sequential(
            nn.Conv2d(half, half, 3, padding=1, bias=False),
            nn.ReLU(),
            nn.Conv2d(half, half, 3, padding=1, bias=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        local, wide = self.conv1_1(x).chunk(2, dim=1)
        local = local + self.conv_block(local)
        wide = self.trans_block(wide.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return x + self.conv1_2(torch.cat([local, wide], dim=1))


class SCUNet(nn.Module):
    """A U-Net of Swin-convolution blocks over four scales.

    Args:
        in_channels: image channels.
        config: blocks of the three down levels, the body and the three up levels; odd ones shift their windows.
        dim: channels at full size; each level doubles them. A multiple of `2 * head_dim`.
        head_dim: width of an attention head.
        window: side of an attention window, in positions.
    """

    scale = 1  # output size over input size

    packs = True  # layers are only called, so that `model.networks.packed` may replace them

    def __init__(
        self,
        in_channels: int = 3,
        config: Sequence[int] = (4,) * 7,
        dim: int = 64,
        head_dim: int = 32,
        window: int = 8,
    ):
        super().__init__()
        self.multiple = 8 * window  # three halvings must leave whole windows

        def blocks(channels: int, depth: int) -> list[nn.Module]:
            return [SwinConvBlock(channels, head_dim, window, i % 2 * (window // 2)) for i in range(depth)]

        def down(channels: int, depth: int) -> nn.Sequential:
            return nn.Sequential(*blocks(channels, depth), nn.Conv2d(channels, 2 * channels, 2, 2, bias=False))

        def up(channels: int, depth: int) -> nn.Sequential:
            return nn.Sequential(nn.ConvTranspose2d(2 * channels, channels, 2, 2, bias=False), *blocks(channels, depth))

        # Head and tail are sequentials of one because published keys number them.
        self.m_head = nn.Sequential(nn.Conv2d(in_channels, dim, 3, padding=1, bias=False))
        self.m_down1 = down(dim, config[0])
        self.m_down2 = down(2 * dim, config[1])
        self.m_down3 = down(4 * dim, config[2])
        self.m_body = nn.Sequential(*blocks(8 * dim, config[3]))
        self.m_up3 = up(4 * dim, config[4])
        self.m_up2 = up(2 * dim, config[5])
        self.m_up1 = up(dim, config[6])
        self.m_tail = nn.Sequential(nn.Conv2d(dim, in_channels, 3, padding=1, bias=False))

    def forward(self, image: Tensor) -> Tensor:
        """Denoises.

        Args:
            image: (B, in_channels, H, W) in [0, 1], any size (padded inside).

        Returns:
            (B, in_channels, H, W), not clamped.
        """
        H, W = image.shape[-2:]
        # The published network repeats the border, and its numbers depend on it.
        x = F.pad(image, (0, -W % self.multiple, 0, -H % self.multiple), mode="replicate")
        x1 = self.m_head(x)
        x2 = self.m_down1(x1)
        x3 = self.m_down2(x2)
        x4 = self.m_down3(x3)
        h = self.m_up3(self.m_body(x4) + x4)
        h = self.m_up2(h + x3)
        h = self.m_up1(h + x2)
        return self.m_tail(h + x1)[..., :H, :W]
