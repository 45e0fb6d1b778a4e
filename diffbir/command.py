"""Restores degraded photos: a folder in, a folder of PNG files out. By default it uses the embedded model."""

import argparse
from dataclasses import fields

from diffbir.model.options import Options
from diffbir.model.presets import PRESETS, STAGE1, names
from diffbir.utils.choices import PRECISIONS
from diffbir.utils.cli import entry_point


def parser(name: str | None = None) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(name, description=__doc__)
    p.add_argument("--input", required=True, help="folder (searched recursively), image, or text file listing images")
    p.add_argument("--output", required=True, help="folder for the results; they keep the inputs' relative paths")
    p.add_argument(
        "--preset",
        default="mini",
        help=f"{', '.join(names(PRESETS))}, or a YAML, e.g. of a training (default: %(default)s)",
    )
    add_restoration(p)
    p.add_argument("--save-stages", action="store_true", help="also write OUTPUT/stages/: input, stage 1 and result")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the preset's YAML")
    return p


def add_restoration(p: argparse.ArgumentParser) -> None:
    """The flags that say how pictures are restored, but for the preset."""
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
    group = p.add_argument_group("restoration (defaults come from the preset)")
    for option in fields(Options):
        flag, help = "--" + option.name.replace("_", "-"), option.metadata["help"]
        if isinstance(option.default, bool):
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=help)
        else:
            group.add_argument(flag, type=type(option.default), choices=option.metadata["choices"], help=help)


@entry_point
def main(argv: list[str] | None = None, name: str | None = None) -> int:
    """The command line; help calls it `name`, by default the file that was started."""
    args = parser(name).parse_args(argv)
    from diffbir.restore import restore  # torch takes long to load, and help or a wrong flag needs none

    return restore(args)
