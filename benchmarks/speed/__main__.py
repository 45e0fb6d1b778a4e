"""Times this code against others that compute the same: `python -m benchmarks.speed --case denoiser swinir`.

Every repetition runs each way once, so that whatever else the machine does meets them all; the figures are medians.
A ratio is the other's time over ours: above 1, ours is faster. On a busy machine `--threads 1` and the ratio of CPU
time say more than that of wall time.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import arguments, machine
from benchmarks.speed import cases, pictures, report, training
from benchmarks.speed.timing import difference, interleave
from diffbir.utils.choices import PRECISIONS
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.device import pick_device

CASES = {
    "peak": report.peak,
    "denoiser": cases.denoiser,
    "swinir": cases.swinir,
    "encode": cases.encode,
    "decode": cases.decode,
    "halves": cases.halves,
    "restore": pictures.restore,
    "large": pictures.large,
    "start": pictures.start,
    "folder": pictures.folder,
    "train_stage1": training.stage1,
    "train_stage2": training.stage2,
}


def parser() -> argparse.ArgumentParser:
    p = arguments.parser(__doc__)
    described = "; ".join(f"{name}: {(make.__doc__ or '').splitlines()[0].rstrip('.')}" for name, make in CASES.items())
    p.add_argument("--case", nargs="+", required=True, choices=CASES, metavar="CASE", help=described.replace("%", "%%"))
    p.add_argument("--device", default="auto", help="(default: %(default)s)")
    p.add_argument("--precision", default="fp32", choices=PRECISIONS, help="of all networks (default: %(default)s)")
    p.add_argument("--batch", type=int, default=1, help="images in a call (default: %(default)s)")
    p.add_argument("--size", type=int, help="side in pixels; of denoiser, of the latent (default: the case's own)")
    p.add_argument("--part", default="both", choices=("both", "unet", "branch"), help="of denoiser")
    p.add_argument("--cfg", action="store_true", help="denoiser for two texts an image")
    p.add_argument("--compile", action="store_true", help="torch.compile of both sides")
    p.add_argument("--preset", default="mini", help="of whole restorations (default: %(default)s)")
    p.add_argument("--steps", type=int, help="of whole restorations (default: the preset's)")
    p.add_argument("--count", type=int, default=100, help="pictures of case folder (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="timed calls of each way (default: %(default)s)")
    p.add_argument("--warmup", type=int, default=1, help="untimed calls before (default: %(default)s)")
    p.add_argument("--threads", type=int, help="of a CPU (default: what torch takes)")
    p.add_argument("--memory", type=float, metavar="GB", help="of a GPU, all that may be taken (default: what it has)")
    p.add_argument("--tiny", action="store_true", help="small networks: does everything run?")
    p.add_argument("--json", type=Path, metavar="FILE", help="adds a line for each case to this file")
    return p


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Everything that is known about a case, as it stands in the JSON file."""
    case = CASES[name](args)
    if args.device.type == "cuda":
        torch.cuda.empty_cache()
    with torch.inference_mode(case.inference):
        warmup = 0 if case.own_process else args.warmup
        timings, outputs = interleave(case.runs, args.device, args.repeats, warmup)
    reference = timings.get(case.reference)
    rows = []
    for way, timing in timings.items():
        held = case.weights.get(way, lambda: None)
        row = {"way": way, **vars(timing), "weight_bytes": held()}
        if reference is not None:
            row["ratio"] = reference.seconds / timing.seconds
            row["cpu_ratio"] = reference.cpu_seconds / timing.cpu_seconds
            row["difference"] = difference(outputs[way], outputs[case.reference])
        rows.append(row)
    return {
        "case": name,
        "device": machine.processor(args.device),
        "threads": torch.get_num_threads() if args.device.type == "cpu" else None,
        "precision": args.precision,
        "layout": "channels last",
        "compile": args.compile,
        "batch": case.images,
        "tiny": args.tiny,
        "repeats": args.repeats,
        "versions": machine.versions("torch", "diffusers"),
        "facts": dict(case.facts),
        "flops": case.flops,
        "rows": rows,
    }


@entry_point
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if min(args.batch, args.repeats, args.count) < 1 or args.warmup < 1:
        raise UserError("--batch, --repeats, --warmup and --count must be at least 1")
    args.device = pick_device(args.device)
    if args.threads:
        torch.set_num_threads(args.threads)
    if args.memory and args.device.type == "cuda":
        total = torch.cuda.get_device_properties(args.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, args.memory * 1e9 / total), args.device)
    for name in args.case:
        record = measure(name, args)
        print(report.table(record), flush=True)
        if args.json:
            args.json.parent.mkdir(parents=True, exist_ok=True)
            with args.json.open("a") as file:
                file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    sys.exit(main())
