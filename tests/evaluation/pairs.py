"""Ten damaged photos and the photos, the same to the bit everywhere: whole numbers only."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from skimage import data

from diffbir.utils.image import read_rgb

DEMO = Path(__file__).parents[2] / "inputs/demo"
PHOTOS = ("astronaut", "coffee", "chelsea", "rocket", "camera")
FILES = (
    "expedition-1897-faded.jpg",
    "hopper-jpeg.jpg",
    "village-phone.jpg",
    "taiko-night-noise.png",
    "harbour-1961-grey.png",
)
NAMES = (*PHOTOS, *FILES)
SIZE = 200, 301  # at most; odd, and no multiple of a block


def photo(name: str) -> NDArray[np.uint8]:
    """(H, W, 3), its centre."""
    rgb = getattr(data, name)() if name in PHOTOS else read_rgb(DEMO / name)
    rgb = np.stack([rgb] * 3, axis=-1) if rgb.ndim == 2 else rgb
    top, left = (max(0, (side - most) // 2) for side, most in zip(rgb.shape, SIZE, strict=False))
    return rgb[top : top + SIZE[0], left : left + SIZE[1]]


def damaged(rgb: NDArray[np.uint8], kind: int) -> NDArray[np.uint8]:
    """Noise, a blur, a mosaic, few levels, or noise that was blurred; the same size."""
    x, rng = rgb.astype(np.int64), np.random.default_rng(kind)
    if kind in (0, 4):
        x = np.clip(x + rng.integers(-40, 41, x.shape), 0, 255)
    if kind in (1, 4):
        x = sum(np.roll(x, (i, j), (0, 1)) for i in range(-1, 2) for j in range(-1, 2)) // 9
    if kind == 2:
        x = x[1::3, 1::3].repeat(3, 0).repeat(3, 1)
        x = np.pad(x, ((0, rgb.shape[0]), (0, rgb.shape[1]), (0, 0)), mode="edge")[: rgb.shape[0], : rgb.shape[1]]
    if kind == 3:
        x = x // 24 * 24 + 12
    if kind in (1, 3):  # on flat parts, BRISQUE would depend on how a processor rounds
        x = x + rng.integers(-1, 2, x.shape)
    return np.clip(x, 0, 255).astype(np.uint8)


def pair(name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The damaged photo and the photo, (H, W, 3)."""
    rgb = photo(name)
    return damaged(rgb, NAMES.index(name) % 5), rgb
