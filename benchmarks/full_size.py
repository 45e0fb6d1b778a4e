"""Runs a full-size preset on this machine with randomly filled files of the published layouts: does the whole path
work, how long does it take and how much memory does it need? The pictures mean nothing.

Files are written once into --folder (about 7 GB) and used again.
"""

import math
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments, machine
from diffbir.model.build import weight_files
from diffbir.model.presets import load_preset
from diffbir.model.weights.places import ROLES
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import ROOT, instantiate

STATUS = Path("/proc/self/status")
POOL = 2**20 + 7  # normal numbers; not a multiple of any width
CHILD = """
import sys, inference
code = inference.main(sys.argv[1:])
print("peak", open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
sys.exit(code)
"""


def random_state(network: torch.nn.Module, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights that keep the size of activations about constant; large ones repeat themselves, which saves time."""
    state, drawn = {}, torch.randn(POOL, generator=generator)
    for key, value in network.state_dict().items():
        fan_in = math.prod(value.shape[1:]) if value.ndim > 1 else 1
        shift = int(torch.randint(POOL, (), generator=generator))
        noise = drawn.roll(shift).repeat(-(-value.numel() // POOL))[: value.numel()].view(value.shape)
        if value.ndim > 1:
            state[key] = noise / fan_in**0.5
        else:
            state[key] = 1 + 0.1 * noise if key.endswith("weight") else 0.02 * noise
    return state


def write_files(config, folder: Path, dtype: torch.dtype) -> list[str]:
    """Writes what the preset's `weights` name into the folder; returns the overrides that point there."""
    generator, overrides = torch.Generator().manual_seed(0), []
    files: dict[str, list[str]] = {}
    for name, path in weight_files(config).items():
        files.setdefault(Path(path).name, []).append(name)
        overrides.append(f"weights.{name}={folder / Path(path).name}")
    for file, names in tqdm(files.items(), unit="file", desc="writing"):
        if (folder / file).exists():
            continue
        state = {}
        for name in names:
            with torch.device("meta"):
                network = instantiate(config.networks[name])
            prefix = ROLES[name] if len(names) > 1 else ""
            state |= {prefix + k: v.to(dtype) for k, v in random_state(network, generator).items()}
        part = folder / f".{file}.part"
        torch.save({"state_dict": state}, part)
        part.rename(folder / file)
    return overrides


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    p.add_argument("--folder", type=Path, default=Path("outputs/full_size"), help="of files (default: %(default)s)")
    p.add_argument("--preset", default="v2", help="(default: %(default)s)")
    p.add_argument("--task", help="(default: the preset's first)")
    p.add_argument("--size", type=int, default=512, help="side of the image (default: %(default)s)")
    p.add_argument("--steps", type=int, default=2, help="(default: %(default)s)")
    p.add_argument("--device", default="auto", help="(default: %(default)s)")
    p.add_argument("--precision", default="auto", help="(default: %(default)s)")
    p.add_argument("--half-files", action="store_true", help="write float16 files, half as large")
    args = p.parse_args(argv)
    if not STATUS.exists():
        raise UserError("the peak of memory is read from /proc, which only Linux has")

    folder = args.folder.resolve()
    (folder / "in").mkdir(parents=True, exist_ok=True)
    overrides = write_files(
        load_preset(args.preset, args.task), folder, torch.float16 if args.half_files else torch.float32
    )
    pixels = np.random.default_rng(0).integers(0, 256, (args.size, args.size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "in" / "noise.png")
    command = ["--input", folder / "in", "--output", folder / "out", "--preset", args.preset, "--steps", args.steps]
    command += ["--task", args.task] if args.task else []
    command += ["--device", args.device, "--precision", args.precision, "--min-side", "0", *overrides]
    start = time.perf_counter()
    run = subprocess.run(
        [sys.executable, "-c", CHILD, *map(str, command)], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    seconds = time.perf_counter() - start
    peak = int(run.stdout.rpartition("peak ")[2]) / 1e6
    print(f"{args.preset}, {args.size} x {args.size}, {args.steps} steps, {args.precision} on {args.device}: ", end="")
    print(f"{seconds:.0f} s in all, peak of {peak:.1f} GB main memory; {machine.versions('torch')}")


if __name__ == "__main__":
    sys.exit(main())
