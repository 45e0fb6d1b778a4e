"""Methods side by side on the same low-quality pictures: tables, plots and crops at 100 %.

Input (bicubic), stage 1, the chain without and with guidance (chain@SCALE), one step where the preset has it, and
Real-ESRGAN x4plus, whose weights `scripts/convert_weights.py --realesrgan` makes. Every method enlarges the files of
--input by --upscale itself; Real-ESRGAN is made for 4. What is restored already isn't computed again. With --reference
the report has every metric of scripts/evaluate.py, without it those that need none. Crops are those of the pictures on
which the one step (the chain, where there is none) gains most over stage 1 in LPIPS, loses most, and lies in between;
without a reference, of the first ones. --sheet puts them into one picture.

Example:
    python scripts/make_testset.py PHOTOS --degradation configs/dataset/realesrgan.yaml --size 256 --lq-scale 4 \\
        --output SET
    python benchmarks/compare.py --input SET/lq --reference SET/hq --output outputs/quality
    python benchmarks/compare.py --input inputs/demo --upscale 2 --methods bicubic "one step" --output outputs/real
"""

import shlex
import sys
from collections.abc import Container, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments, machine
from diffbir.evaluation import plots, report, run
from diffbir.evaluation.protocols import METRICS, PROTOCOLS
from diffbir.model.restorer import Restorer
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.device import pick_device
from diffbir.utils.image import list_images, read_rgb, side_by_side, write_png

# Title -> another stage 1 than the preset's, and options. chain@SCALE are the points of one curve in the plots; their
# solver is the preset's, or CHAIN where that is one step.
CHAIN = "ddpm"
METHODS: dict[str, tuple[str | None, dict[str, Any]]] = {
    "bicubic": (None, {"stage": "1"}),
    "stage 1": (None, {"stage": "1"}),
    **{f"chain@{s}": (None, {"guidance_scale": float(s)}) for s in (0, 3000, 20000, 100000)},
    "one step": (None, {"solver": "one_step"}),
    "Real-ESRGAN x4plus": ("realesrgan", {"stage": "1"}),
}


@entry_point
def main(argv: list[str] | None = None) -> int:
    p = arguments.parser(__doc__)
    p.add_argument("--input", required=True, type=Path, help="folder of low-quality pictures")
    p.add_argument("--reference", type=Path, help="folder of clean pictures of the same names")
    p.add_argument("--output", type=Path, default=Path("outputs/quality"), help="folder (default: %(default)s)")
    p.add_argument("--upscale", type=float, default=4, help="output size over input size (default: %(default)s)")
    p.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="NAME", help="(default: all)"
    )
    p.add_argument("--protocol", choices=PROTOCOLS, default="rgb", help="(default: %(default)s)")
    p.add_argument(
        "--metrics", nargs="+", default=list(METRICS), metavar="NAME", help="as of scripts/evaluate.py (default: all)"
    )
    p.add_argument("--crops", type=int, default=6, help="pictures to show (default: %(default)s)")
    p.add_argument("--crop-size", type=int, default=192, help="side of what is shown, pixels (default: %(default)s)")
    p.add_argument("--sheet", type=Path, help="JPEG with all crops, one below the other")
    p.add_argument("--shown", nargs="+", choices=METHODS, help="methods in the crops (default: all)", metavar="NAME")
    p.add_argument("--device", default="auto", help="(default: %(default)s)")
    arguments.add_preset(p)
    args = p.parse_args(argv)

    device, results, absent = pick_device(args.device), {}, {}
    for title in args.methods:
        folder = args.output / "results" / title.replace(" ", "_")
        try:
            restore(title, folder, args)
            results[title] = folder
        except UserError as error:
            absent[title] = str(error)
    if not results:
        raise UserError("; ".join(f"{title}: {reason}" for title, reason in absent.items()))
    protocol = PROTOCOLS[args.protocol]
    found = run.evaluate(results, args.reference, protocol, args.metrics, device)
    found["protocol"] = {"name": args.protocol, **found["protocol"]}
    words = map(shlex.quote, sys.argv[1:] if argv is None else argv)
    found["command"] = " ".join(["python benchmarks/compare.py", *words])
    found["warnings"] += [f"{title} is left out: {reason}" for title, reason in absent.items()]
    found["warnings"] += [f"{machine.processor(device)}, {machine.threads()}; preset {args.preset}"]
    main = generated(results)
    pairs = [(main, title) for title in ("stage 1", "chain@0", "chain@3000", "Real-ESRGAN x4plus") if title != main]
    found["comparisons"] = [report.compare(found, a, b) for a, b in pairs if {a, b} <= results.keys()]
    report.write(found, args.output)
    plots.distributions(found, args.output / "distributions.png")
    if args.reference:
        plots.plane(found, args.output / "plane.png")
    shown = {title: folder for title, folder in results.items() if title in (args.shown or METHODS)}
    crops = dict(strips(found, shown, args))
    for name, strip in crops.items():
        write_png(args.output / "crops" / f"{name}.png", strip)
    if args.sheet:
        args.sheet.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.concatenate(list(crops.values()))).save(args.sheet, quality=90)
    print("\n" + report.markdown(found))
    return 0


