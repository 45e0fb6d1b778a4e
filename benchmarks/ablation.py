"""The ablations of the paper in one command: trains each, restores held-out photos with it, and compares.

Every YAML of --configs is one: a training is run unless it is done (and goes on where it was stopped), a preset only
restores, and a `sweep` in it gives one row for each value, points of a curve. Pairs are made as in
benchmarks/quality.py, and all rows get the same noise. Colours are not aligned to stage 1, and none of its detail is
put back, because how far they drift is one of the questions. `ΔE00` is the mean CIEDE2000 of result and clean photo.

<save>/report.md has the table, and by how much every row differs from the method, photo by photo; report.json and
scores.csv the figures behind it (as of scripts/evaluate.py), plane.png the curve, ablation.jpg and guidance_sweep.jpg
pictures side by side.
"""

import json
import logging
import shlex
import shutil
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments
from benchmarks.pairs import synthetic_pairs
from diffbir.evaluation import plots, report, run
from diffbir.evaluation.protocols import PROTOCOLS
from diffbir.model.build import build_networks, weight_files
from diffbir.model.options import Options
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer, Result
from diffbir.model.training.run import train
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import ROOT, load_config, project_path, read_config
from diffbir.utils.device import pick_device
from diffbir.utils.image import list_images, read_rgb, side_by_side, to_tensor, to_uint8, write_png
from scripts import make_testset

log = logging.getLogger(__name__)

# In this order: what others start from comes before them.
NAMES = (
    *("latent_branch", "image_controlnet", "no_restoration", "unfrozen_decoder", "prior", "no_finetuning"),
    "guidance_sweep",
)
VALIDATED = 8  # pairs whose scores the trainings log
METHOD = "latent branch"  # what the other rows are compared with
MEASURES = ("psnr", "ssim", "lpips", "ciede2000")


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    arguments.add_photos(p, 50, 128, help="folder of clean photos that are restored; none of --photos")
    p.add_argument("--photos", required=True, help="folder of clean photos for training")
    p.add_argument(
        "--configs",
        type=Path,
        default=ROOT / "configs/ablation/mini",
        help="folder of YAML files; configs/ablation is full size (default: configs/ablation/mini)",
    )
    p.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="(default: all)", metavar="NAME")
    p.add_argument("--steps", type=int, help="of each training (default: the YAML's)")
    p.add_argument(
        "--pairs",
        type=int,
        default=1200,
        help="crops, one of a photo at most, that are degraded and pass stage 1 before the trainings, which all draw "
        "from them; 0: anew at every step (default: %(default)s)",
    )
    p.add_argument("--fresh", action="store_true", help="trains anew what was trained with other settings or weights")
    p.add_argument("--batch", type=int, default=8, help="photos restored at once (default: %(default)s)")
    p.add_argument("--degradation", default="configs/dataset/mini.yaml", help="its YAML (default: %(default)s)")
    p.add_argument("--solver", default="ddim", help="(default: %(default)s)")
    p.add_argument("--sampling-steps", type=int, default=10, help="(default: %(default)s)")
    p.add_argument("--device", default="auto", help="that restores (default: %(default)s)")
    p.add_argument("--save", type=Path, default=Path("outputs/ablation"), help="folder (default: %(default)s)")
    p.add_argument(
        "--pictures", type=int, nargs="*", default=[0, 1, 2, 3], help="photos to show, by number", metavar="N"
    )
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
            own = [*overrides, "resume=auto"]
            if args.pairs and "branch" in read_config(file).networks:
                own += from_pairs(load_config(file, own), args)
            ensure_trained(name, load_config(file, own), args.fresh)
    files.pop("prior", None)

    hq, lq = synthetic_pairs(args.input, args.size, args.count, degradation=args.degradation)
    device = pick_device(args.device)
    rows, strips = {"input": lq}, {}
    for name, file in tqdm(files.items(), unit="ablation", desc="restoring"):
        config = load_preset(str(file))
        restorer = Restorer.from_config(config, device)
        common = restorer.options(solver=args.solver, steps=args.sampling_steps, color="none", residual=0.0)
        for title, options in variants(name, config, common).items():
            result = restore(restorer, lq, options, args.batch)
            strip = strips.setdefault(name if config.get("sweep") else "ablation", {"input": lq})
            if config.networks.get("stage1"):  # without the restoration module there is none to show
                rows.setdefault("stage 1", result.stage1)
                strip.setdefault("stage 1", result.stage1)
            rows[title] = strip[title] = result.image

    command = ["python benchmarks/ablation.py", *map(shlex.quote, sys.argv[1:] if argv is None else argv)]
    found = evaluated(rows, hq, args.save, device)
    found["command"] = " ".join(command)
    found["warnings"].append(f"{args.size} pixels, {args.solver}, {args.sampling_steps} steps, seed 0; float32")
    if METHOD in rows:
        found["comparisons"] = [report.compare(found, title, METHOD) for title in rows if title != METHOD]
    report.write(found, args.save)
    plots.plane(found, args.save / "plane.png")
    print("\n" + report.markdown(found))
    for name, strip in strips.items():
        sheet = [shown({**strip, "clean": hq}, i) for i in args.pictures if i < len(hq)]
        if sheet:
            Image.fromarray(np.concatenate(sheet)).save(args.save / f"{name}.jpg", quality=90)


