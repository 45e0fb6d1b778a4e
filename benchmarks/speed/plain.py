"""The straightforward form of the networks: what this code is compared with where no other library computes the same.

SwinIR in the steps of its paper (Liang et al. 2021, https://arxiv.org/abs/2108.10257) and of Swin's (Liu et al. 2021,
https://arxiv.org/abs/2103.14030): tokens in a row, windows cut out and put back, attention with its matrices written
out, the position bias looked up in every call, a convolution after every nearest-neighbour doubling, contiguous layout.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbir.model.networks.layers import pad_to_multiple
from diffbir.model.networks.swinir import RSTB, SwinBlock, SwinIR, WindowAttention


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_) -> Tensor:
    """As `F.scaled_dot_product_attention` without dropout, with its matrices written out."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = logits if attn_mask is None else logits + attn_mask
    return logits.softmax(-1) @ v


@contextmanager
def plain_attention() -> Iterator[None]:
    """Both passes belong in it: with checkpointing, the backward pass runs the forward pass again."""
    with patch.object(F, "scaled_dot_product_attention", attention):
        yield


def window_attention(qkv: Tensor, heads: int, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(q k^T / sqrt(d) + bias + mask) v inside windows (Swin, equation 4).

    Args:
        qkv: (B, nW, N, 3 * heads * d).
        bias: (heads, N, N).
        mask: (nW, N, N) or None.

    Returns:
        (B, nW, N, heads * d).
    """
    B, nW, N = qkv.shape[:3]
    q, k, v = qkv.reshape(B * nW, N, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = logits + bias
    if mask is not None:
        logits = (logits.view(B, nW, heads, N, N) + mask[:, None]).view(-1, heads, N, N)
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(B, nW, N, -1)


def partition(x: Tensor, window: int) -> Tensor:
    """(B, H, W, C) -> (B, nW, window^2, C)."""
    B, H, W, C = x.shape
    x = x.view(B, H // window, window, W // window, window, C)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(B, -1, window * window, C)


def together(windows: Tensor, window: int, H: int, W: int) -> Tensor:
    """The inverse of `partition`."""
    B = len(windows)
    x = windows.view(B, H // window, W // window, window, window, -1)
    return x.permute(0, 1, 3, 2, 4, 5).reshape(B, H, W, -1)


def shift_mask(H: int, W: int, window: int, shift: int, x: Tensor) -> Tensor:
    """-100 between tokens that only the cyclic shift made neighbours: (nW, N, N)."""
    region, count = x.new_zeros(1, H, W, 1), 0
    for rows in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
        for columns in (slice(0, -window), slice(-window, -shift), slice(-shift, None)):
            region[:, rows, columns] = count
            count += 1
    region = partition(region, window)[0, ..., 0]
    return (region[:, None] != region[:, :, None]).to(x.dtype) * -100


def self_attention(layer: WindowAttention, x: Tensor, mask: Tensor | None) -> Tensor:
    N = x.shape[2]
    bias = layer.relative_position_bias_table[layer.relative_position_index.view(-1)].view(N, N, -1)
    return layer.proj(window_attention(layer.qkv(x), layer.heads, bias.permute(2, 0, 1).contiguous(), mask))


def swin_block(block: SwinBlock, x: Tensor, H: int, W: int, mask: Tensor) -> Tensor:
    """x: (B, H W, C)."""
    B, L, C = x.shape
    h = block.norm1(x).view(B, H, W, C)
    if block.shift:
        h = torch.roll(h, (-block.shift, -block.shift), dims=(1, 2))
    h = self_attention(block.attn, partition(h, block.window), mask if block.shift else None)
    h = together(h, block.window, H, W)
    if block.shift:
        h = torch.roll(h, (block.shift, block.shift), dims=(1, 2))
    x = x + block.drop_path(h.view(B, L, C))
    mlp = block.mlp
    return x + block.drop_path(mlp.fc2(F.gelu(mlp.fc1(block.norm2(x)))))


def rstb(layer: RSTB, x: Tensor, H: int, W: int, mask: Tensor) -> Tensor:
    h = x
    for block in layer.residual_group.blocks:
        h = swin_block(block, h, H, W, mask)
    image = h.transpose(1, 2).reshape(len(h), -1, H, W)
    return x + layer.conv(image).flatten(2).transpose(1, 2)


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), conv.weight, conv.bias, padding=1)


class PlainSwinIR(nn.Module):
    """Computes what a `SwinIR` with the head 'nearest+conv' does, with its weights."""

    def __init__(self, net: SwinIR):
        super().__init__()
        if net.upsampler != "nearest+conv" or net.global_residual:
            raise ValueError("the straightforward form is written for the head 'nearest+conv' alone")
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        net = self.net
        height, width = image.shape[-2:]
        x = net.conv_first((pad_to_multiple(image, net.multiple) - net.mean) * net.img_range)
        B, C, H, W = x.shape
        mask = shift_mask(H, W, net.window_size, net.window_size // 2, x)
        h = net.patch_embed.norm(x.flatten(2).transpose(1, 2))
        for layer in net.layers:
            h = rstb(layer, h, H, W, mask)
        h = net.norm(h).transpose(1, 2).reshape(B, C, H, W)
        h = net.conv_before_upsample(net.conv_after_body(h) + x)
        for i in range(net.doublings):
            h = F.leaky_relu(upsample_conv(h, net.get_submodule(f"conv_up{i + 1}")), 0.2)
        h = net.conv_last(F.leaky_relu(net.conv_hr(h), 0.2))
        h = h / net.img_range + net.mean
        return h[..., : round(height * net.scale), : round(width * net.scale)]
