"""Arguments that the benchmarks share."""

import argparse

from diffbir.model.restorer import Restorer
from diffbir.model.sampling.solvers import CHAINS


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser that shows a module's docstring as it is written."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def add_photos(p: argparse.ArgumentParser, count: int, size: int, help: str = "folder of clean photos") -> None:
    """--input, --count and --size: what `pairs.synthetic_pairs` is made from."""
    p.add_argument("--input", required=True, help=help)
    p.add_argument("--count", type=int, default=count, help="photos, in order of their names (default: %(default)s)")
    p.add_argument("--size", type=int, default=size, help="side of the crop (default: %(default)s)")


def add_preset(p: argparse.ArgumentParser) -> None:
    """--preset and key=value: what `restorer` is built from."""
    p.add_argument("--preset", default="mini", help="as in inference.py (default: %(default)s)")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the preset's YAML")


def add_grid(p: argparse.ArgumentParser) -> None:
    """--solvers and --steps, several of each."""
    p.add_argument("--solvers", nargs="+", default=CHAINS, choices=CHAINS, help="(default: all)")
    p.add_argument("--steps", nargs="+", type=int, default=[8], help="(default: 8)")


def restorer(args: argparse.Namespace) -> Restorer:
    """On the CPU in float32, so that figures compare."""
    return Restorer.from_preset(args.preset, device="cpu", precision="fp32", overrides=args.overrides)
