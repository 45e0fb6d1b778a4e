"""SwinIR, the stage-1 network (Liang et al. 2021, https://arxiv.org/abs/2108.10257).

Attribute names are those of the published checkpoints.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from einops import rearrange
from timm.layers import DropPath, trunc_normal_
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffbir.model.networks.attention import window_attention
from diffbir.model.networks.layers import DoublingConv2d, activated, pad_to_multiple, zero_module

RGB_MEAN = (0.4488, 0.4371, 0.4040)  # of DIV2K, subtracted by every published SwinIR
HEADS = ("pixelshuffle", "pixelshuffledirect", "nearest+conv", "")


def window_partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, H/window * W/window, window**2, C)."""
    return rearrange(x, "b (h i) (w j) c -> b (h w) (i j) c", i=window, j=window)


def window_reverse(windows: Tensor, window: int, H: int, W: int) -> Tensor:
    """The inverse of `window_partition`: -> (B, H, W, C)."""
    return rearrange(windows, "b (h w) (i j) c -> b (h i) (w j) c", i=window, h=H // window, w=W // window)


@lru_cache(maxsize=32)
def shift_mask(H: int, W: int, window: int, shift: int, device: torch.device) -> Tensor:
    """Keeps tokens that the cyclic shift brought together from attending to each other: (nW, window**2, window**2)."""
    region = torch.zeros(1, H, W, 1, device=device)
    bands = (slice(0, -window), slice(-window, -shift), slice(-shift, None))
    for i, rows in enumerate(bands):
        for j, columns in enumerate(bands):
            region[:, rows, columns] = 3 * i + j
    region = window_partition(region, window)[0, ..., 0]
    return torch.where(region[:, None] == region[:, :, None], 0.0, -100.0)


def relative_position_index(window: int) -> Tensor:
    """Row of the bias table for every (query, key) pair in a window: (window**2, window**2), int64."""
    axis = torch.arange(window, device="cpu")  # real also where the network is built on the meta device
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    dy = y.flatten()[:, None] - y.flatten() + window - 1
    dx = x.flatten()[:, None] - x.flatten() + window - 1
    return dy * (2 * window - 1) + dx


class WindowAttention(nn.Module):
    """Multi-head self-attention inside a window with a learned relative position bias."""

    def __init__(self, dim: int, window: int, heads: int):
        super().__init__()
        self.window, self.heads = window, heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, heads))
        self.register_buffer("relative_position_index", relative_position_index(window), persistent=False)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x: (B, nW, N, C), N = window**2; mask: (nW, N, N) or None."""
        N = x.shape[2]
        bias = self.relative_position_bias_table[self.relative_position_index.flatten()]
        bias = bias.view(N, N, self.heads).permute(2, 0, 1).contiguous()  # (heads, N, N)
        return self.proj(window_attention(self.qkv(x), self.heads, bias, mask))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(activated(self.fc1, x, "gelu"))


class SwinBlock(nn.Module):
    """Window attention and MLP, pre-norm and residual; odd blocks shift the windows by half their size."""

    def __init__(self, dim: int, heads: int, window: int, shift: int, mlp_ratio: float, drop_path: float):
        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, heads)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, W, C), H and W multiples of the window."""
        H, W = x.shape[1:3]
        h = self.norm1(x)
        mask = None
        if self.shift:
            h = h.roll((-self.shift, -self.shift), dims=(1, 2))
            mask = shift_mask(H, W, self.window, self.shift, x.device)
        h = self.attn(window_partition(h, self.window), mask)
        h = window_reverse(h, self.window, H, W)
        if self.shift:
            h = h.roll((self.shift, self.shift), dims=(1, 2))
        x = x + self.drop_path(h)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class ResidualGroup(nn.Module):
    """The Swin blocks of one RSTB (a module of its own because published keys have this level)."""

    def __init__(self, blocks: Sequence[SwinBlock]):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)


