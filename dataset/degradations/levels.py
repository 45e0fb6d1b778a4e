"""The 8-bit grey levels of float32 images.

Everything here and in the degradations works in place on one new array: for images of megabytes, fetching fresh memory
from the system takes several times as long as the arithmetic.
"""

import numpy as np
from numpy.typing import NDArray


def to_levels(image: NDArray) -> NDArray:
    """[0, 1] -> the nearest whole numbers from 0 to 255 (what is outside is clipped), float32."""
    x = np.clip(image, 0, 1)
    x *= 255
    return np.rint(x, out=x)


def round_to_8_bits(image: NDArray) -> NDArray:
    """[0, 1] -> the nearest 8-bit values in [0, 1], float32."""
    x = to_levels(image)
    x /= 255
    return x
