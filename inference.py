"""Restores degraded photos: a folder in, a folder of PNG files out. By default it uses the embedded model."""

import argparse
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
from tqdm import tqdm

from diffbir.model.options import Options
from diffbir.model.presets import PRESETS, STAGE1, names
from diffbir.model.restorer import Restorer, Result
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.image import ImageError, list_images, side_by_side, write_png
from diffbir.utils.precision import PRECISIONS


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument("--input", required=True, help="folder (searched recursively), image, or text file listing images")
    p.add_argument("--output", required=True, help="folder for the results; they keep the inputs' relative paths")
    p.add_argument(
        "--preset",
        default="mini",
        help=f"{', '.join(names(PRESETS))}, or a YAML, e.g. of a training (default: %(default)s)",
    )
    p.add_argument("--task", help="of a preset with several: sr, face or denoise (default: its first)")
    p.add_argument("--stage1", help=f"another stage 1: {', '.join(names(STAGE1))}, or a YAML")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    p.add_argument(
        "--precision",
        default="auto",
        choices=("auto", *PRECISIONS),
        help="of the networks; auto is fp16 on a GPU and fp32 elsewhere (default: %(default)s)",
    )
    p.add_argument(
        "--offload",
        action="store_true",
        help="keep only the network that computes in GPU memory: slower",
    )
    p.add_argument("--save-stages", action="store_true", help="also write OUTPUT/stages/: input, stage 1 and result")
    group = p.add_argument_group("restoration (defaults come from the preset)")
    for option in fields(Options):
        flag, help = "--" + option.name.replace("_", "-"), option.metadata["help"]
        if isinstance(option.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        else:
            group.add_argument(flag, type=type(option.default), choices=option.metadata["choices"], help=help)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the preset's YAML")
    return p


@entry_point
def main(argv: list[str] | None = None) -> int:
    args = parser().parse_args(argv)
    output = Path(args.output)
    paths = [p for p in list_images(args.input) if output.resolve() not in p.resolve().parents]
    if not paths:
        raise UserError(f"no images in {args.input} other than results in {output}; give another folder")
    restorer = Restorer.from_preset(
        args.preset,
        args.device,
        args.precision,
        task=args.task,
        stage1=args.stage1,
        stage=args.stage,
        offload=args.offload,
        overrides=args.overrides,
    )
    flags = {f.name: getattr(args, f.name) for f in fields(Options)}
    flags = {name: value for name, value in flags.items() if value is not None}
    options = restorer.options(**flags)

    failures = []
    bar = tqdm(list(zip(paths, result_names(paths, Path(args.input)), strict=True)), unit="image", desc="restoring")
    for path, name in bar:
        bar.set_postfix_str(path.name)
        with tqdm(total=0 if options.stage == "1" else options.steps, unit="step", leave=False) as steps:
            try:
                result = restorer(path, stages=True, progress=lambda p, bar=steps: bar.update(p.step - bar.n), **flags)
            except ImageError as error:
                failures.append(str(error))
                continue
        write_png(output / name, np.asarray(result.image))
        if args.save_stages:
            write_png(output / "stages" / name, stages(result))
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    print(f"{len(paths) - len(failures)} of {len(paths)} images restored, in {output}")
    return 1 if failures else 0


def stages(result: Result):
    pictures = {"input": result.input, "stage 1": result.stage1, "result": result.image}
    return side_by_side({title: np.asarray(picture) for title, picture in pictures.items()})


def result_names(paths: list[Path], source: Path) -> list[Path]:
    """Relative path of each result: the input's, as .png. Inputs that differ only in suffix keep it in the name."""
    root = source if source.is_dir() else source.parent
    relative = [p.relative_to(root) if p.is_relative_to(root) else Path(p.name) for p in paths]
    count = Counter(p.with_suffix("") for p in relative)
    return [p.with_suffix(".png") if count[p.with_suffix("")] == 1 else p.with_name(p.name + ".png") for p in relative]


if __name__ == "__main__":
    sys.exit(main())
