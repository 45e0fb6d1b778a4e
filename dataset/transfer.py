"""Batches on their way from the loader's processes to the device: a byte for every value that is one of 256."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.data import default_collate

IMAGES = ("hq", "lq", "teacher")


def pack(items: Sequence[dict]) -> dict:
    """Collates items; images of 8-bit values become uint8, a quarter of the memory that processes share.

    What is exact stays so: images whose values are not all k / 255, such as sharpened ones, stay float32.
    """
    packed = [dict(item) for item in items]
    for key in IMAGES:
        levels = [to_levels(item[key]) for item in items if key in item]
        if len(levels) == len(items) and all(x is not None for x in levels):
            for item, x in zip(packed, levels, strict=True):
                item[key] = x
    return default_collate(packed)


def unpack(batch: dict) -> dict:
    """Makes a packed batch's images, on whatever device, float32 in [0, 1], to the last bit what they were."""
    return {key: to_float(x) if key in IMAGES and x.dtype == torch.uint8 else x for key, x in batch.items()}


def to_float(levels: Tensor) -> Tensor:
    """uint8 k -> float32 k / 255."""
    # By a tensor on the device: a division by a number is one by its inverse there, which rounds otherwise.
    return levels / levels.new_full((), 255, dtype=torch.float32)


def to_levels(image: Tensor) -> Tensor | None:
    """float32 k / 255 -> uint8 k; None if a value is none of these."""
    levels = (image * 255).round_().clamp_(0, 255)
    return levels.to(torch.uint8) if image.dtype == torch.float32 and torch.equal(levels / 255, image) else None