class RSTB(nn.Module):
    """Residual Swin transformer block: Swin blocks, a convolution, a skip."""

    def __init__(self, dim: int, blocks: Sequence[SwinBlock], conv: nn.Module):
        super().__init__()
        self.residual_group = ResidualGroup(blocks)
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """(B, H, W, C) -> (B, H, W, C)."""
        h = x
        for block in self.residual_group.blocks:
            h = block(h)
        return x + self.conv(h.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Only a norm: SwinIR's patches are single pixels (a module of its own because published keys have this level)."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, H, W, C)."""
        return self.norm(x.permute(0, 2, 3, 1))


def residual_conv(dim: int, kind: str) -> nn.Module:
    """The convolution at the end of an RSTB and of the body: one 3x3, or the slimmer '3conv' bottleneck."""
    if kind == "1conv":
        return nn.Conv2d(dim, dim, 3, padding=1)
    if kind == "3conv":
        return nn.Sequential(
            nn.Conv2d(dim, dim // 4, 3, padding=1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(dim // 4, dim // 4, 1),
            nn.LeakyReLU(0.2),
            nn.Conv2d(dim // 4, dim, 3, padding=1),
        )
    raise ValueError(f"resi_connection is '1conv' or '3conv', not '{kind}'")


def pixelshuffle_steps(scale: int, features: int) -> nn.Sequential:
    """conv + PixelShuffle pairs up to `scale`, a power of two or 3."""
    factors = [3] if scale == 3 else [2] * int(math.log2(scale))
    if math.prod(factors) != scale:
        raise ValueError(f"sf must be a power of two or 3 with this head, not {scale}")
    steps = [[nn.Conv2d(features, r * r * features, 3, padding=1), nn.PixelShuffle(r)] for r in factors]
    return nn.Sequential(*(layer for step in steps for layer in step))


class SwinIR(nn.Module):
    """Image restoration transformer; the output is `sf / unshuffle_scale` times the size of the input.

    Args:
        in_chans: image channels.
        embed_dim: token width, a multiple of every entry of `num_heads`.
        depths: Swin blocks in each RSTB.
        num_heads: attention heads in each RSTB.
        window_size: side of an attention window, in tokens.
        mlp_ratio: hidden width of the MLPs over `embed_dim`.
        sf: upsampling factor of the head.
        upsampler: head: 'pixelshuffle' (classical), 'pixelshuffledirect' (lightweight), 'nearest+conv' (real-world),
            '' (denoising and JPEG: global residual, sf 1).
        resi_connection: '1conv' or '3conv'.
        unshuffle_scale: pixel-unshuffle before the first convolution, so attention runs at 1/unshuffle_scale.
        num_feat: channels of the upsampling head.
        img_range: value range that the network works in.
        global_residual: adds the input to the output of a head, where sf = unshuffle_scale. Published models don't;
            a small model that is trained briefly starts as the identity with it and keeps more detail.
        drop_path_rate: stochastic depth of the last block; rises linearly from 0.
        checkpointing: in training, computes the inside of every RSTB again in the backward pass, to save memory.
    """

    packs = True  # layers are only called, so that `model.networks.packed` may replace them

    def __init__(
        self,
        in_chans: int = 3,
        embed_dim: int = 180,
        depths: Sequence[int] = (6,) * 8,
        num_heads: Sequence[int] = (6,) * 8,
        window_size: int = 8,
        mlp_ratio: float = 2.0,
        sf: int = 8,
        upsampler: str = "nearest+conv",
        resi_connection: str = "1conv",
        unshuffle_scale: int = 1,
        num_feat: int = 64,
        img_range: float = 1.0,
        global_residual: bool = False,
        drop_path_rate: float = 0.0,
        checkpointing: bool = False,
    ):
        super().__init__()
        if upsampler not in HEADS:
            raise ValueError(f"upsampler must be one of {HEADS}, not '{upsampler}'")
        if len(depths) != len(num_heads):
            raise ValueError(f"depths has {len(depths)} entries but num_heads {len(num_heads)}; one of each per RSTB")
        self.window_size, self.sf, self.upsampler, self.unshuffle_scale = window_size, sf, upsampler, unshuffle_scale
        if global_residual and (upsampler == "" or sf != unshuffle_scale):
            raise ValueError("global_residual needs an upsampling head and sf = unshuffle_scale")
        self.img_range, self.global_residual, self.checkpointing = img_range, global_residual, checkpointing
        self.scale = sf / unshuffle_scale  # output size over input size
        self.multiple = window_size * unshuffle_scale  # of the input size; others are padded to it
        mean = RGB_MEAN if in_chans == 3 else (0.0,) * in_chans
        self.register_buffer("mean", torch.tensor(mean, device="cpu").view(1, -1, 1, 1), persistent=False)

        if unshuffle_scale > 1:
            self.conv_first = nn.Sequential(
                nn.PixelUnshuffle(unshuffle_scale),
                nn.Conv2d(in_chans * unshuffle_scale**2, embed_dim, 3, padding=1),
            )
        else:
            self.conv_first = nn.Conv2d(in_chans, embed_dim, 3, padding=1)
        self.patch_embed = PatchEmbed(embed_dim)
        drop_paths = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))
        self.layers = nn.ModuleList(
            RSTB(
                embed_dim,
                [
                    SwinBlock(embed_dim, heads, window_size, i % 2 * (window_size // 2), mlp_ratio, next(drop_paths))
                    for i in range(depth)
                ],
                residual_conv(embed_dim, resi_connection),
            )
            for depth, heads in zip(depths, num_heads, strict=True)
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.conv_after_body = residual_conv(embed_dim, resi_connection)

        if upsampler == "pixelshuffledirect":
            self.upsample = nn.Sequential(nn.Conv2d(embed_dim, sf**2 * in_chans, 3, padding=1), nn.PixelShuffle(sf))
        elif upsampler == "":
            self.conv_last = nn.Conv2d(embed_dim, in_chans, 3, padding=1)
        else:
            self.conv_before_upsample = nn.Sequential(nn.Conv2d(embed_dim, num_feat, 3, padding=1), nn.LeakyReLU())
            if upsampler == "pixelshuffle":
                self.upsample = pixelshuffle_steps(sf, num_feat)
            else:
                self.doublings = int(math.log2(sf))
                if 2**self.doublings != sf:
                    raise ValueError(f"sf must be a power of two with the 'nearest+conv' head, not {sf}")
                for i in range(self.doublings):
                    self.add_module(f"conv_up{i + 1}", DoublingConv2d(num_feat, num_feat))
                self.conv_hr = nn.Conv2d(num_feat, num_feat, 3, padding=1)
            self.conv_last = nn.Conv2d(num_feat, in_chans, 3, padding=1)

        self.apply(self._init)
        if global_residual:
            zero_module(self.upsample[0] if upsampler == "pixelshuffledirect" else self.conv_last)
        self.register_load_state_dict_pre_hook(drop_derived_buffers)

    @staticmethod
    def _init(module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            trunc_normal_(module.weight, std=0.02)
            nn.init.zeros_(module.bias)

    def features(self, x: Tensor) -> Tensor:
        """Deep features: (B, C, h, w) -> (B, C, h, w)."""
        h = self.patch_embed(x)
        for layer in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                h = checkpoint(layer, h, use_reentrant=False)
            else:
                h = layer(h)
        return self.conv_after_body(self.norm(h).permute(0, 3, 1, 2)) + x

    def upsample_nearest(self, x: Tensor) -> Tensor:
        for i in range(self.doublings):
            x = activated(self.get_submodule(f"conv_up{i + 1}"), x, "leaky_relu")
        return self.conv_last(activated(self.conv_hr, x, "leaky_relu"))

    def forward(self, image: Tensor) -> Tensor:
        """Restores.

        Args:
            image: (B, in_chans, H, W) in [0, 1], any size (padded by reflection inside).

        Returns:
            (B, in_chans, H * sf / unshuffle_scale, W * sf / unshuffle_scale), not clamped.
        """
        H, W = image.shape[-2:]
        x = (pad_to_multiple(image, self.multiple) - self.mean) * self.img_range
        h = self.features(self.conv_first(x))
        if self.upsampler == "pixelshuffle":
            h = self.conv_last(self.upsample(self.conv_before_upsample(h)))
        elif self.upsampler == "pixelshuffledirect":
            h = self.upsample(h)
        elif self.upsampler == "nearest+conv":
            h = self.upsample_nearest(self.conv_before_upsample(h))
        else:
            h = x + self.conv_last(h)
        if self.global_residual:
            h = h + x
        h = h / self.img_range + self.mean
        return h[..., : H * self.sf // self.unshuffle_scale, : W * self.sf // self.unshuffle_scale]


def drop_derived_buffers(module: nn.Module, state_dict: dict, *_) -> None:
    """Published files carry masks and index tables that follow from the window size; they are computed here."""
    for key in [k for k in state_dict if k.endswith((".attn_mask", ".relative_position_index"))]:
        del state_dict[key]
