"""Quality on synthetic pairs: PSNR, SSIM, LPIPS and DISTS of the degraded input, of stage 1 and of the full result.

Every photo is cropped to its centre, degraded with a fixed seed (second-order model, final scale 4, bicubic back to
size), restored and compared with the crop. Rows with a guidance scale above 0 show how latent guidance trades realism
for fidelity; `d(I_reg)` is the mean squared distance to stage 1's output, times 1000. DISTS needs VGG16, which
`scripts/convert_weights.py --vgg16` makes; without it the column is left out.
"""

import sys
import time
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments, machine
from benchmarks.pairs import DEGRADATION, synthetic_pairs
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.image import side_by_side, to_uint8, write_png
from diffbir.utils.metrics import DISTS, LPIPS, psnr, ssim


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    arguments.add_photos(p, count=50, size=256)
    arguments.add_preset(p)
    p.add_argument("--degradation", default=DEGRADATION, help="its YAML (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of degradation and sampling (default: %(default)s)")
    p.add_argument("--steps", type=int, help="sampling steps (default: the preset's)")
    p.add_argument("--solver", help="(default: the preset's)")
    p.add_argument(
        "--guidance-scales", type=float, nargs="*", default=[0], help="one row each (default: 0)", metavar="S"
    )
    p.add_argument("--save", help="folder for pictures: input, stage 1, results, clean")
    p.add_argument("--sheet", help="one JPEG with the middle of each of these pictures at 100 %%")
    args = p.parse_args(argv)

    restorer = arguments.restorer(args)
    pairs = list(zip(*synthetic_pairs(args.input, args.size, args.count, args.degradation, args.seed), strict=True))
    changes = {k: v for k, v in (("steps", args.steps), ("solver", args.solver)) if v is not None}
    scales = {scale: restorer.options(guidance_scale=scale, **changes) for scale in args.guidance_scales}
    perceptual, rows, sheet = perceptual_metrics(), {}, []

    def record(name: str, image: Tensor, i_reg: Tensor, hq: Tensor, seconds: float) -> None:
        distance = 1000 * (image - i_reg).square().mean()
        scores = [metric(image, hq)[0] for metric in (psnr, ssim, *perceptual)]
        rows.setdefault(name, []).append(torch.stack([*scores, distance, torch.tensor(seconds)]))

    with torch.inference_mode():
        for i in tqdm(range(len(pairs)), unit="photo"):
            hq, lq = (x[None] for x in pairs[i])
            start = time.perf_counter()
            i_reg = restorer.restore(lq, restorer.options(stage="1")).image
            record("degraded (bicubic)", lq, i_reg, hq, 0.0)
            record("stage 1", i_reg, i_reg, hq, time.perf_counter() - start)
            pictures = {"input": lq, "stage 1": i_reg}
            for scale, options in scales.items():
                start = time.perf_counter()
                image = restorer.restore(lq, options, seeds=[args.seed + i]).image
                record(f"full, s = {scale:g}", image, i_reg, hq, time.perf_counter() - start)
                pictures[f"s = {scale:g}"] = image
            pictures = {title: to_uint8(x[0]) for title, x in {**pictures, "clean": hq}.items()}
            if args.save:
                write_png(Path(args.save) / f"{i:03d}.png", side_by_side(pictures))
            sheet.append(side_by_side({title: middle(x) for title, x in pictures.items()}))
    if args.sheet:
        Image.fromarray(np.concatenate(sheet)).save(args.sheet, quality=90)

    options = next(iter(scales.values()), restorer.defaults)
    print(f"\n{len(pairs)} photos, {args.size} pixels, {options.solver}, {options.steps} steps, seed {args.seed};")
    print(f"RGB PSNR and SSIM without border crop, {'; '.join(metric.variant for metric in perceptual)};")
    print(f"{machine.versions('torch')}, {machine.threads()}, float32; seconds are the median per photo.\n")
    columns = ["PSNR", "SSIM", *(type(metric).__name__ for metric in perceptual), "d(I_reg)", "seconds"]
    print(f"| | {' | '.join(columns)} |\n|{'---|' * (len(columns) + 1)}")
    for name, values in rows.items():
        table = torch.stack(values)
        mean, seconds = table.mean(0).tolist(), table[:, -1].median().item()
        between = " | ".join(f"{value:.3f}" for value in mean[1:-2])
        print(f"| {name} | {mean[0]:.2f} | {between} | {mean[-2]:.2f} | {seconds:.2f} |")


def middle(picture: NDArray[np.uint8], side: int = 256) -> NDArray[np.uint8]:
    """The part of a picture (H, W, 3) around its centre."""
    top, left = (max(0, n - side) // 2 for n in picture.shape[:2])
    return picture[top : top + side, left : left + side]


def perceptual_metrics() -> list[LPIPS | DISTS]:
    """LPIPS, and DISTS where VGG16's weights are here; a sentence says so if not."""
    try:
        return [LPIPS(), DISTS()]
    except UserError as error:
        print(f"DISTS is left out: {error}", file=sys.stderr)
        return [LPIPS()]


if __name__ == "__main__":
    sys.exit(main())
