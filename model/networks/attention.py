"""Attention, once: of one sequence to another, and inside windows."""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """Multi-head scaled dot-product attention: softmax(q k^T / sqrt(d)) v.

    Args:
        q: (B, L, heads * d).
        k: (B, S, heads * d).
        v: (B, S, heads * d).

    Returns:
        (B, L, heads * d).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L or S, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def window_attention(qkv: Tensor, heads: int, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """Self-attention inside windows: softmax(q k^T / sqrt(d) + bias + mask) v.

    Args:
        qkv: queries, keys and values of nW windows of N tokens, (B, nW, N, 3 * heads * d).
        bias: the same in every window, (heads, N, N).
        mask: the same in every head, (nW, N, N), or None.

    Returns:
        (B, nW, N, heads * d).
    """
    if qkv.device.type == "cpu" and not torch.is_grad_enabled():
        return torch.stack([windows_of_an_image(x, heads, bias, mask) for x in qkv])
    q, k, v = rearrange(qkv, "b w n (three h d) -> three b w h n d", three=3, h=heads).contiguous()
    bias, mask = bias.to(q.dtype), None if mask is None else mask[:, None].to(q.dtype)
    if has_fused_bias(q):
        # Windows count as heads, so that one bias serves the whole batch instead of being repeated for it.
        bias = bias.expand(q.shape[1], -1, -1, -1) if mask is None else bias + mask
        x = F.scaled_dot_product_attention(*(y.flatten(1, 2) for y in (q, k, v)), attn_mask=bias.flatten(0, 1))
        x = x.view_as(q)
    else:
        logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        logits += bias
        if mask is not None:
            logits += mask
        x = logits.softmax(-1) @ v
    return rearrange(x, "b w h n d -> b w n (h d)")


def windows_of_an_image(qkv: Tensor, heads: int, bias: Tensor, mask: Tensor | None) -> Tensor:
    """`window_attention` of one image, (nW, N, 3 * heads * d), fused; nothing is put in order."""
    q, k, v = rearrange(qkv, "w n (three h d) -> three w h n d", three=3, h=heads)
    bias = (bias[None] if mask is None else bias + mask[:, None]).to(q.dtype)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)


def has_fused_bias(x: Tensor) -> bool:
    """Whether attention with a trained bias is fused where x is.

    On the CPU the fused kernel has no gradient for the bias, and its fallback is slower than plain products.
    """
    return x.device.type != "cpu"
