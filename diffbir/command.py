"""Restores degraded photos: a folder in, a folder of restored pictures out. By default it uses the embedded model.

A run can be stopped at any time: the same command goes on where it was. OUTPUT/manifest.jsonl tells of every image what
became of it. `diffbir web` restores in a browser.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable
from dataclasses import fields

from diffbir.model.options import Options
from diffbir.model.presets import PRESETS, STAGE1, names
from diffbir.utils.choices import FORMATS, PRECISIONS
from diffbir.utils.cli import entry_point

USAGE = "%(prog)s [flags] --input PHOTOS --output RESTORED [key=value ...]"
FIRST = ("upscale", "guidance_scale")  # options that stand among the flags that matter first
WEB = "web"
TEXT = ("prompt", "negative_prompt")
OVERRIDE = re.compile(r"[A-Za-z_][\w.\-]*=.*", re.DOTALL)


def parser(name: str | None = None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(name, usage=USAGE, description=__doc__, add_help=False)
    options = {option.name: option for option in fields(Options)}

    first = p.add_argument_group("the flags that matter first")
    first.add_argument(
        "--input",
        required=True,
        nargs="+",
        metavar="PHOTOS",
        help="folders (searched recursively), images, globs, or text files that list images or folders, one a line",
    )
    first.add_argument(
        "--output", required=True, metavar="RESTORED", help="folder for the results, in the inputs' tree of folders"
    )
    add_option(first, options.pop(FIRST[0]))
    add_option(first, options.pop(FIRST[1]))
    first.add_argument(
        "--preset",
        default="mini",
        help=f"{', '.join(names(PRESETS))}, or a YAML, e.g. of a training (default: %(default)s)",
    )

    results = p.add_argument_group("results")
    results.add_argument(
        "--format", choices=FORMATS, default="png", help="of the results; same is the input's (default: %(default)s)"
    )
    results.add_argument(
        "--quality", type=between(1, 100), default=95, help="of jpg, webp and avif, 1 to 100 (default: %(default)s)"
    )
    results.add_argument(
        "--exif",
        choices=("keep", "drop"),
        default="keep",
        help="what cameras write into photos: time, place, settings (default: %(default)s)",
    )
    results.add_argument("--suffix", default="", help="put behind every name: _restored makes photo_restored.png")
    results.add_argument(
        "--long-side", type=between(1, 2**20), metavar="PIXELS", help="longer side of results, in place of --upscale"
    )
    results.add_argument(
        "--size", type=size, metavar="WIDTHxHEIGHT", help="results as large as fits in, in place of --upscale"
    )
    results.add_argument("--save-stages", action="store_true", help="also write OUTPUT/stages/: input, stage 1, result")
    results.add_argument(
        "--compare",
        action="store_true",
        help="also write OUTPUT/compare.html: all images under a slider",
    )

    runs = p.add_argument_group("runs")
    runs.add_argument("--dry-run", action="store_true", help="list what would be done, with sizes and an estimate")
    runs.add_argument("--overwrite", action="store_true", help="redo finished images, and replace what no run wrote")

    add_faces(p.add_argument_group("faces in whole photos"))
    add_model(p.add_argument_group("model"))
    machine = p.add_argument_group("machine")
    add_machine(machine)
    machine.add_argument(
        "--compile",
        action="store_true",
        help="compile stage 1, UNet and branch: minutes for the first picture of a size, faster from then on",
    )
    machine.add_argument(
        "--devices",
        type=between(1, 4096),
        default=1,
        metavar="N",
        help="processes that share the images, each on a GPU of its own; torchrun does it over nodes (default: 1)",
    )
    machine.add_argument(
        "--max-megapixels",
        type=between(1, 2**20),
        metavar="N",
        help="larger pictures are refused, because a small file may hold an immense one (default: 178)",
    )
    machine.add_argument(
        "--batch",
        type=between(0, 4096),
        metavar="N",
        help="images of equal size that are computed at once; 0 is what a GPU has room for (default: 0, on CPUs 1)",
    )

    text = p.add_argument_group("text (models that know it: v2, v2.1)")
    for option in TEXT:
        add_option(text, options.pop(option))
    text.add_argument(
        "--prompts",
        metavar="CSV",
        help="a prompt for each image: a table with the columns path, prompt and perhaps negative_prompt; or the word "
        "sidecar, for photo.txt beside photo.jpg",
    )

    text.add_argument(
        "--captioner",
        metavar="FOLDER",
        help="a prompt for each image that has none of its own, by an image-to-text model that transformers has saved "
        "there, such as BLIP; it stands before --prompt",
    )

    rest = p.add_argument_group("restoration (defaults come from the preset)")
    for option in options.values():
        add_option(rest, option)

    other = p.add_argument_group("other")
    other.add_argument("-h", "--help", action="help", help="show this page")
    other.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the preset's YAML")
    return p


def add_faces(group: argparse._ArgumentGroup) -> None:
    """Which faces are restored for themselves, and by what."""
    group.add_argument(
        "--faces",
        action="store_true",
        help="find the faces of a photo, restore each aligned to 512 pixels, and paste it back",
    )
    group.add_argument(
        "--face-preset",
        metavar="PRESET",
        help="what restores the faces (default: v1_face beside v1_general; else the preset in use, with its task face "
        "if it has one)",
    )
    group.add_argument(
        "--face-threshold",
        type=fraction,
        default=0.9,
        metavar="X",
        help="how sure the detector must be, 0 to 1; less finds more, also what is no face (default: %(default)s)",
    )
    group.add_argument("--only-center-face", action="store_true", help="restore the face nearest to the centre alone")
    group.add_argument(
        "--save-faces", action="store_true", help="also write OUTPUT/faces/: each face, aligned, before and after"
    )
    group.add_argument("--face-detector", metavar="FILE", help="other weights of the detector (MTCNN)")


def add_model(group: argparse._ArgumentGroup) -> None:
    """Which networks of a preset."""
    group.add_argument(
        "--task",
        help="of a preset with several: sr, face or denoise (default: its first); auto chooses denoise for pictures "
        "with noise or JPEG blocks and sr for others",
    )
    group.add_argument(
        "--stage1", help=f"another stage 1: {', '.join(names(STAGE1))}, a weight file of any known network, or a YAML"
    )
    group.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:scale]",
        help="merge low-rank additions into the networks (diffusers, PEFT or kohya); may be given several times",
    )


def add_machine(group: argparse._ArgumentGroup) -> None:
    """Where and how they compute."""
    group.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps, ... (default: %(default)s)")
    group.add_argument(
        "--precision",
        default="auto",
        choices=("auto", "fastest", *PRECISIONS),
        help="of the networks; auto is fp16 on a GPU and fp32 elsewhere; fastest also is bf16 on a CPU, if that is "
        "measured to be faster there (default: %(default)s)",
    )
    group.add_argument(
        "--offload", action="store_true", help="keep only the network that computes in GPU memory: slower"
    )


def add_restoration(p: argparse.ArgumentParser) -> None:
    """The flags that say how pictures are restored, for scripts that do it on the way."""
    add_model(p.add_argument_group("model"))
    add_machine(p.add_argument_group("machine"))
    group = p.add_argument_group("restoration (defaults come from the preset)")
    for option in fields(Options):
        add_option(group, option)


def add_option(group: argparse._ArgumentGroup, option) -> None:
    """The flag of a field of `Options`."""
    flag, help = "--" + option.name.replace("_", "-"), option.metadata["help"]
    if isinstance(option.default, bool):
        group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
    else:
        choices = option.metadata["choices"]
        many = choices is not None and len(choices) > 3  # which would make the line too long
        kind = "NAME" if many else None if choices else {int: "N", float: "X", str: "TEXT"}[type(option.default)]
        help = f"{help}: {', '.join(choices)}" if many else help
        group.add_argument(flag, type=type(option.default), choices=choices, metavar=kind, help=help)


def between(low: int, high: int) -> Callable[[str], int]:
    def whole_number(text: str) -> int:
        value = int(text)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"{value} is not between {low} and {high}")
        return value

    return whole_number


def fraction(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value


def size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"it is written as 1920x1080, in pixels, not '{text}'")
    return int(width), int(height)


def parse(argv: list[str] | None = None, name: str | None = None) -> argparse.Namespace:
    """The flags; what looks like key=value and isn't a file is an override, wherever it stands."""
    p = parser(name)
    args = p.parse_args(argv)
    overrides = [text for text in args.input if OVERRIDE.fullmatch(text) and not os.path.exists(text)]
    args.input = [text for text in args.input if text not in overrides]
    args.overrides = [*overrides, *args.overrides]
    if not args.input:
        p.error("argument --input: expected a folder, an image, a glob or a list")
    for flag, texts in (("--input", args.input), ("--output", [args.output])):
        if "" in texts:
            p.error(f"argument {flag}: it is empty; is a variable of the shell not set?")
    for flag in ("face_preset", "only_center_face", "save_faces", "face_detector"):
        if getattr(args, flag) and not args.faces:
            p.error(f"argument --{flag.replace('_', '-')}: it needs --faces")
    for text in args.overrides:
        if "=" not in text:
            p.error(f"unrecognized arguments: {text}")
    if any(mark in args.suffix for mark in "/\\\0"):
        p.error("argument --suffix: it is part of a name, and no folder")
    return args


@entry_point
def main(argv: list[str] | None = None, name: str | None = None) -> int:
    """The command line; help calls it `name`, by default the file that was started."""
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == [WEB]:
        from diffbir.web.command import main as web

        return web(words[1:], f"{name or os.path.basename(sys.argv[0])} {WEB}")
    args = parse(argv, name)
    from diffbir.restore import restore  # torch takes long to load, and help or a wrong flag needs none

    return restore(args)
