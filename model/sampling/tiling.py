"""Overlapping windows over pictures that are too large for a network in one piece.

Windows are computed with more than is used of them, and averaged where they overlap, with weights that rise smoothly
from zero. Where a network sees no further than what is dropped, nothing changes; where it sees further, neighbours
nearly agree and the smooth weights hide the rest.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffbir.model.networks.layers import pad_to_multiple
from diffbir.utils.choices import AUTOMATIC, NEVER
from diffbir.utils.memory import free_bytes

Cut = Callable[[Tensor], Tensor]

BATCH = 4  # windows a call at first; one on the CPU, where several are no faster
STRETCH = 1.5  # windows may be so much larger where that spares some
SMALLEST = 128  # pixels; below it, networks see too little to make sense of a picture
# Activations alive at once in float32, for a pixel of the result: SCUNet 3.1 kB, SwinIR 0.8, RRDBNet 0.8, Stable
# Diffusion's UNet with its branch and two texts 1.4. Half of the free memory is left to what convolutions need besides.
BYTES_PER_PIXEL = 4096


@dataclass(frozen=True)
class Windows:
    """How a picture is cut.

    Args:
        tile: side of a window.
        overlap: what neighbours share at least, less than `tile`.
        margin: rows and columns at a side that are computed but not used, except at the picture's border; less than
            half of `overlap`, or 0.
        multiple: windows start at multiples of it, so that the grids inside a network (attention windows, strides) lie
            as in the whole picture. The picture's size, `tile` and `overlap` are multiples too.
        batch: windows that are computed together.
        most: largest side that may take the place of `tile`, see `fitted`.
    """

    tile: int
    overlap: int
    margin: int = 0
    multiple: int = 1
    batch: int = 1
    most: int = 0

    @classmethod
    def of_side(cls, side: int, multiple: int = 1, batch: int = 1, most: int = 0) -> "Windows":
        """Neighbours share a quarter of a window, and a quarter of that is dropped at either side."""
        overlap = -(-side // multiple // 4) * multiple
        return cls(side, overlap, overlap // 4, multiple, batch, most)

    def fitted(self, height: int, width: int) -> "Windows":
        """For a picture of this size, those of all sides up to `most` with which the least is computed twice.

        Windows of 512 pixels would compute a picture of 640 pixels 2.6 times, and one of 1024 pixels 2.25 times; one
        window of 640, and four of 640, do it once and 1.6 times.
        """
        sides = range(self.tile + self.multiple, self.most + 1, self.multiple)
        return min(
            [self, *(Windows.of_side(side, self.multiple, self.batch) for side in sides)],
            key=lambda windows: windows.computed(height) * windows.computed(width),
        )

    def computed(self, length: int) -> int:
        """Positions along an axis that all windows have together."""
        return len(self.starts(length)) * min(self.tile, length)

    def starts(self, length: int) -> list[int]:
        """Evenly spread starts of the fewest windows that cover `length`."""
        span = length - self.tile
        if span <= 0:
            return [0]
        gaps = -(-span // (self.tile - self.overlap))
        return [span // self.multiple * i // gaps * self.multiple for i in range(gaps)] + [span]

    def weights(self, length: int) -> Tensor:
        """Weight of every position in every window along an axis: (windows, min(tile, length)), float64.

        Those of all windows that cover a position sum to 1, so the weights of both axes can simply be multiplied.
        """
        starts, n = self.starts(length), min(self.tile, length)
        inside = torch.arange(n, dtype=torch.float64) + 0.5 - self.margin
        rise = torch.sin(math.pi / 2 * (inside / max(1, self.overlap - 2 * self.margin)).clamp(0, 1)) ** 2
        weights, total = torch.ones(len(starts), n, dtype=torch.float64), torch.zeros(length, dtype=torch.float64)
        weights[1:] *= rise
        weights[:-1] *= rise.flip(0)
        for start, weight in zip(starts, weights, strict=True):
            total[start : start + n] += weight
        return torch.stack([w / total[start : start + n] for start, w in zip(starts, weights, strict=True)])


def plans(tile: int, device: torch.device, multiple: int = 1, pixels: int = 1) -> list[Windows]:
    """Windows to try, each for when the one before runs out of memory: fewer at once, then smaller ones.

    Args:
        tile: side of a window in pixels of the result, at first up to `STRETCH` times as large; or `NEVER`, the whole
            picture whatever its size; or `AUTOMATIC`, the largest that fits free memory.
        multiple: see `Windows`.
        pixels: pixels of the result along a side of one element of what is cut.
    """
    if tile == NEVER:
        return [Windows(sys.maxsize, 0)]
    units = pixels * multiple

    def windows(side: float, batch: int = 1, stretch: float = 1) -> Windows:  # up, so that a picture of it isn't cut
        least, most = (max(2, math.ceil(n / units)) * multiple for n in (side, stretch * side))
        return Windows.of_side(least, multiple, batch, most)

    if tile == AUTOMATIC:
        tile = max(SMALLEST, math.isqrt(free_bytes(device) // 2 // BYTES_PER_PIXEL))
        found = [windows(tile)]
    elif device.type == "cpu":
        found = [windows(tile, stretch=STRETCH), windows(tile)]
    else:
        found = [windows(tile, BATCH, STRETCH), *(windows(tile, n) for n in (2, 1))]
    while tile > SMALLEST:
        tile = max(SMALLEST, tile // 2)
        found.append(windows(tile))
    return found


def in_windows(function: Callable[[Cut], Tensor], height: int, width: int, windows: Windows) -> Tensor:
    """Computes a picture window by window.

    Args:
        function: is given `cut`, which takes from a tensor of the picture (B, C, h, w), where h / w = height / width,
            what belongs to k windows -> (k B, C, ...), and repeats others (B, ...), such as text, k times. Returns the
            result for these windows, (k B, C', ...), of any one scale.
        height, width: size of the picture, on which the windows lie.

    Returns:
        (B, C', ...), float32 if there is more than one window.
    """
    windows = windows.fitted(height, width)
    tops, lefts = windows.starts(height), windows.starts(width)
    if len(tops) == len(lefts) == 1:
        return function(lambda x: x)
    rows, columns = min(windows.tile, height), min(windows.tile, width)
    places = [(i, j) for i in range(len(tops)) for j in range(len(lefts))]
    weights = windows.weights(height), windows.weights(width)
    result = None
    for first in range(0, len(places), windows.batch):
        group = places[first : first + windows.batch]

        def cut(x: Tensor, group: list[tuple[int, int]] = group) -> Tensor:
            if x.ndim < 4:
                return torch.cat([x] * len(group))
            return torch.cat([x[part(x, tops[i], lefts[j])] for i, j in group])

        def part(x: Tensor, top: int, left: int) -> tuple:
            h, w = x.shape[-2:]  # of the whole picture, in whatever scale
            return (
                ...,
                slice(top * h // height, (top + rows) * h // height),
                slice(left * w // width, (left + columns) * w // width),
            )

        for (i, j), output in zip(group, function(cut).float().chunk(len(group)), strict=True):
            h, w = output.shape[-2:]
            if result is None:
                result = output.new_zeros(*output.shape[:2], height * h // rows, width * w // columns)
            weight = resample(weights[0][i], h).outer(resample(weights[1][j], w)).to(output)
            result[part(result, tops[i], lefts[j])] += weight * output
    return result


def resample(weight: Tensor, n: int) -> Tensor:
    """Weights at another scale: (m,) -> (n,), where n is a multiple of m or the reverse."""
    m = len(weight)
    return weight.repeat_interleave(n // m) if n >= m else weight.unflatten(0, (n, m // n)).mean(dim=1)


def map_in_windows(function: Callable[[Tensor], Tensor], x: Tensor, windows: Windows) -> Tensor:
    """Applies an image-to-image function (B, C, h, w) -> (B, C', s h, s w) to an image of any size."""
    height, width = x.shape[-2:]
    if max(height, width) <= max(windows.tile, windows.most):
        return function(x)
    x = pad_to_multiple(x, windows.multiple)
    y = in_windows(lambda cut: function(cut(x)), *x.shape[-2:], windows)
    return y[..., : height * y.shape[-2] // x.shape[-2], : width * y.shape[-1] // x.shape[-1]]
