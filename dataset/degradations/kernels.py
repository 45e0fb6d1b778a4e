"""Blur kernels of the degradation models: (size, size) float64 arrays that sum to 1, size odd.

A `Random...` object draws one image's parameters (`draw`, None for no blur) or draws and applies them in one call.
Gaussian families follow Real-ESRGAN (Wang et al. 2021, https://arxiv.org/abs/2107.10833, section 3.1).
"""

import math

import numpy as np
import torch
from numpy.typing import NDArray

KINDS = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")


def mahalanobis(size: int, sigma_x: float, sigma_y: float, theta: float) -> NDArray:
    """x^T S^-1 x on the pixel grid, S having axes sigma_x, sigma_y (pixels) rotated by theta (radians)."""
    axis = np.arange(size) - size // 2
    x, y = np.meshgrid(axis, axis)
    u = (math.cos(theta) * x + math.sin(theta) * y) / sigma_x
    v = (-math.sin(theta) * x + math.cos(theta) * y) / sigma_y
    return u**2 + v**2


def gaussian(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0, beta: float = 1.0) -> NDArray:
    """Generalised Gaussian exp(-m^beta / 2); beta 1 is the Gaussian."""
    k = np.exp(-0.5 * mahalanobis(size, sigma_x, sigma_y, theta) ** beta)
    return k / k.sum()


def shifted_gaussian(size: int, sigma: float, shift: float) -> NDArray:
    """Isotropic Gaussian whose centre lies `shift` pixels further down and right, interpolated linearly there.

    Correlation with it makes pixel p the blurred value at p + shift: with shift (n - 1) / 2, every n-th pixel is one of
    the middle of its block (BSRGAN's published code, `shift_pixel`).
    """
    axis = np.arange(size) - size // 2
    line = np.exp(-0.5 * (axis / sigma) ** 2)
    line = np.interp(axis - shift, axis, line)
    k = np.outer(line, line)
    return k / k.sum()


def plateau(size: int, sigma_x: float, sigma_y: float, theta: float = 0.0, beta: float = 1.0) -> NDArray:
    """Flat-topped kernel 1 / (1 + m^beta)."""
    k = 1 / (1 + mahalanobis(size, sigma_x, sigma_y, theta) ** beta)
    return k / k.sum()


def sinc(size: int, cutoff: float, pad_to: int = 0) -> NDArray:
    """Circular ideal low-pass with ringing (Real-ESRGAN, equation 6).

    Args:
        size: odd side of the filter.
        cutoff: angular frequency in radians per pixel, at most pi.
        pad_to: zero-pads to this odd side if larger than `size`.
    """
    axis = np.arange(size) - size // 2
    r = np.hypot(*np.meshgrid(axis, axis))
    r[size // 2, size // 2] = 1.0  # the limit at r = 0 is set below
    k = cutoff * torch.special.bessel_j1(torch.from_numpy(cutoff * r)).numpy() / (2 * math.pi * r)
    k[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return np.pad(k / k.sum(), max(pad_to - size, 0) // 2)
