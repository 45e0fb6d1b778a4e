"""Solvers: from noise z_T to a clean latent z_0, as functions of a denoiser `(z_t, t) -> z_0`.

Each takes the denoiser, z_T, alpha_bar (T,) in float64, the timesteps to visit (descending, then where to end; -1 is
the clean latent), and `noise`, which returns fresh N(0, I) of z_T's shape and which deterministic solvers ignore.
Coefficients are computed in float64 and meet the latent as Python floats. With a = sqrt(alpha_bar) and
s = sqrt(1 - alpha_bar), z_t = a_t z_0 + s_t eps.
To add one, write a function and register it with its timesteps in `SOLVERS`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from model.denoiser import BoundDenoiser

Noise = Callable[[], Tensor]
Callback = Callable[[int, Tensor], None]


def spaced_timesteps(T: int, steps: int) -> list[int]:
    """`steps` of 0 .. T - 1 as evenly as rounding allows, both ends included (DDPM respacing), then -1."""
    if steps == 1:
        return [T - 1, -1]
    return [*np.rint(np.linspace(T - 1, 0, steps)).astype(int).tolist(), -1]


def trailing_timesteps(T: int, steps: int) -> list[int]:
    """Evenly from T - 1 towards 0 without reaching it, then -1 (EDM-style solvers; right for zero terminal SNR)."""
    return [*np.linspace(T - 1, 0, steps + 1)[:-1].astype(int).tolist(), -1]


def leading_timesteps(T: int, steps: int) -> list[int]:
    """Every T // steps-th step from 1 on, ending at 0 (the original DDIM spacing, which never sees pure noise)."""
    return [*(np.arange(0, T, T // steps)[:steps] + 1).tolist()[::-1], 0]


def posterior(alpha_bar: NDArray, t: int, s: int) -> tuple[float, float, float]:
    """q(z_s | z_t, z_0) = N(c_0 z_0 + c_t z_t, var I) for s < t (DDPM, equations 6-7); s = -1 is the clean latent."""
    a_t, a_s = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
    alpha = a_t / a_s
    c_0 = math.sqrt(a_s) * (1 - alpha) / (1 - a_t)
    c_t = math.sqrt(alpha) * (1 - a_s) / (1 - a_t)
    return c_0, c_t, (1 - alpha) * (1 - a_s) / (1 - a_t)


def ddpm(denoise: BoundDenoiser, z: Tensor, alpha_bar: NDArray, timesteps: list[int], noise: Noise, on_step: Callback):
    """Ancestral sampling on the shortened chain (Ho et al. 2020, algorithm 2; Nichol and Dhariwal 2021)."""
    for i, (t, s) in enumerate(pairwise(timesteps)):
        c_0, c_t, var = posterior(alpha_bar, t, s)
        z_0 = denoise(z, t)
        z = c_0 * z_0 + c_t * z + math.sqrt(var) * noise()
        on_step(i, z_0)
    return z


def ddim(
    denoise: BoundDenoiser,
    z: Tensor,
    alpha_bar: NDArray,
    timesteps: list[int],
    noise: Noise,
    on_step: Callback,
    eta: float = 0.0,
):
    """DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12, 16); eta 0 is deterministic, 1 ancestral."""
    for i, (t, s) in enumerate(pairwise(timesteps)):
        a_t, a_s = alpha_bar[t], alpha_bar[s] if s >= 0 else 1.0
        z_0 = denoise(z, t)
        eps = (z - math.sqrt(a_t) * z_0) / math.sqrt(1 - a_t)
        sigma = eta * math.sqrt(posterior(alpha_bar, t, s)[2])
        z = math.sqrt(a_s) * z_0 + math.sqrt(max(1 - a_s - sigma**2, 0.0)) * eps
        if sigma > 0:
            z = z + sigma * noise()
        on_step(i, z_0)
    return z


def dpmpp_2m(
    denoise: BoundDenoiser, z: Tensor, alpha_bar: NDArray, timesteps: list[int], noise: Noise, on_step: Callback
):
    """DPM-Solver++(2M) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 2), in lambda = log(a / s).

    At zero terminal SNR lambda is infinite; alpha_bar is clipped to 1e-8 there.
    """
    previous, h_previous = None, None
    for i, (t, s) in enumerate(pairwise(timesteps)):
        z_0 = denoise(z, t)
        if s < 0:
            z = z_0
        else:
            a_t, a_s = max(alpha_bar[t], 1e-8), alpha_bar[s]
            h = 0.5 * (math.log(a_s / (1 - a_s)) - math.log(a_t / (1 - a_t)))  # lambda_s - lambda_t
            D = z_0
            if previous is not None:
                r = h_previous / h
                D = z_0 + (z_0 - previous) / (2 * r)
            z = math.sqrt((1 - a_s) / (1 - a_t)) * z - math.sqrt(a_s) * math.expm1(-h) * D
            previous, h_previous = z_0, h
        on_step(i, z_0)
    return z


@dataclass(frozen=True)
class Solver:
    """A solver and the timesteps it is run on: `(T, steps) -> timesteps`."""

    run: Callable[..., Tensor]
    timesteps: Callable[[int, int], list[int]]


SOLVERS = {
    "ddpm": Solver(ddpm, spaced_timesteps),
    "ddim": Solver(ddim, trailing_timesteps),
    "dpmpp_2m": Solver(dpmpp_2m, trailing_timesteps),
}


def sample(
    solver: str,
    denoise: BoundDenoiser,
    z_T: Tensor,
    alpha_bar: NDArray,
    steps: int,
    noise: Noise,
    on_step: Callback = lambda i, z_0: None,
) -> Tensor:
    """Runs a registered solver for `steps` steps.

    Args:
        solver: key of `SOLVERS`.
        denoise: `(z_t, t) -> z_0`.
        z_T: start, (B, C, h, w).
        alpha_bar: (T,), float64.
        steps: evaluations of the denoiser, 1 .. T.
        noise: returns fresh noise like z_T.
        on_step: called with the step's index and its estimate of z_0.

    Raises:
        ValueError: an unknown solver, or steps out of range.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver '{solver}'; there are {', '.join(SOLVERS)}")
    if not 1 <= steps <= len(alpha_bar):
        raise ValueError(f"steps must lie in 1 .. {len(alpha_bar)}, not {steps}")
    chosen = SOLVERS[solver]
    return chosen.run(denoise, z_T, alpha_bar, chosen.timesteps(len(alpha_bar), steps), noise, on_step)
