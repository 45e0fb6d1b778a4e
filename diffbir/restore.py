"""What the command line does once its flags are right."""

import argparse
import sys
from collections import Counter
from dataclasses import fields
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from diffbir.model.options import Options
from diffbir.model.restorer import Restorer, Result
from diffbir.utils.cli import UserError
from diffbir.utils.image import ImageError, list_images, side_by_side, write_png


def restore(args: argparse.Namespace) -> int:
    """Restores every image that the flags of `diffbir.command` name; 1 if some were damaged, else 0.

    Raises:
        UserError: nothing to restore, or a flag whose value can't be used.
    """
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


def stages(result: Result) -> NDArray[np.uint8]:
    pictures = {"input": result.input, "stage 1": result.stage1, "result": result.image}
    return side_by_side({title: np.asarray(picture) for title, picture in pictures.items()})


def result_names(paths: list[Path], source: Path) -> list[Path]:
    """Relative path of each result: the input's, as .png. Inputs that differ only in suffix keep it in the name."""
    root = source if source.is_dir() else source.parent
    relative = [p.relative_to(root) if p.is_relative_to(root) else Path(p.name) for p in paths]
    count = Counter(p.with_suffix("") for p in relative)
    return [p.with_suffix(".png") if count[p.with_suffix("")] == 1 else p.with_name(p.name + ".png") for p in relative]
