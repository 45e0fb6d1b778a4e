"""The ablations of the paper in one command: trains each, restores held-out photos with it, and compares.

Every YAML of --configs is one: a training is run unless it is done (and goes on where it was stopped), a preset only
restores, and a `sweep` in it gives one row for each value. Pairs are made as in benchmarks/quality.py, and all rows get
the same noise. Colours are not aligned to stage 1, because how far they drift is one of the questions: `colour` is the
distance between the mean colours of result and clean photo, times 255.

The table goes to the terminal and to <save>/ablation.md, pictures side by side to <save>/<photo>_ablation.png, those of
a sweep to <save>/<photo>_<name>.png.
"""

import logging
import shutil
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments, machine
from benchmarks.pairs import synthetic_pairs
from diffbir.model.build import weight_files
from diffbir.model.options import Options
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer, Result
from diffbir.model.training.run import train
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import ROOT, load_config, project_path, read_config
from diffbir.utils.image import side_by_side, to_uint8, write_png
from diffbir.utils.metrics import LPIPS, psnr, ssim

log = logging.getLogger(__name__)

# In this order: what others start from comes before them.
NAMES = (
    *("prior", "no_restoration", "no_finetuning", "image_controlnet", "latent_branch", "unfrozen_decoder"),
    "guidance_sweep",
)
MEASURES = ("PSNR", "SSIM", "LPIPS", "d(I_reg)", "colour")


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    arguments.add_photos(p, 16, 128, help="folder of clean photos that are restored; none of --photos")
    p.add_argument("--photos", required=True, help="folder of clean photos for training")
    p.add_argument(
        "--configs",
        type=Path,
        default=ROOT / "configs/ablation/mini",
        help="folder of YAML files; configs/ablation is full size (default: configs/ablation/mini)",
    )
    p.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="(default: all)", metavar="NAME")
    p.add_argument("--steps", type=int, help="of each training (default: the YAML's)")
    p.add_argument("--fresh", action="store_true", help="trains anew what was trained with other settings or weights")
    p.add_argument("--batch", type=int, default=8, help="photos restored at once (default: %(default)s)")
    p.add_argument("--degradation", default="configs/dataset/mini.yaml", help="its YAML (default: %(default)s)")
    p.add_argument("--solver", default="ddim", help="(default: %(default)s)")
    p.add_argument("--sampling-steps", type=int, default=10, help="(default: %(default)s)")
    p.add_argument("--save", type=Path, default=Path("outputs/ablation"), help="folder (default: %(default)s)")
    p.add_argument("--pictures", type=int, default=4, help="photos to show (default: %(default)s)")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the YAML of every training")
    args = p.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)

    files = {name: args.configs / f"{name}.yaml" for name in NAMES if name in args.only}
    files = {name: file for name, file in files.items() if file.is_file()}
    if not files:
        raise UserError(f"{args.configs} has none of {', '.join(args.only)}")
    overrides = [f"photos={args.photos}", f"val_photos={args.input}", *args.overrides]
    overrides += [f"trainer.params.max_steps={args.steps}"] if args.steps else []
    for name, file in files.items():
        if "module" in read_config(file):
            ensure_trained(name, load_config(file, [*overrides, "resume=auto"]), args.fresh)
    files.pop("prior", None)

    hq, lq = synthetic_pairs(args.input, args.size, args.count, degradation=args.degradation)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lpips, strips = LPIPS(), {}
    rows = {"input": scores(Result(lq, lq, lq), hq, lpips), "stage 1": None}
    for name, file in tqdm(files.items(), unit="ablation", desc="restoring"):
        config = load_preset(str(file))
        restorer = Restorer.from_config(config, device)
        common = restorer.options(solver=args.solver, steps=args.sampling_steps, color="none")
        for title, options in variants(name, config, common).items():
            result = restore(restorer, lq, options, args.batch)
            rows[title] = scores(result, hq, lpips)
            strip = strips.setdefault(name if config.get("sweep") else "ablation", {"input": lq})
            if not torch.equal(result.stage1, lq):  # without the restoration module there is none to show
                strip.setdefault("stage 1", result.stage1)
                rows["stage 1"] = rows["stage 1"] or scores(replace(result, image=result.stage1), hq, lpips)
            strip[title] = result.image

    cells = "| {} | {:.2f} | {:.3f} | {:.3f} | {:.2f} | {:.1f} |"
    text = [
        f"{len(hq)} photos, {args.size} pixels, {args.solver}, {args.sampling_steps} steps, seed 0; RGB PSNR and SSIM",
        f"without border crop, {LPIPS.variant}; {machine.versions('torch')} on {device}, float32.\n",
        f"| | {' | '.join(MEASURES)} |",
        "|---" * (len(MEASURES) + 1) + "|",
        *(cells.format(title, *row) for title, row in rows.items() if row),
    ]
    print("\n" + "\n".join(text))
    args.save.mkdir(parents=True, exist_ok=True)
    (args.save / "ablation.md").write_text("\n".join(text) + "\n")
    zoom = max(1, 256 // args.size)  # titles need room
    for (name, strip), i in product(strips.items(), range(min(args.pictures, len(hq)))):
        photos = {title: images[i : i + 1] for title, images in {**strip, "clean": hq}.items()}
        enlarged = {title: to_uint8(F.interpolate(x, scale_factor=zoom)[0]) for title, x in photos.items()}
        write_png(args.save / f"{i:03d}_{name}.png", side_by_side(enlarged))


def ensure_trained(name: str, config: DictConfig, fresh: bool) -> None:
    """Runs a training that isn't done.

    Raises:
        UserError: its run folder holds one with other settings, or older than the weights it starts from, and not
            `fresh`.
    """
    run_dir = Path(config.run_dir)
    checkpoints = sorted((run_dir / "checkpoints").glob("*.ckpt"))
    if checkpoints:
        made = min(path.stat().st_mtime for path in checkpoints)
        starts = [project_path(path) for path in weight_files(config).values()]
        newer = [path for path in starts if path.exists() and path.stat().st_mtime > made]
        if newer or OmegaConf.load(run_dir / "config.yaml") != config:
            if not fresh:
                why = f"before {newer[0]} was made" if newer else "with other settings"
                raise UserError(f"{run_dir} was trained {why}; --fresh trains it anew, and deletes it first")
            shutil.rmtree(run_dir)
        elif checkpoints[-1].stem == f"{config.trainer.params.max_steps:07d}":
            log.info("%s: done before", name)
            return
    log.info("%s: training", name)
    train(config)


def variants(name: str, config: DictConfig, options: Options) -> dict[str, Options]:
    """Row -> options: one for each value of the `sweep`, or a single one."""
    if not config.get("sweep"):
        return {name.replace("_", " "): options}
    values = [(key, value) for key, values in config.sweep.items() for value in values]
    return {f"{key} = {value:g}".replace("_", " "): replace(options, **{key: value}) for key, value in values}


def restore(restorer: Restorer, lq: Tensor, options: Options, batch: int) -> Result:
    """(N, 3, H, W) in batches; photo i gets the noise of seed i."""
    numbers = torch.arange(len(lq)).split(batch)
    parts = [restorer.restore(lq[some], options, some.tolist()) for some in numbers]
    return Result(*(torch.cat([getattr(part, k) for part in parts]) for k in ("image", "stage1", "input")))


def scores(result: Result, hq: Tensor, lpips: LPIPS) -> list[float]:
    """Means over the photos, in the order of `MEASURES`."""
    x = result.image
    distance = 1000 * (x - result.stage1).square().mean()
    colour = 255 * (x - hq).mean(dim=(2, 3)).norm(dim=1).mean()
    values = (psnr(x, hq).mean(), ssim(x, hq).mean(), lpips(x, hq).mean(), distance, colour)
    return [value.item() for value in values]


if __name__ == "__main__":
    sys.exit(main())