def shown(rows: dict[str, Tensor], i: int) -> NDArray[np.uint8]:
    """Photo i of every row, side by side; titles need 256 pixels."""
    photos = {title: images[i : i + 1] for title, images in rows.items()}
    zoom = max(1, 256 // next(iter(photos.values())).shape[-1])
    return side_by_side({title: to_uint8(F.interpolate(x, scale_factor=zoom)[0]) for title, x in photos.items()})


def from_pairs(config: DictConfig, args: Namespace) -> list[str]:
    """Changes to the YAML of a training: it reads pairs that were made before, at this size most of a step's work.

    They lie beside its run folder, for all that share it: `hq`, `lq`, and `reg`, what stage 1 makes of `lq`.
    """
    size = config.data.params.train.params.crop_size * 3 // 2  # a step's crop is a random part
    seen, overrides = "lq" if config.networks.stage1 is None else "reg", []
    for key, photos, count in (("photos", args.photos, args.pairs), ("val_photos", args.input, VALIDATED)):
        folder = Path(config.run_dir).parent / "pairs" / key
        if not folder.exists():
            make = [str(photos), "--output", str(folder), "--degradation", args.degradation, "--crop", "random"]
            if make_testset.main([*make, "--size", str(size), "--count", str(count)]):
                raise UserError(f"the pairs in {folder} could not be made of {photos}")
        if seen == "reg":
            add_stage1(config, folder)
        source = {"target": "dataset.sources.pairs.PairFolders"}
        source["params"] = {"hq": str(folder / "hq"), "lq": str(folder / seen)}
        overrides.append(f"{key}={json.dumps(source)}")
    overrides += ["degradation=null", "networks.stage1=null", "weights.stage1=null"]
    return [*overrides, f"data.params.val.params.crop_size={size}"]


@torch.inference_mode()
def add_stage1(config: DictConfig, folder: Path, batch: int = 8) -> None:
    """What stage 1 makes of `lq`, in `reg`, where it isn't there yet."""
    names = [path.name for path in list_images(folder / "lq")]
    waiting = [name for name in names if not (folder / "reg" / name).is_file()]
    if not waiting:
        return
    stage1 = build_networks(config, ("stage1",))["stage1"].eval()
    for some in tqdm([waiting[i : i + batch] for i in range(0, len(waiting), batch)], unit="batch", desc="stage 1"):
        x = stage1(torch.stack([to_tensor(read_rgb(folder / "lq" / name)) for name in some])).clamp(0, 1)
        for name, picture in zip(some, x, strict=True):
            write_png(folder / "reg" / name, to_uint8(picture))


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
    return {f"{name.removesuffix('_sweep')}@{value:g}": replace(options, **{key: value}) for key, value in values}


def restore(restorer: Restorer, lq: Tensor, options: Options, batch: int) -> Result:
    """(N, 3, H, W) in batches; photo i gets the noise of seed i."""
    numbers = torch.arange(len(lq)).split(batch)
    parts = [restorer.restore(lq[some], options, some.tolist()) for some in numbers]
    return Result(*(torch.cat([getattr(part, k) for part in parts]) for k in ("image", "stage1", "input")))


def evaluated(rows: dict[str, Tensor], hq: Tensor, folder: Path, device: torch.device) -> dict[str, Any]:
    """The evaluation of rows (N, 3, H, W) against the clean photos, by way of pictures in a folder."""
    shutil.rmtree(folder / "results", ignore_errors=True)
    results = {title: folder / "results" / title.replace(" ", "_") for title in rows}
    clean = folder / "results" / "clean"
    for place, images in zip((*results.values(), clean), (*rows.values(), hq), strict=True):
        for i, image in enumerate(images):
            write_png(place / f"{i:03d}.png", to_uint8(image))
    found = run.evaluate(results, clean, PROTOCOLS["rgb"], MEASURES, device, batch=8)
    found["protocol"] = {"name": "rgb", **found["protocol"]}
    return found


if __name__ == "__main__":
    sys.exit(main())
