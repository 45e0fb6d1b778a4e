"""Fidelity against realness: guidance scale x steps x solver on synthetic pairs, as a table and a plot.

Raising the scale must bring the result nearer to stage 1 with every solver: `d(I_reg)` is the mean squared distance to
it, times 1000. Pairs are made as in benchmarks/quality.py.
"""

import argparse
import sys
from itertools import product
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments
from benchmarks.pairs import synthetic_pairs
from diffbir.utils.cli import entry_point
from diffbir.utils.metrics import LPIPS, psnr


@entry_point
def main(argv: list[str] | None = None) -> int:
    p = arguments.parser(__doc__)
    arguments.add_photos(p, count=12, size=128)
    arguments.add_preset(p)
    arguments.add_grid(p)
    p.add_argument("--scales", nargs="+", type=float, default=[0, 1e4, 4e4, 2e5], help="(default: 0 1e4 4e4 2e5)")
    p.add_argument("--plot", help="file of the plot")
    args = p.parse_args(argv)

    restorer = arguments.restorer(args)
    hq, lq = synthetic_pairs(args.input, args.size, args.count)
    lpips, seeds, table = LPIPS(), range(len(hq)), {}

    def scores(image: torch.Tensor, i_reg: torch.Tensor) -> np.ndarray:
        d = 1000 * (image - i_reg).square().mean()
        return np.array([d.item(), psnr(image, hq).mean().item(), lpips(image, hq).mean().item()])

    grid = list(product(args.solvers, args.steps, args.scales))
    with torch.inference_mode():
        for solver, steps, scale in tqdm(grid, unit="run"):
            result = restorer.restore(lq, restorer.options(solver=solver, steps=steps, guidance_scale=scale), seeds)
            table[solver, steps, scale] = scores(result.image, result.stage1)
        stage1 = scores(result.stage1, result.stage1)

    print(f"\n{len(hq)} photos, {args.size} pixels; d(I_reg) / PSNR / {LPIPS.variant}; stage 1: ", end="")
    print(f"{stage1[1]:.2f} / {stage1[2]:.3f}\n")
    print("| solver | steps | " + " | ".join(f"s = {s:g}" for s in args.scales) + " | monotonic |")
    print("|---|---|" + "---|" * (len(args.scales) + 1))
    monotonic = True
    for solver, steps in product(args.solvers, args.steps):
        rows = np.stack([table[solver, steps, s] for s in args.scales])
        falls = bool((np.diff(rows[:, 0]) < 0).all())
        monotonic &= falls
        cells = " | ".join(f"{d:.2f} / {q:.2f} / {v:.3f}" for d, q, v in rows)
        print(f"| `{solver}` | {steps} | {cells} | {'yes' if falls else 'NO'} |")
    if args.plot:
        plot(table, stage1, args)
    return 0 if monotonic else 1


def plot(table: dict, stage1: np.ndarray, args: argparse.Namespace) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(10, 5.5), layout="constrained")
    colors = dict(zip(args.solvers, plt.cm.turbo(np.linspace(0.05, 0.95, len(args.solvers))), strict=True))
    styles = dict(zip(args.steps, ["o-", "s--", "^:", "v-."] * len(args.steps), strict=False))
    for solver, steps in product(args.solvers, args.steps):
        rows = np.stack([table[solver, steps, s] for s in args.scales])
        axis.plot(rows[:, 1], rows[:, 2], styles[steps], color=colors[solver], label=f"{solver}, {steps}", markersize=4)
    axis.plot(*stage1[1:], "k*", markersize=12, label="stage 1", linestyle="none")
    worst = stage1[1] - 2, stage1[2] + 0.05  # what is far beyond stage 1 in both isn't a trade
    axis.set_xlim(left=max(axis.get_xlim()[0], worst[0]))
    axis.set_ylim(top=min(axis.get_ylim()[1], worst[1]))
    axis.set(xlabel="PSNR (fidelity; higher is better)", ylabel="LPIPS (realness; lower is better)")
    axis.set_title("along each line the guidance scale rises to the right")
    figure.legend(fontsize=7, title="solver, steps", loc="outside right upper")
    Path(args.plot).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
