"""The pixels of a file as numbers with a known black and white."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

FEW = 0.01  # share of samples above white, or not finite, that a picture in [0, 1] may have


class Unsupported(Exception):
    """A sound file of a kind that isn't read right; the message goes on after the file's name."""


@dataclass(frozen=True)
class Raster:
    """The first picture of a file, upright, in the colours of the file."""

    colour: NDArray  # (H, W, 1 grey | 3 RGB | 4 CMYK), uint8 or uint16, or float32 in [0, 1]; of CMYK, 0 is no ink
    alpha: NDArray | None = None  # (H, W) of the same type, 0 is transparent; colours aren't multiplied by it
    icc: bytes | None = None  # the profile of `colour`, which may be broken
    exif: bytes | None = None  # as the file has it
    notes: tuple[str, ...] = ()  # what was assumed or left out


def white(dtype: np.dtype) -> float:
    """The largest value of a type of samples that `Raster` has."""
    return 1.0 if dtype.kind == "f" else float(np.iinfo(dtype).max)


def scaled(x: NDArray, declared: tuple[float, float] | None = None) -> tuple[NDArray, list[str]]:
    """Brings samples of any type into one that has a known white: uint8, uint16, or float32 in [0, 1].

    Args:
        x: samples of any shape. Unsigned integers of 8 and 16 bits stay as they are; floats are taken to be in [0, 1].
        declared: black and white of all other types, as the file declares them.

    Returns:
        The samples, and what was assumed.

    Raises:
        Unsupported: nobody can know which values are black and white.
    """
    if x.dtype in (np.uint8, np.uint16):
        return x.astype(x.dtype.newbyteorder("="), copy=False), []
    bits, floats = 8 * x.dtype.itemsize, x.dtype.kind == "f"
    kind = f"{bits}-bit {'floats' if floats else 'signed integers' if x.dtype.kind == 'i' else 'integers'}"
    notes = []
    if not floats and declared is None:
        high = int(x.max(initial=0))
        if x.dtype.kind == "i" or 0 < high < 2 ** (bits - 8):
            raise Unsupported(
                f"holds {kind} from {x.min(initial=0)} to {high}, and nothing says which are black and white; save it "
                "with 8 or 16 bits"
            )
        declared = 0, 2**bits - 1
        notes.append(f"{kind}: 0 is taken as black and {declared[1]} as white")
    elif declared is not None:
        notes.append(f"{kind}: {declared[0]:g} is read as black and {declared[1]:g} as white, as the file declares")
    low, high = declared or (0, 1)
    if floats:
        finite = np.isfinite(x)
        broken, above = x.size - np.count_nonzero(finite), np.count_nonzero((x > high) & finite)
        if declared is None and above:
            top = x.max(where=finite, initial=0)
            if above > FEW * x.size or not (x[finite] % 1).any():
                raise Unsupported(
                    f"holds {kind} up to {top:g}, and nothing says which is white; divide them by it, or save the "
                    "picture with 8 or 16 bits"
                )
            notes.append(f"{kind}: 1 is taken as white, and {above} samples of up to {top:g} are clipped to it")
        if broken:
            if broken > FEW * x.size:
                raise Unsupported(f"holds {kind} of which {broken} of {x.size} are not finite; write it again")
            notes.append(f"{broken} samples are not finite: NaN is read as black, infinity as white")
            x = np.nan_to_num(x, nan=low, posinf=high, neginf=low)
    if (low, high) != (0, 1):
        x = (x.astype(np.float64) - low) / (high - low)
    return x.clip(0, 1).astype(np.float32), notes
