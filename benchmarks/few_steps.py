"""Few steps against fifty: every solver at a small number of steps compared with 50 spaced DDPM steps, pair by pair.

Pairs are made as in benchmarks/quality.py. A difference is given with twice its standard error over the photos, and
beside them is what another seed changes in the reference itself: differences below that are noise.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.pairs import synthetic_pairs
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer
from diffbir.model.sampling.solvers import SOLVERS
from diffbir.utils.cli import entry_point
from diffbir.utils.metrics import LPIPS, psnr


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", required=True, help="folder of clean photos")
    p.add_argument("--preset", default="mini", help="as in inference.py (default: %(default)s)")
    p.add_argument("--count", type=int, default=50, help="photos, in order of their names (default: %(default)s)")
    p.add_argument("--size", type=int, default=128, help="side of the crop (default: %(default)s)")
    p.add_argument("--batch", type=int, default=10, help="photos at once (default: %(default)s)")
    p.add_argument("--steps", nargs="+", type=int, default=[8], help="(default: 8)")
    p.add_argument("--solvers", nargs="+", default=list(SOLVERS), choices=list(SOLVERS), help="(default: all)")
    p.add_argument("--guidance-scale", type=float, help="(default: the preset's)")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the preset's YAML")
    args = p.parse_args(argv)

    restorer = Restorer.from_config(load_preset(args.preset, overrides=args.overrides))
    scale = restorer.defaults.guidance_scale if args.guidance_scale is None else args.guidance_scale
    hq, lq = synthetic_pairs(args.input, args.size, args.count)
    lpips = LPIPS()
    runs = [("ddpm", 50, 0), ("ddpm", 50, 1000), *((solver, n, 0) for solver in args.solvers for n in args.steps)]
    progress = tqdm(total=len(runs) * len(hq), unit="photo")

    def scores(solver: str, steps: int, first_seed: int) -> Tensor:
        """(2, photos): PSNR and LPIPS."""
        options, rows = restorer.options(solver=solver, steps=steps, guidance_scale=scale), []
        for some in torch.arange(len(hq)).split(args.batch):
            image = restorer.restore(lq[some], options, [first_seed + int(i) for i in some]).image
            rows.append(torch.stack([psnr(image, hq[some]), lpips(image, hq[some])]))
            progress.update(len(some))
        return torch.cat(rows, dim=1)

    with torch.inference_mode():
        reference, *others = (scores(*run) for run in runs)
    progress.close()
    print(f"\n{len(hq)} photos, {args.size} pixels, guidance scale {scale:g};")
    print(f"RGB PSNR, {LPIPS.variant}; differences to `ddpm` with 50 steps, +- twice the standard error\n")
    print("| solver | steps | PSNR | difference | LPIPS | difference |\n|---|---|---|---|---|---|")
    mean = reference.mean(1)
    print(f"| `ddpm` | 50 | {mean[0]:.2f} | | {mean[1]:.3f} | |")
    for (solver, steps, seed), values in zip(runs[1:], others, strict=True):
        mean, change = values.mean(1), values - reference
        error = 2 * change.std(1) / len(hq) ** 0.5
        name = f"`{solver}`" + (", other seed" if seed else "")
        cells = (
            f"{m:.{n}f} | {c:+.{n}f} ± {e:.{n}f}"
            for m, c, e, n in zip(mean, change.mean(1), error, (2, 3), strict=True)
        )
        print(f"| {name} | {steps} | {' | '.join(cells)} |")


if __name__ == "__main__":
    sys.exit(main())
