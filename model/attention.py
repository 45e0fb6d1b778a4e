"""Attention, once."""

import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, bias: Tensor | None = None) -> Tensor:
    """Multi-head scaled dot-product attention: softmax(q k^T / sqrt(d) + bias) v.

    Args:
        q: (B, L, heads * d).
        k: (B, S, heads * d).
        v: (B, S, heads * d).
        bias: added to the logits, broadcastable to (B, heads, L, S).

    Returns:
        (B, L, heads * d).
    """
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, L or S, d)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2).flatten(2)
