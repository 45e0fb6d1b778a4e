"""Datasets. An item is a dict: `hq` (3, S, S) float32 RGB in [0, 1], `lq` likewise, `prompt` a string."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from dataset.resize import resize
from utils.image import list_images, read_rgb, to_tensor

Degradation = Callable[[NDArray, np.random.Generator], NDArray]


class ImagePairs(Dataset):
    """Clean crops and their degraded versions, made on the fly.

    Item `n` depends on `n` and the seed alone, not on workers, ranks or what was drawn before: draws
    0 .. N-1 go through the N images in one random order, draws N .. 2N-1 in another, and so on without end.

    Args:
        source: a folder, or a text file with one path a line (see `utils.image.list_images`).
        crop_size: side of the square crop, pixels; smaller images are enlarged to it first.
        degradation: `(hq, rng) -> lq` on (S, S, 3) float32 arrays; None leaves out `lq`.
        crop: 'random' or 'centre'.
        flip: mirrors half of the crops.
        shuffle: False keeps the order of the source (for validation).
        limit: uses only the first so many images.
        seed: what everything random follows from.
    """

    def __init__(
        self,
        source: str,
        crop_size: int,
        degradation: Degradation | None = None,
        crop: str = "random",
        flip: bool = True,
        shuffle: bool = True,
        limit: int | None = None,
        seed: int = 0,
    ):
        if crop not in ("random", "centre"):
            raise ValueError(f"crop must be 'random' or 'centre', not '{crop}'")
        self.paths = list_images(source)[:limit]
        self.crop_size, self.crop, self.flip = crop_size, crop, flip
        self.degradation, self.shuffle, self.seed = degradation, shuffle, seed

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, n: int) -> dict[str, torch.Tensor | str]:
        rng = np.random.default_rng((self.seed, n))
        epoch, i = divmod(n, len(self.paths))
        if self.shuffle:
            i = permutation(len(self.paths), self.seed, epoch)[i]
        hq = self._crop(read_rgb(self.paths[i]), rng)
        if self.flip and rng.random() < 0.5:
            hq = hq[:, ::-1]
        item = {"hq": to_tensor(hq), "prompt": ""}
        if self.degradation is not None:
            item["lq"] = to_tensor(self.degradation(np.ascontiguousarray(hq, dtype=np.float32) / np.float32(255), rng))
        return item

    def _crop(self, image: NDArray, rng: np.random.Generator) -> NDArray:
        size = self.crop_size
        height, width = image.shape[:2]
        if min(height, width) < size:
            factor = size / min(height, width)
            height, width = max(size, round(height * factor)), max(size, round(width * factor))
            image = resize(image, height, width, "bicubic")
        top, left = (height - size) // 2, (width - size) // 2
        if self.crop == "random":
            top, left = rng.integers(height - size, endpoint=True), rng.integers(width - size, endpoint=True)
        return image[top : top + size, left : left + size]


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> NDArray:
    return np.random.default_rng((seed, epoch, n)).permutation(n)
