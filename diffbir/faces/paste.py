"""Puts restored faces back into a photo: a soft mask, and colours that agree where the mask ends."""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffbir.faces.align import SIDE, inverse, region, shifted, warp

# The mask in an aligned face: an ellipse around forehead, cheeks and chin, full inside, that falls to zero from
# INNER of its radii on.
CENTRE, RADII, INNER = (256.0, 296.0), (196.0, 204.0), 0.62
COARSE = 64  # pixels of the side at which colours are compared
REACH = 0.14  # of the side: how far what is seen at the border tells about colours inside


def soft_mask() -> Tensor:
    """(1, SIDE, SIDE): 1 on the face, 0 at the sides and corners, smooth in between."""
    at = torch.arange(SIDE) + 0.5
    x, y = (at - CENTRE[0]) / RADII[0], (at - CENTRE[1]) / RADII[1]
    radius = (x[None] ** 2 + y[:, None] ** 2).sqrt()
    t = ((1 - radius) / (1 - INNER)).clamp(0, 1)
    return (t * t * (3 - 2 * t))[None]


def match_border(face: Tensor, around: Tensor, mask: Tensor) -> Tensor:
    """Changes a face's colours, slowly over the picture, so that where the mask fades they are those around it.

    The difference is averaged by a wide Gaussian over the fading ring alone, which also carries it to the middle.

    Args:
        face, around: (3, SIDE, SIDE), the restored face and what it shall lie on.
        mask: (1, SIDE, SIDE).
    """
    ring = F.adaptive_avg_pool2d(4 * mask * (1 - mask), COARSE)
    difference = F.adaptive_avg_pool2d(around - face, COARSE)
    at = torch.arange(COARSE) / (REACH * COARSE)
    gaussian = torch.exp(-((at[:, None] - at[None]) ** 2) / 2)
    mean = (gaussian @ (ring * difference) @ gaussian) / (gaussian @ ring @ gaussian).clamp(min=1e-6)
    mean = F.interpolate(mean[None], (SIDE, SIDE), mode="bicubic")[0]
    return (face + mean).clamp(0, 1)


def paste(photo: Tensor, faces: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """A photo with faces in their places.

    Where faces overlap, each pixel is the mean of them, weighted by the squares of their masks: the nearer face
    prevails, and the order of the faces doesn't matter.

    Args:
        photo: (3, H, W) in [0, 1].
        faces: restored faces (3, SIDE, SIDE) in [0, 1], each with the map from the photo to it.
    """
    mask = soft_mask()
    height, width = photo.shape[-2:]
    total, weight, rest = torch.zeros_like(photo), torch.zeros(1, height, width), torch.ones(1, height, width)
    for face, matrix in faces:
        back = inverse(matrix)
        face = match_border(face, warp(photo, back, (SIDE, SIDE)), mask)
        left, top, right, bottom = region(back, (SIDE, SIDE), (height, width))
        to_face = shifted(matrix, left, top)
        # The face is reflected at its sides, where the mask, which isn't, is zero.
        pasted, cover = (
            warp(x, to_face, (bottom - top, right - left), outside)
            for x, outside in ((face, "reflection"), (mask, "zeros"))
        )
        here = (slice(None), slice(top, bottom), slice(left, right))
        total[here] += cover**2 * pasted
        weight[here] += cover**2
        rest[here] *= 1 - cover
    return torch.where(weight > 0, rest * photo + (1 - rest) * total / weight.clamp(min=1e-12), photo)
