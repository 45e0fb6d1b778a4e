"""Synthetic pairs for the benchmarks that restore photos."""

from pathlib import Path

import torch
from torch import Tensor

from diffbir.dataset.pairs import ImagePairs
from diffbir.utils.config import instantiate, load_config

DEGRADATION = "configs/dataset/realesrgan.yaml"  # second order, final scale 4, bicubic back to size


def synthetic_pairs(
    folder: str | Path, size: int, count: int, degradation: str = DEGRADATION, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Centre crops of the first `count` photos, and the same degraded: (count, 3, size, size) each, in [0, 1]."""
    recipe = instantiate(load_config(degradation).degradation)
    pairs = ImagePairs(folder, size, recipe, crop="centre", flip=False, shuffle=False, seed=seed)
    items = [pairs[i] for i in range(min(count, len(pairs)))]
    return torch.stack([item["hq"] for item in items]), torch.stack([item["lq"] for item in items])
