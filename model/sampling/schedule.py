"""The noise schedule alpha_bar (T,), float64, and what follows from it at any timestep; numbers only, without torch."""

import numpy as np
from numpy.typing import NDArray


def scaled_linear_alpha_bar(timesteps: int, beta_start: float, beta_end: float) -> NDArray[np.float64]:
    """alpha_bar of betas that are linear in their square root (Stable Diffusion)."""
    betas = np.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=np.float64) ** 2
    return np.cumprod(1 - betas)


def rescale_to_zero_terminal_snr(alpha_bar: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shifts and scales sqrt(alpha_bar) so that the last step is pure noise and the first is kept (Lin et al. 2024,
    https://arxiv.org/abs/2305.08891, algorithm 1)."""
    a = np.sqrt(alpha_bar)
    return ((a - a[-1]) * a[0] / (a[0] - a[-1])) ** 2


ALPHA_BAR_MIN = 1e-8  # stands for zero terminal SNR where sigma or log SNR must be finite


def alpha_bar_at(alpha_bar: NDArray[np.float64], t: float) -> float:
    """alpha_bar at any t >= 0, linear in log sigma between integers; t = -1 is the clean latent, 1."""
    if t < 0:
        return 1.0
    if t == int(t):
        return float(alpha_bar[int(t)])
    return 1 / (1 + float(np.exp(np.interp(t, np.arange(len(alpha_bar)), log_sigmas(alpha_bar)))) ** 2)


def sigma_of(alpha_bar: NDArray[np.float64], t: float) -> float:
    """sigma = sqrt((1 - alpha_bar) / alpha_bar) at t; 0 for the clean latent."""
    a = max(alpha_bar_at(alpha_bar, t), ALPHA_BAR_MIN)
    return float(np.sqrt((1 - a) / a))


def timestep_of(alpha_bar: NDArray[np.float64], sigma: float) -> float:
    """The t between 0 and T - 1 whose sigma this is."""
    return float(np.interp(np.log(sigma), log_sigmas(alpha_bar), np.arange(len(alpha_bar))))


def log_sigmas(alpha_bar: NDArray[np.float64]) -> NDArray[np.float64]:
    a = np.maximum(alpha_bar, ALPHA_BAR_MIN)
    return 0.5 * np.log((1 - a) / a)
