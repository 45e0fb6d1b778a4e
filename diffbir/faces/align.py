"""Brings a face to the place and size that models of faces are trained on: 512 pixels square, aligned as FFHQ is.

A map is a (2, 3) float64 matrix A | b: x -> A x + b, from pixels of one picture to pixels of another, both counted from
the top left corner (the first pixel's centre is at 0.5, 0.5).
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 512
# Both eyes, nose and corners of the mouth in an aligned face: the field's standard, which counts from the first pixel's
# centre.
TEMPLATE = torch.tensor(
    [
        [192.98138, 239.94708],
        [318.90277, 240.19360],
        [256.63416, 314.01935],
        [201.26117, 371.41043],
        [313.08905, 371.15118],
    ],
    dtype=torch.float64,
).add(0.5)
MARGIN = 4  # pixels around a region, for interpolation


def similarity(points: Tensor, target: Tensor = TEMPLATE) -> Tensor:
    """The map of turn, scale and shift (no mirroring) that brings points nearest to others, in least squares.

    Written in complex numbers it is z -> a z + b, for which a = <z, w> / <z, z> of the centred points.

    Args:
        points, target: (N, 2), not all the same.
    """
    z, w = (torch.view_as_complex(p.to(torch.float64).contiguous()) for p in (points, target))
    z_0, w_0 = z.mean(), w.mean()
    a = torch.vdot(z - z_0, w - w_0) / torch.vdot(z - z_0, z - z_0)
    b = w_0 - a * z_0
    return torch.stack([torch.stack([a.real, -a.imag, b.real]), torch.stack([a.imag, a.real, b.imag])])


def misfit(points: Tensor, target: Tensor = TEMPLATE) -> float:
    """How far the points stay from their targets after `similarity`: root mean square, in pixels of the target."""
    mapped = apply(similarity(points, target), points.to(torch.float64))
    return (mapped - target).square().sum(1).mean().sqrt().item()


def apply(matrix: Tensor, points: Tensor) -> Tensor:
    """Points (N, 2) under a map."""
    return points @ matrix[:, :2].T + matrix[:, 2]


def inverse(matrix: Tensor) -> Tensor:
    return torch.cat([matrix, matrix.new_tensor([[0, 0, 1]])]).inverse()[:2]


def scaled(matrix: Tensor, x: float, y: float) -> Tensor:
    """The map from a picture that is x and y times as large."""
    return torch.cat([matrix[:, :2] / matrix.new_tensor([x, y]), matrix[:, 2:]], 1)


def shifted(matrix: Tensor, x: float, y: float) -> Tensor:
    """The map from a part of the picture, whose corner is at x, y of it."""
    return torch.cat([matrix[:, :2], apply(matrix, matrix.new_tensor([[x, y]])).T], 1)


def bounds(matrix: Tensor, size: Sequence[int]) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of what a picture of `size` (height, width) becomes under a map."""
    height, width = size
    corners = apply(matrix, matrix.new_tensor([[0, 0], [width, 0], [width, height], [0, height]]))
    return (*corners.min(0).values.tolist(), *corners.max(0).values.tolist())


def region(matrix: Tensor, size: Sequence[int], within: Sequence[int], margin: float = 0) -> tuple[int, int, int, int]:
    """The pixels of a picture `within` (height, width) that `bounds` covers, as left, top, right and bottom.

    At least one pixel: the nearest, where it covers none.
    """
    left, top, right, bottom = bounds(matrix, size)
    x = [min(max(math.floor(left - margin), 0), within[1] - 1), max(min(math.ceil(right + margin), within[1]), 1)]
    y = [min(max(math.floor(top - margin), 0), within[0] - 1), max(min(math.ceil(bottom + margin), within[0]), 1)]
    return x[0], y[0], max(x[1], x[0] + 1), max(y[1], y[0] + 1)


def warp(picture: Tensor, matrix: Tensor, size: Sequence[int], outside: str = "reflection") -> Tensor:
    """Draws a picture anew, bicubic, and antialiased where it shrinks.

    Args:
        picture: (C, H, W) in [0, 1].
        matrix: the map from the new picture to this one.
        size: height and width of the new picture.
        outside: what lies around the picture: reflection or zeros.

    Returns:
        (C, *size) in [0, 1].
    """
    shrink = matrix[:, :2].det().abs().sqrt().item()
    left, top, right, bottom = region(matrix, size, picture.shape[-2:], MARGIN * max(1, shrink))
    part = picture[None, :, top:bottom, left:right]
    to_part = torch.cat([matrix[:, :2], matrix[:, 2:] - matrix.new_tensor([[left], [top]])], 1)
    if shrink > 1:
        height, width = part.shape[-2:]
        smaller = [max(1, round(height / shrink)), max(1, round(width / shrink))]
        part = F.interpolate(part, smaller, mode="bicubic", antialias=True)
        to_part = to_part * matrix.new_tensor([[smaller[1] / width], [smaller[0] / height]])
    # To the coordinates of grid_sample: -1 and 1 are the outer edges.
    height, width = part.shape[-2:]
    x, y = (torch.arange(n, dtype=torch.float64) + 0.5 for n in (size[1], size[0]))
    new = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1)
    grid = apply(to_part, new.flatten(0, 1)).view(*size, 2) * 2 / matrix.new_tensor([width, height]) - 1
    drawn = F.grid_sample(part, grid.to(part)[None], "bicubic", outside, align_corners=False)
    return drawn[0].clamp(0, 1)


def align(photo: Tensor, points: Tensor) -> Tensor:
    """Cuts out a face.

    What lies outside the photo is its reflection.

    Args:
        photo: (3, H, W) in [0, 1].
        points: (5, 2), its landmarks.

    Returns:
        (3, SIDE, SIDE) in [0, 1].
    """
    return warp(photo, inverse(similarity(points)), (SIDE, SIDE))
