"""How a photo's faces look restored for themselves, and whether a border is to be seen where they are pasted.

The photo is first shrunk by two, with noise and JPEG. Prints, for every face, how much steeper the picture is across
the border of the mask than that of the background's model alone; writes input, background and faces side by side.
"""

import io
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from benchmarks import arguments
from diffbir.faces.align import SIDE, inverse, warp
from diffbir.faces.paste import soft_mask
from diffbir.faces.restorer import FaceRestorer
from diffbir.utils.image import read_rgb, side_by_side, to_tensor, to_uint8

NOISE, QUALITY = 6.0, 60  # levels of 255; of JPEG
EDGE = (0.01, 0.3)  # values of the mask at its border


def main(argv: list[str] | None = None) -> int:
    p = arguments.parser(__doc__)
    p.add_argument("--input", required=True, help="a photo with faces")
    p.add_argument("--output", required=True, type=Path, help="the picture: .jpg or .png")
    arguments.add_preset(p)
    args = p.parse_args(argv)
    photo = degraded(read_rgb(args.input))
    background = arguments.restorer(args)
    restorer = FaceRestorer(background)
    options = restorer.options(upscale=2)
    alone = background.restore(photo[None], options).image[0]
    result = restorer.restore(photo[None], options)
    for i, face in enumerate(result.faces[0], 1):
        found = f"face {i}: {face.face.box[2] - face.face.box[0]:.0f} pixels wide, score {face.face.score:.3f}"
        if face.restored is not None:
            found += f", steepness across the border {steepness(result.image[0], alone, face.matrix):.2f}"
        print(found)
    pictures = {"input": result.input[0], "background's model alone": alone, "with --faces": result.image[0]}
    Image.fromarray(side_by_side({title: to_uint8(x) for title, x in pictures.items()})).save(args.output, quality=90)
    return 0


def degraded(rgb: np.ndarray) -> Tensor:
    """(H, W, 3) uint8 -> (3, H / 2, W / 2) in [0, 1]."""
    small = F.interpolate(to_tensor(rgb)[None], scale_factor=0.5, mode="bicubic", antialias=True)[0]
    small += torch.randn(small.shape, generator=torch.Generator().manual_seed(0)) * NOISE / 255
    file = io.BytesIO()
    Image.fromarray(to_uint8(small)).save(file, "JPEG", quality=QUALITY)
    return to_tensor(read_rgb(file))


def steepness(after: Tensor, before: Tensor, matrix: Tensor) -> float:
    """Mean step across the border of a pasted face, over the mean step of the same photo without it; 1 is no border.

    Args:
        after, before: (3, H, W).
        matrix: the map from them to the aligned face.
    """
    mask = soft_mask()
    border = ((mask > EDGE[0]) & (mask < EDGE[1]))[0, 1:-1, 1:-1]
    outwards = torch.stack([slope(mask, -1), slope(mask, -2)])[:, 0]
    outwards = outwards / outwards.norm(dim=0).clamp(min=1e-9)
    steps = []
    for photo in (after, before):
        seen = warp(photo, inverse(matrix), (SIDE, SIDE))
        across = slope(seen, -1) * outwards[0] + slope(seen, -2) * outwards[1]
        steps.append(across.abs().mean(0)[border].mean().item())
    return steps[0] / steps[1]


def slope(x: Tensor, dim: int) -> Tensor:
    """(C, H, W) -> central differences along one dimension, (C, H - 2, W - 2)."""
    inner = x[:, 1:-1, :] if dim == -1 else x[:, :, 1:-1]
    return (inner.narrow(dim, 2, SIDE - 2) - inner.narrow(dim, 0, SIDE - 2)) / 2


if __name__ == "__main__":
    sys.exit(main())
