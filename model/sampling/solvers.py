"""Solvers: from noise z_T to a clean latent z_0, as functions of a denoiser `(z_t, t) -> z_0`.

Each takes the denoiser, z_T, alpha_bar (T,) in float64, the timesteps to visit (descending, then where to end; -1 is
the clean latent), and `noise`, which returns fresh N(0, I) of z_T's shape and which deterministic solvers ignore.
Timesteps may lie between integers. Coefficients are computed in float64 and meet the latent as Python floats.

`ddpm` and `ddim` work on z_t = a_t z_0 + s_t eps with a = sqrt(alpha_bar), s = sqrt(1 - alpha_bar). The others are
written for x = z_t / a_t = z_0 + sigma eps, sigma = s / a, where a denoiser is a function D(x, sigma) (Karras et al.
2022, https://arxiv.org/abs/2206.00364); `in_sigma` gives them the common form.
To add one, write a function and register it with its spacing in `SOLVERS`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, wraps
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from diffbir.model.sampling.schedule import alpha_bar_at, sigma_of, timestep_of

if TYPE_CHECKING:  # a solver is arithmetic on what it is given; the command line lists them without loading torch
    from torch import Tensor

    from diffbir.model.sampling.denoiser import BoundDenoiser

Noise = Callable[[], "Tensor"]
Callback = Callable[[int, "Tensor"], None]
SigmaDenoiser = Callable[["Tensor", float], "Tensor"]


# Timesteps


def spaced_timesteps(alpha_bar: NDArray, steps: int) -> list[float]:
    """`steps` of 0 .. T - 1 as evenly as rounding allows, both ends included (DDPM respacing), then -1."""
    T = len(alpha_bar)
    if steps == 1:
        return [T - 1, -1]
    return [*np.rint(np.linspace(T - 1, 0, steps)).astype(int).tolist(), -1]


def trailing_timesteps(alpha_bar: NDArray, steps: int) -> list[float]:
    """Evenly from T - 1 towards 0 without reaching it, then -1 (right for zero terminal SNR)."""
    return [*np.linspace(len(alpha_bar) - 1, 0, steps + 1)[:-1].astype(int).tolist(), -1]


def leading_timesteps(alpha_bar: NDArray, steps: int) -> list[float]:
    """Evenly from 1 on, T / steps apart, ending at 0 (the original DDIM spacing, which never sees pure noise).

    The original rounds the distance down, so that a number of steps that doesn't divide T leaves out the noisy end.
    """
    T = len(alpha_bar)
    if steps == T:
        raise ValueError(f"leading spacing leaves out the last timestep; steps must be less than {T}")
    return [*(np.arange(steps) * T // steps + 1).tolist()[::-1], 0]


def karras_timesteps(alpha_bar: NDArray, steps: int, rho: float = 7.0) -> list[float]:
    """Evenly in sigma^(1/rho) from the last sigma to the first, then -1 (Karras et al. 2022, equation 5)."""
    high, low = (sigma_of(alpha_bar, t) ** (1 / rho) for t in (len(alpha_bar) - 1, 0))
    return _timesteps_of(alpha_bar, np.linspace(high, low, steps) ** rho)


def exponential_timesteps(alpha_bar: NDArray, steps: int) -> list[float]:
    """Evenly in log sigma from the last sigma to the first, then -1."""
    high, low = (math.log(sigma_of(alpha_bar, t)) for t in (len(alpha_bar) - 1, 0))
    return _timesteps_of(alpha_bar, np.exp(np.linspace(high, low, steps)))


def _timesteps_of(alpha_bar: NDArray, sigmas: NDArray) -> list[float]:
    # The first is the last step itself: at zero terminal SNR its sigma is infinite and only bounded for the formula.
    return [len(alpha_bar) - 1, *(timestep_of(alpha_bar, sigma) for sigma in sigmas[1:]), -1]


SPACINGS = {
    "uniform": spaced_timesteps,
    "trailing": trailing_timesteps,
    "leading": leading_timesteps,
    "karras": karras_timesteps,
    "exponential": exponential_timesteps,
}


# Solvers in z_t


def posterior(alpha_bar: NDArray, t: float, s: float) -> tuple[float, float, float]:
    """q(z_s | z_t, z_0) = N(c_0 z_0 + c_t z_t, var I) for s < t (DDPM, equations 6-7); s = -1 is the clean latent."""
    a_t, a_s = alpha_bar_at(alpha_bar, t), alpha_bar_at(alpha_bar, s)
    alpha = a_t / a_s
    c_0 = math.sqrt(a_s) * (1 - alpha) / (1 - a_t)
    c_t = math.sqrt(alpha) * (1 - a_s) / (1 - a_t)
    return c_0, c_t, (1 - alpha) * (1 - a_s) / (1 - a_t)


def ddpm(denoise: BoundDenoiser, z: Tensor, alpha_bar: NDArray, timesteps: list, noise: Noise, on_step: Callback):
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
    timesteps: list,
    noise: Noise,
    on_step: Callback,
    eta: float = 0.0,
):
    """DDIM (Song et al. 2021, https://arxiv.org/abs/2010.02502, eq. 12, 16); eta 0 is deterministic, 1 ancestral."""
    for i, (t, s) in enumerate(pairwise(timesteps)):
        a_t, a_s = alpha_bar_at(alpha_bar, t), alpha_bar_at(alpha_bar, s)
        z_0 = denoise(z, t)
        eps = (z - math.sqrt(a_t) * z_0) / math.sqrt(1 - a_t)
        sigma = eta * math.sqrt(posterior(alpha_bar, t, s)[2])
        z = math.sqrt(a_s) * z_0 + math.sqrt(max(1 - a_s - sigma**2, 0.0)) * eps
        if sigma > 0:
            z = z + sigma * noise()
        on_step(i, z_0)
    return z


def one_step(denoise: BoundDenoiser, z: Tensor, alpha_bar: NDArray, timesteps: list, noise: Noise, on_step: Callback):
    """For networks that were trained to restore in one pass: z starts clean, and the estimate is the result.

    With more steps, each estimate is noised anew to the next timestep (Song et al. 2023, Consistency Models,
    https://arxiv.org/abs/2303.01469, algorithm 1).
    """
    for i, (t, s) in enumerate(pairwise(timesteps)):
        z_0 = z = denoise(z, t)
        if s >= 0:
            a_s = alpha_bar_at(alpha_bar, s)
            z = math.sqrt(a_s) * z_0 + math.sqrt(1 - a_s) * noise()
        on_step(i, z_0)
    return z


# Solvers in x


def in_sigma(solver: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Gives `solver(D, x, sigmas, noise, on_step, **options)` the form that all solvers share."""

    @wraps(solver)
    def run(
        denoise: BoundDenoiser,
        z: Tensor,
        alpha_bar: NDArray,
        timesteps: list,
        noise: Noise,
        on_step: Callback,
        **options: float,
    ) -> Tensor:
        sigmas = [sigma_of(alpha_bar, t) for t in timesteps]
        known = dict(zip(sigmas, timesteps, strict=True))

        def D(x: Tensor, sigma: float) -> Tensor:
            t = known[sigma] if sigma in known else timestep_of(alpha_bar, sigma)
            return denoise(x / math.hypot(1, sigma), t)

        x = solver(D, z * math.hypot(1, sigmas[0]), sigmas, noise, on_step, **options)
        return x / math.hypot(1, sigmas[-1])

    return run


def ancestral(sigma: float, sigma_next: float, eta: float) -> tuple[float, float]:
    """Splits a step to `sigma_next` into a deterministic one to `down` and fresh noise of deviation `up`."""
    up = min(sigma_next, eta * sigma_next * math.sqrt(max(1 - (sigma_next / sigma) ** 2, 0.0)))
    return math.sqrt(sigma_next**2 - up**2), up


@in_sigma
def euler(D: SigmaDenoiser, x: Tensor, sigmas: list[float], noise: Noise, on_step: Callback):
    """Euler's method on dx/dsigma = (x - D) / sigma; the same steps as DDIM with eta 0."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_0 = D(x, sigma)
        x = x_0 + (sigma_next / sigma) * (x - x_0)
        on_step(i, x_0)
    return x


@in_sigma
def euler_ancestral(
    D: SigmaDenoiser, x: Tensor, sigmas: list[float], noise: Noise, on_step: Callback, eta: float = 1.0
):
    """Euler steps with fresh noise in place of what they overshoot."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, sigma_next, eta)
        x_0 = D(x, sigma)
        x = x_0 + (down / sigma) * (x - x_0)
        if up > 0:
            x = x + up * noise()
        on_step(i, x_0)
    return x


@in_sigma
def heun(D: SigmaDenoiser, x: Tensor, sigmas: list[float], noise: Noise, on_step: Callback):
    """Heun's method, second order (Karras et al. 2022, algorithm 1); two evaluations a step, one in the last."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_0 = D(x, sigma)
        x_next = x_0 + (sigma_next / sigma) * (x - x_0)
        if sigma_next > 0:
            # The mean of both slopes, written so that x - x_next, thousands at zero terminal SNR, doesn't cancel.
            x_next = x_next + (sigma_next - sigma) / (2 * sigma_next) * (x_0 - D(x_next, sigma_next))
        x = x_next
        on_step(i, x_0)
    return x


@in_sigma
def dpmpp_2s_ancestral(
    D: SigmaDenoiser, x: Tensor, sigmas: list[float], noise: Noise, on_step: Callback, eta: float = 1.0
):
    """DPM-Solver++(2S) (Lu et al. 2022, https://arxiv.org/abs/2211.01095, algorithm 1) with ancestral noise."""
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        down, up = ancestral(sigma, sigma_next, eta)
        x_0 = D(x, sigma)
        if down == 0:
            x = x_0
        else:
            h = math.log(sigma / down)
            middle = math.exp(-h / 2) * x - math.expm1(-h / 2) * x_0
            x = math.exp(-h) * x - math.expm1(-h) * D(middle, sigma * math.exp(-h / 2))
        if up > 0:
            x = x + up * noise()
        on_step(i, x_0)
    return x


@in_sigma
def dpmpp_2m(D: SigmaDenoiser, x: Tensor, sigmas: list[float], noise: Noise, on_step: Callback):
    """DPM-Solver++(2M) (Lu et al. 2022, algorithm 2), in lambda = -log sigma."""
    previous, h_previous = None, None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_0 = D(x, sigma)
        if sigma_next == 0:
            x = x_0
        else:
            h = math.log(sigma / sigma_next)
            extrapolated = x_0 if previous is None else x_0 + (x_0 - previous) * h / (2 * h_previous)
            x = math.exp(-h) * x - math.expm1(-h) * extrapolated
            previous, h_previous = x_0, h
        on_step(i, x_0)
    return x


@in_sigma
def dpmpp_2m_sde(D: SigmaDenoiser, x: Tensor, sigmas: list[float], noise: Noise, on_step: Callback, eta: float = 1.0):
    """DPM-Solver++(2M) for the SDE (Lu et al. 2022, equation 18), midpoint form; eta 0 is 2M."""
    previous, h_previous = None, None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_0 = D(x, sigma)
        if sigma_next == 0:
            x = x_0
        else:
            h = math.log(sigma / sigma_next)
            gain = -math.expm1(-h * (1 + eta))
            extrapolated = x_0 if previous is None else x_0 + (x_0 - previous) * h / (2 * h_previous)
            x = math.exp(-h * (1 + eta)) * x + gain * extrapolated
            if eta > 0:
                x = x + sigma_next * math.sqrt(-math.expm1(-2 * h * eta)) * noise()
            previous, h_previous = x_0, h
        on_step(i, x_0)
    return x


@in_sigma
def dpmpp_3m_sde(D: SigmaDenoiser, x: Tensor, sigmas: list[float], noise: Noise, on_step: Callback, eta: float = 1.0):
    """DPM-Solver++(3M) SDE: exact integration of the quadratic through the last three estimates in lambda."""
    estimates: list[tuple[Tensor, float]] = []  # earlier (x_0, step that followed it), newest first
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_0 = D(x, sigma)
        if sigma_next == 0:
            x = x_0
        else:
            h = math.log(sigma / sigma_next)
            H = h * (1 + eta)
            x = math.exp(-H) * x - math.expm1(-H) * x_0
            phi_2 = math.expm1(-H) / H + 1
            if len(estimates) == 2:
                (x_1, h_1), (x_2, h_2) = estimates
                r_1, r_2 = h_1 / h, h_2 / h
                slope_1, slope_2 = (x_0 - x_1) / r_1, (x_1 - x_2) / r_2
                curvature = (slope_1 - slope_2) / (r_1 + r_2)
                x = x + phi_2 * (slope_1 + r_1 * curvature) - (phi_2 / H - 0.5) * curvature
            elif estimates:
                x_1, h_1 = estimates[0]
                x = x + phi_2 * (x_0 - x_1) * h / h_1
            if eta > 0:
                x = x + sigma_next * math.sqrt(-math.expm1(-2 * h * eta)) * noise()
            estimates = [(x_0, h), *estimates[:1]]
        on_step(i, x_0)
    return x


@in_sigma
def unipc(D: SigmaDenoiser, x: Tensor, sigmas: list[float], noise: Noise, on_step: Callback, order: int = 2):
    """UniPC (Zhao et al. 2023, https://arxiv.org/abs/2302.04867, algorithms 1-2; B(h) = e^h - 1, data prediction).

    The corrector reuses the evaluation that the next step needs anyway.
    """
    steps = len(sigmas) - 1
    history: list[tuple[Tensor, float]] = []  # (estimate, sigma), newest first
    origin = None  # what x was predicted from
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x_0 = D(x, sigma)
        if origin is not None:
            x = unipc_step(*origin, sigma, newest=x_0)
        on_step(i, x_0)
        if sigma_next == 0:
            return x_0
        history = [(x_0, sigma), *history[: order - 1]]
        reach = min(order, len(history), steps - i)  # lower at both ends of the chain
        origin = history[:reach], x
        x = unipc_step(*origin, sigma_next)
    return x


def unipc_step(
    history: list[tuple[Tensor, float]], x: Tensor, sigma_next: float, newest: Tensor | None = None
) -> Tensor:
    """One step from the newest entry of `history`; with the estimate at its end, `newest`, the corrected step."""
    x_0, sigma = history[0]
    h = math.log(sigma / sigma_next)
    nodes = [math.log(sigma / s) / h for _, s in history[1:]]
    differences = [(d - x_0) / r for (d, _), r in zip(history[1:], nodes, strict=True)]
    if newest is not None:
        nodes, differences = [*nodes, 1.0], [*differences, newest - x_0]
    x = math.exp(-h) * x - math.expm1(-h) * x_0
    for rho, difference in zip(unipc_weights(nodes, h), differences, strict=True):
        x = x - math.expm1(-h) * rho * difference
    return x


def unipc_weights(nodes: list[float], h: float) -> list[float]:
    """rho of equation 10: sum_j rho_j r_j^(k-1) = k-th moment, for k = 1 .. number of nodes."""
    if len(nodes) == 1:
        return [0.5]  # second order whatever B(h); the paper's choice
    moments, phi = [], math.expm1(-h) / -h - 1
    for k in range(1, len(nodes) + 1):
        moments.append(phi * math.factorial(k) / math.expm1(-h))
        phi = phi / -h - 1 / math.factorial(k + 1)
    return np.linalg.solve(np.vander(nodes, increasing=True).T, moments).tolist()


@dataclass(frozen=True)
class Solver:
    """A solver.

    Args:
        spacing: what suits it, key of `SPACINGS`.
        eta: its own share of fresh noise; None: it has none to choose.
        start: what it begins with: 'noise' (which it may also find on a latent), or the 'clean' latent of stage 1.
    """

    run: Callable[..., Tensor]
    spacing: str = "trailing"
    eta: float | None = None
    start: str = "noise"


SOLVERS = {
    "ddpm": Solver(ddpm, "uniform"),
    "ddim": Solver(ddim, eta=0.0),
    "euler": Solver(euler),
    "euler_ancestral": Solver(euler_ancestral, eta=1.0),
    "heun": Solver(heun),
    "dpmpp_2s_ancestral": Solver(dpmpp_2s_ancestral, eta=1.0),
    "dpmpp_2m": Solver(dpmpp_2m),
    "dpmpp_2m_sde": Solver(dpmpp_2m_sde, eta=1.0),
    "dpmpp_3m_sde": Solver(dpmpp_3m_sde, eta=1.0),
    "unipc": Solver(unipc),
    "unipc_3": Solver(partial(unipc, order=3)),
    "one_step": Solver(one_step, start="clean"),
}
CHAINS = [name for name, solver in SOLVERS.items() if solver.start == "noise"]


def timesteps_for(solver: str, alpha_bar: NDArray, steps: int, spacing: str | None = None) -> list[float]:
    """The timesteps that a solver visits, and where it ends; see `sample`."""
    if not 1 <= steps <= len(alpha_bar):
        raise ValueError(f"steps must lie in 1 .. {len(alpha_bar)}, not {steps}")
    spacing = spacing or SOLVERS[solver].spacing
    if spacing not in SPACINGS:
        raise ValueError(f"unknown spacing '{spacing}'; there are {', '.join(SPACINGS)}")
    return SPACINGS[spacing](alpha_bar, steps)


def sample(
    solver: str,
    denoise: BoundDenoiser,
    z_T: Tensor,
    alpha_bar: NDArray,
    steps: int,
    noise: Noise,
    on_step: Callback = lambda i, z_0: None,
    spacing: str | None = None,
    eta: float | None = None,
) -> Tensor:
    """Runs a registered solver for `steps` steps.

    Args:
        solver: key of `SOLVERS`.
        denoise: `(z_t, t) -> z_0`.
        z_T: start, (B, C, h, w).
        alpha_bar: (T,), float64.
        steps: 1 .. T.
        noise: returns fresh noise like z_T.
        on_step: called with the step's index and its estimate of z_0.
        spacing: key of `SPACINGS`; the solver's own if None.
        eta: share of fresh noise in a stochastic solver, 0 none; the solver's own if None.

    Raises:
        ValueError: an unknown solver or spacing, steps out of range, or eta for a solver that has none.
    """
    if solver not in SOLVERS:
        raise ValueError(f"unknown solver '{solver}'; there are {', '.join(SOLVERS)}")
    chosen = SOLVERS[solver]
    if eta is not None and chosen.eta is None:
        raise ValueError(f"solver '{solver}' has no eta: it adds no noise, or all of it")
    timesteps = timesteps_for(solver, alpha_bar, steps, spacing)
    options = {} if eta is None else {"eta": eta}
    return chosen.run(denoise, z_T, alpha_bar, timesteps, noise, on_step, **options)