def restore(title: str, folder: Path, args: Any) -> None:
    """Writes the results of a method that aren't there yet.

    Raises:
        UserError: the preset has no such networks, or their weights are missing.
    """
    stage1, options = METHODS[title][0], dict(METHODS[title][1])
    paths = list_images(args.input)
    names = [str(path.relative_to(args.input).with_suffix(".png")) for path in paths]
    waiting = [(path, name) for path, name in zip(paths, names, strict=True) if not (folder / name).is_file()]
    if not waiting:
        return
    restorer = Restorer.from_preset(
        args.preset, args.device, stage1=stage1, stage=options.get("stage"), overrides=args.overrides
    )
    if title.startswith("chain@"):
        options["solver"] = CHAIN if restorer.defaults.solver == "one_step" else restorer.defaults.solver
    for path, name in tqdm(waiting, unit="picture", desc=title):
        result = restorer(path, stages=True, upscale=args.upscale, **options)
        write_png(folder / name, np.asarray(result.input if title == "bicubic" else result.image))


def strips(found: dict[str, Any], results: dict[str, Path], args: Any) -> Iterator[tuple[str, NDArray[np.uint8]]]:
    """Name -> centres of the chosen pictures, (H, W, 3), as the methods made them."""
    files = {title: run.named_files(folder) for title, folder in results.items()}
    first = next(iter(files.values()))
    for place, stem in chosen(found, sorted(Path(name).stem for name in first), args.crops):
        pictures = {title: next(p for n, p in f.items() if Path(n).stem == stem) for title, f in files.items()}
        if args.reference:
            pictures["clean"] = next(p for n, p in run.named_files(args.reference).items() if Path(n).stem == stem)
        yield f"{place}_{stem}", side_by_side({t: centre(read_rgb(p), args.crop_size) for t, p in pictures.items()})


def generated(titles: Container[str]) -> str:
    """Of the methods that generate, the one that is looked at most closely."""
    return "one step" if "one step" in titles else "chain@0"


def chosen(found: dict[str, Any], stems: list[str], count: int) -> list[tuple[str, str]]:
    """Gains, losses and what lies between, each a third of `count`: how it ranks, and the picture's name."""
    methods, titles = found["methods"], (generated(found["methods"]), "stage 1")
    if not set(titles) <= methods.keys() or "lpips" not in found["metrics"]:
        return [(f"{i:03d}", stem) for i, stem in enumerate(stems[:count])]
    ours, stage1 = ({row["name"]: row["scores"]["lpips"] for row in methods[t]["images"]} for t in titles)
    ranked = sorted(ours.keys() & stage1.keys(), key=lambda name: ours[name] - stage1[name])
    third = max(1, count // 3)
    middle = max(0, (len(ranked) - third) // 2)
    parts = {"gain": ranked[:third], "between": ranked[middle : middle + third], "loss": ranked[::-1][:third]}
    return [(f"{part}{i}", Path(name).stem) for part, names in parts.items() for i, name in enumerate(names)]


def centre(rgb: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    top, left = (max(0, (length - side) // 2) for length in rgb.shape[:2])
    return rgb[top : top + side, left : left + side]


if __name__ == "__main__":
    sys.exit(main())
