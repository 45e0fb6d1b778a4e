"""3x3 convolution with 4/9 of the products: Winograd's F(2x2, 3x3) (Lavin and Gray 2016, https://arxiv.org/abs/1509.09308).

A tile of 2x2 results comes from 4x4 values d: A^T [(G g G^T) * (B^T d B)] A for a kernel g, where the product in the
middle is one of matrices over the channels for each of the 16 places. The weights are transformed in every call: so
they take no more memory than otherwise, and where many tiles share them, hardly any time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

G = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], device="cpu")
A = torch.tensor([[1.0, 0], [1, 1], [1, -1], [0, -1]], device="cpu")
B = ((torch.sub, 0, 2), (torch.add, 1, 2), (torch.sub, 2, 1), (torch.sub, 1, 3))  # d0 - d2, d1 + d2, d2 - d1, d1 - d3
BIASED = 5  # the one of the 16 places that enters all four results of a tile once

CHANNELS, TILES = 256, 256  # with fewer of either, the transforms take longer than the products that they spare
BLOCK = 1 << 22  # transformed values at a time: 16 MB


def pays(image: torch.Size, weight: torch.Size, padding: Sequence[int] = (1, 1)) -> bool:
    """Whether `conv2d` of such an image and weight can be computed this way, and faster."""
    _, C, H, W = image  # however many: an image does not depend on its batch
    H += 2 * padding[0] - 2  # of the result
    return padding[1] == 1 and min(C, weight[0]) >= CHANNELS and H % 2 == W % 2 == 0 and H * W // 4 >= TILES


def in_order(weight: Tensor) -> Tensor:
    """The same weights, (D, C, 3, 3), as `conv2d` reads them: a matrix (C, D) for each of the nine places."""
    return weight.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)


def conv2d(x: Tensor, weight: Tensor, bias: Tensor, padding: Sequence[int] = (1, 1)) -> Tensor:
    """`F.conv2d(x, weight, bias, padding=padding)`, without a gradient.

    Args:
        x: (N, C, H, W); H and W of the result are even.
        weight: (D, C, 3, 3); see `in_order`.
        bias: (D,).
        padding: (1, 1), or (0, 1) for an x of two rows more than the result.

    Returns:
        (N, D, H, W), channels last.
    """
    (N, C, H, W), D = x.shape, len(weight)
    H += 2 * padding[0] - 2
    kernels = (torch.kron(G, G) @ weight.permute(2, 3, 1, 0).reshape(9, -1)).view(16, C, D)
    back = torch.kron(A, A).T
    tiles = BLOCK // (16 * max(C, D))
    n, rows = min(N, max(1, 4 * tiles // (H * W))), min(H, max(2, 2 * (2 * tiles // W)))  # of a block
    framed, y = x.new_zeros(n, rows + 2, W + 2, C), x.new_empty(N, H // 2, 2, W // 2, 2, D)
    d, m = (x.new_empty(16 * n * (rows // 2) * (W // 2) * channels) for channels in (C, D))
    for images, results in zip(x.permute(0, 2, 3, 1).split(n), y.split(n), strict=True):
        for top in range(0, H, rows):
            result = results[:, top // 2 : (top + rows) // 2]
            b, h = result.shape[:2]
            block = frame(images, top - padding[0], framed[:b, : 2 * h + 2])
            values = transform(block, d[: 16 * b * h * (W // 2) * C].view(4, 4, b, h, W // 2, C))
            products = m[: 16 * b * h * (W // 2) * D].view(16, -1, D)
            torch.bmm(values.view(16, -1, C), kernels, out=products)
            products[BIASED] += bias
            result.copy_((back @ products.view(16, -1)).view(2, 2, b, h, W // 2, D).permute(2, 3, 0, 4, 1, 5))
    return y.view(N, H, W, D).permute(0, 3, 1, 2)


def frame(x: Tensor, top: int, out: Tensor) -> Tensor:
    """Rows of x (b, H, W, C) from `top` on, zero where there are none, into `out`, whose sides are zero."""
    first, last = max(top, 0), min(top + out.shape[1], x.shape[1])
    out[:, 0] = out[:, -1] = 0
    out[:, first - top : last - top, 1:-1] = x[:, first:last]
    return out


def transform(x: Tensor, out: Tensor) -> Tensor:
    """B^T d B of every tile: x (b, 2 h + 2, 2 w + 2, C) -> out (4, 4, b, h, w, C)."""
    rows = along(x, 1)
    for i, (of_rows, a, b) in enumerate(B):
        columns = along(of_rows(rows[a], rows[b]), 2)
        for j, (of_columns, c, d) in enumerate(B):
            of_columns(columns[c], columns[d], out=out[i, j])
    return out


def along(x: Tensor, dim: int) -> list[Tensor]:
    """d0 .. d3 of every tile along a dimension; tiles begin at every second place."""
    even, odd = x.unflatten(dim, (-1, 2)).unbind(dim + 1)
    n = even.shape[dim] - 1
    return [values.narrow(dim, start, n) for start in (0, 1) for values in (even, odd)]
