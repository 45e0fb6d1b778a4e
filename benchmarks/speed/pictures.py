"""Whole restorations: of a picture, of a large one, from the first line to the first pixel, of a folder."""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.speed.cases import Case, bytes_of, overrides
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer
from diffbir.utils.config import ROOT

LARGE = (2160, 3840)


def restorer(args: argparse.Namespace) -> Restorer:
    """The embedded model, or a published preset with random weights, as no file is at hand."""
    if args.preset == "mini":
        return Restorer.from_preset("mini", args.device, args.precision)
    config = load_preset(args.preset, overrides=overrides(args))
    config.weights = {}
    return Restorer.from_config(config, args.device, args.precision)


def noise(height: int, width: int) -> Tensor:
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def whole(args: argparse.Namespace, height: int, width: int) -> Case:
    pipeline, image = restorer(args), noise(height, width)
    changes = {} if args.steps is None else {"steps": args.steps}
    if args.tiny:
        changes["min_side"] = 0
    options = pipeline.options(**changes)
    networks = [pipeline.stage1, pipeline.autoencoder, pipeline.text_encoder, *pipeline.diffusion_networks]
    weights = {"ours": lambda: bytes_of(*(net for net in networks if net is not None))}
    facts = {"preset": args.preset, "pixels": f"{width}x{height}", "solver": options.solver, "steps": options.steps}
    return Case({"ours": lambda: pipeline.restore(image, options).image}, weights, facts=facts)


def restore(args: argparse.Namespace) -> Case:
    """A picture of 512x512 from stage 1 to colours; by default with the embedded model's one step."""
    side = args.size or (64 if args.tiny else 512)
    return whole(args, side, side)


def large(args: argparse.Namespace) -> Case:
    """A picture of 3840x2160, in windows."""
    height, width = (64, 576) if args.tiny else LARGE
    return whole(args, height, width)


def command(args: argparse.Namespace, count: int, side: int) -> Case:
    """The command line over `count` new pictures, in a process of its own."""
    folder = tempfile.TemporaryDirectory()
    root = Path(folder.name)
    (root / "in").mkdir()
    rng = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(root / "in" / f"{i}.png")
    line = [sys.executable, "inference.py", "--input", root / "in", "--output", root / "out", "--overwrite"]
    line += ["--device", args.device, "--precision", args.precision, "--preset", "mini"]

    def run(_=folder) -> None:  # the folder lives as long as the case
        subprocess.run(list(map(str, line)), cwd=ROOT, check=True, capture_output=True)

    return Case({"ours": run}, images=count, facts={"pixels": f"{side}x{side}", "pictures": count}, own_process=True)


def start(args: argparse.Namespace) -> Case:
    """From the command to the first restored picture, of 64x64 pixels."""
    return command(args, 1, 64)


def folder(args: argparse.Namespace) -> Case:
    """The command over a folder of pictures of 256x256 pixels."""
    return command(args, 2 if args.tiny else args.count, args.size or (32 if args.tiny else 256))
