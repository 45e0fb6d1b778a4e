"""How fast each solver converges to the true marginal, as its steps double: a plot and a table for docs/sampling.md.

Data is N(mean, variance), for which the perfect denoiser is known and affine. So is then every solver: mean and
variance of its result are computed exactly, from its responses to the start and to each injected noise, and not from
samples. Measured between two inner timesteps, where the schedule's steep ends don't hide the order.
"""

import math
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.schedule import alpha_bar_at
from diffbir.model.sampling.solvers import CHAINS, SOLVERS
from diffbir.utils.cli import entry_point

MEAN, VARIANCE = 0.7, 0.25
FIRST, LAST = 640, 320  # timesteps
STEPS = (10, 20, 40, 80, 160)


def moments(solver: str, alpha_bar: NDArray, steps: int) -> tuple[float, float]:
    """Mean and standard deviation at t = LAST of a solver that starts from the true marginal at t = FIRST."""
    timesteps = [FIRST + (LAST - FIRST) * i / steps for i in range(steps + 1)]

    def denoise(z: torch.Tensor, t: float) -> torch.Tensor:
        a2 = alpha_bar_at(alpha_bar, t)
        gain = math.sqrt(a2) * VARIANCE / (a2 * VARIANCE + 1 - a2)
        return MEAN + gain * (z - math.sqrt(a2) * MEAN)

    mean, std = marginal(alpha_bar, FIRST)
    # Entry 0 is the mean; entry 1 starts one deviation away; entry 2 + i is pushed by the i-th noise alone.
    z = torch.full((2 + steps,), mean, dtype=torch.float64)
    z[1] += std
    drawn = iter(range(2, 2 + steps))

    def noise() -> torch.Tensor:
        e = torch.zeros_like(z)
        e[next(drawn)] = 1
        return e

    end = SOLVERS[solver].run(denoise, z, alpha_bar, timesteps, noise, lambda i, z_0: None)
    return end[0].item(), (end[1:] - end[0]).square().sum().sqrt().item()


def marginal(alpha_bar: NDArray, t: float) -> tuple[float, float]:
    """True mean and standard deviation of z_t."""
    a2 = alpha_bar_at(alpha_bar, t)
    return math.sqrt(a2) * MEAN, math.sqrt(a2 * VARIANCE + 1 - a2)


def errors(solver: str) -> list[tuple[float, float]]:
    """Absolute error of mean and deviation for each of `STEPS`."""
    alpha_bar = Diffusion().alpha_bar
    mean, std = marginal(alpha_bar, LAST)
    results = (moments(solver, alpha_bar, n) for n in STEPS)
    return [(abs(m - mean), abs(s - std)) for m, s in results]


def order(values: tuple[float, ...]) -> float:
    """Last exponent p in error ~ steps^-p."""
    coarse, fine = list(pairwise(values))[-1]
    return math.log2(coarse / fine)


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    p.add_argument("--plot", default="docs/convergence.png", help="(default: %(default)s)")
    args = p.parse_args(argv)
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    print("| solver | " + " | ".join(f"{n} steps" for n in STEPS) + " | order | mean, at most |")
    print("|---|" + "---|" * (len(STEPS) + 2))
    styles = [(c, m) for m in ("o-", "s--") for c in plt.cm.tab10(np.arange(6))]
    for solver, (color, style) in zip(CHAINS, styles, strict=False):
        means, deviations = zip(*errors(solver), strict=True)
        axis.loglog(STEPS, deviations, style, color=color, label=solver, markersize=4, linewidth=1)
        cells = " | ".join(f"{d:.1e}" for d in deviations)
        print(f"| `{solver}` | {cells} | {order(deviations):.2f} | {max(means):.0e} |")
    axis.set(ylabel="error of the standard deviation", xlabel="steps", xticks=STEPS, xticklabels=STEPS)
    axis.legend(fontsize=8, loc="lower left")
    Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
