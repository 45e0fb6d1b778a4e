"""The most memory that a preset takes, by size of the picture, precision and offload: each in a process of its own.

On a GPU, what tensors take there. On a CPU, what the process takes, Python and torch (some 0.4 GB) included; --offload
changes nothing there. Weights that aren't at hand can be random (--random FOLDER, which they are written to): memory is
the same, the pictures mean nothing.

Example:
    python benchmarks/peak_memory.py --sizes 256 512 1024 --precisions fp32 bf16
"""

import itertools
import subprocess
import sys
from pathlib import Path

import torch
from omegaconf import DictConfig

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments, machine
from benchmarks.full_size import STATUS, write_files
from diffbir.model.presets import load_preset
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import ROOT, instantiate
from diffbir.utils.device import pick_device
from diffbir.utils.precision import PRECISIONS

CHILD = """
import sys, torch
from diffbir.model.restorer import Restorer
preset, device, precision, offload, size, steps, *overrides = sys.argv[1:]
restorer = Restorer.from_preset(preset, device, precision, offload=offload == "True", overrides=overrides)
restorer.restore(torch.rand(1, 3, int(size), int(size)), restorer.options(steps=int(steps), min_side=0))
if device.startswith("cuda"):
    print(torch.cuda.max_memory_allocated(device))
else:  # the kernel's other figure, that of getrusage, begins with what the process had that started this one
    print(int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024)
"""


def sizes_of_weights(config: DictConfig) -> dict[str, int]:
    """Number of weights of each network, without making one."""
    with torch.device("meta"):
        networks = {name: instantiate(node) for name, node in config.networks.items() if node is not None}
    return {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}


def peak(*settings: object) -> str:
    """GB of one restoration; a dash where it fails, such as for lack of memory."""
    run = subprocess.run([sys.executable, "-c", CHILD, *map(str, settings)], cwd=ROOT, capture_output=True, text=True)
    if run.returncode:
        print(run.stderr.strip().splitlines()[-1:] or run.returncode, file=sys.stderr)
        return "-"
    return f"{int(run.stdout.split()[-1]) / 1e9:.2f}"


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    arguments.add_preset(p)
    p.add_argument("--sizes", nargs="+", type=int, default=[256, 512, 1024, 2048], help="sides (default: %(default)s)")
    p.add_argument("--precisions", nargs="+", choices=list(PRECISIONS), default=["fp32", "bf16"])
    p.add_argument("--steps", type=int, default=1, help="memory doesn't depend on them (default: %(default)s)")
    p.add_argument("--device", default="auto", help="(default: %(default)s)")
    p.add_argument("--random", type=Path, metavar="FOLDER", help="random weights, written there in half precision")
    args = p.parse_args(argv)

    device = pick_device(args.device)
    if device.type != "cuda" and not STATUS.exists():
        raise UserError("the peak of memory is read from /proc, which only Linux has")
    config = load_preset(args.preset, overrides=args.overrides)
    overrides = list(args.overrides)
    if args.random:
        args.random.mkdir(parents=True, exist_ok=True)
        overrides += write_files(config, args.random.resolve(), torch.float16)
    weights = sizes_of_weights(config)
    for precision in args.precisions:
        gigabytes = {name: n * PRECISIONS[precision].itemsize / 1e9 for name, n in weights.items()}
        largest = max(gigabytes, key=gigabytes.get)
        total = sum(gigabytes.values())
        print(f"weights in {precision}: {total:.2f} GB; the largest, {largest}: {gigabytes[largest]:.2f}")
    offloads = [False] if device.type == "cpu" else [False, True]
    columns = list(itertools.product(args.precisions, offloads))
    titles = [precision + (", --offload" if offload else "") for precision, offload in columns]
    print(f"\n| GB | {' | '.join(titles)} |\n|---|{'---|' * len(titles)}")
    for size in args.sizes:
        row = [peak(args.preset, device, *column, size, args.steps, *overrides) for column in columns]
        print(f"| {size}x{size} | {' | '.join(row)} |", flush=True)
    print(f"\n{args.preset}, {machine.processor(device)}, {machine.versions('torch')}")


if __name__ == "__main__":
    sys.exit(main())
