"""Few steps against fifty: every solver at a small number of steps compared with 50 spaced DDPM steps, pair by pair.

Pairs are made as in benchmarks/quality.py. A difference is given with twice its standard error over the photos, and
beside them is what another seed changes in the reference itself: differences below that are noise.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments
from benchmarks.pairs import synthetic_pairs
from diffbir.utils.cli import entry_point
from diffbir.utils.metrics import LPIPS, psnr


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    arguments.add_photos(p, count=50, size=128)
    arguments.add_preset(p)
    arguments.add_grid(p)
    p.add_argument("--batch", type=int, default=10, help="photos at once (default: %(default)s)")
    p.add_argument("--guidance-scale", type=float, help="(default: the preset's)")
    args = p.parse_args(argv)

    restorer = arguments.restorer(args)
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
