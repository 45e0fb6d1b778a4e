"""Runs every case that a GPU is for, one process after the other, within a limit of time.

What matters most comes first; what finds no time any more is named. Writes results.json and performance.md after each.
Processes are forked from one that has imported everything, which would otherwise take each of them ten seconds.
"""

import json
import multiprocessing
import os
import runpy
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import arguments
from benchmarks.speed import report
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import ROOT

SHORTEST = 10  # seconds: nothing is begun with less


@dataclass(frozen=True)
class Item:
    """A process.

    Args:
        title: what it shows.
        command: its arguments after `python`.
        seconds: what it may take.
    """

    title: str
    command: Sequence[str]
    seconds: int = 60


@dataclass
class Outcome:
    """What became of an item.

    Args:
        status: 'passed', 'failed', 'out of time' or 'not begun'.
        records: of the runner.
        output: its last lines, where it failed.
    """

    title: str
    command: str
    status: str
    seconds: float = 0.0
    records: list[dict[str, Any]] = field(default_factory=list)
    output: str = ""


def plan(device: str, tiny: bool, folder: Path) -> Iterator[Item]:
    """The most important first."""

    def timed(title: str, flags: str, seconds: int = 60) -> Item:
        if tiny:  # on a CPU, compilation takes a minute whatever the size, and fp16 many times as long as float32
            flags = flags.replace(" --compile", "").replace("fp16", "fp32")
        common = [
            "--device",
            device,
            *(["--tiny", "--repeats", "1"] if tiny else []),
            "--json",
            str(folder / "item.json"),
        ]
        return Item(title, ["-m", "benchmarks.speed", *common, "--case", *flags.split()], seconds)

    yield timed("what the machine reaches", "peak --precision bf16 --repeats 10", 40)
    yield timed("denoiser, batch 8, compiled", "denoiser --precision bf16 --batch 8 --compile --warmup 3", 150)
    yield timed("half precision against float32", "halves", 60)
    yield timed("SwinIR", "swinir --precision bf16 --batch 8", 40)
    yield timed("512x512 in 6 GB", "restore --preset v2.1 --precision fp16 --memory 6 --repeats 1 --steps 10", 60)
    yield timed("4K in 8 GB", "large --preset v2.1 --precision fp16 --memory 8 --repeats 1 --steps 2", 90)
    for name, strategy in (("DDP", "ddp"), ("FSDP", "{target: model.training.sharding.FSDP}")):
        yield Item(f"{name} on one card", training(device, strategy, folder / name.lower()), 60)
    yield timed("training step, stage 2", "train_stage2 --precision bf16 --batch 4 --repeats 3", 90)
    yield timed("training step, stage 1", "train_stage1 --precision bf16 --batch 8 --repeats 3", 60)
    yield timed("denoiser, batch 1", "denoiser --precision bf16", 60)
    yield timed("denoiser, guided", "denoiser --precision bf16 --cfg", 60)
    yield timed("SwinIR, compiled", "swinir --precision bf16 --batch 8 --compile --warmup 3", 90)
    yield timed("autoencoder", "encode decode --precision bf16 --size 1024" if not tiny else "encode decode", 60)
    yield timed("whole restorations", "restore --precision fp16", 40)
    yield timed("4K, embedded model", "large --precision fp16 --repeats 2", 40)
    yield timed("start-up and a folder", "start folder --precision fp16 --repeats 1", 90)


def training(device: str, strategy: str, run_dir: Path) -> list[str]:
    """Three steps of stage 2 of the embedded model through the training script."""
    settings = {
        "photos": "inputs/demo",
        "val_photos": "inputs/demo",
        "run_dir": run_dir,
        "validate_every": 3,
        "checkpoint_every": 3,
        "crop_size": 64,
        "data.params.batch_size": 2,
        "data.params.num_workers": 0,
        "data.params.val.params.limit": 1,
        "trainer.params.max_steps": 3,
        "trainer.params.devices": 1,
        "trainer.params.accelerator": "gpu" if device.startswith("cuda") else "cpu",
        "trainer.params.strategy": strategy,
        "weights.stage1": "weights/mini/stage1.safetensors",
        "weights.autoencoder": "weights/mini/autoencoder.safetensors",
        "weights.unet": "weights/mini/unet.safetensors",
    }
    values = [f"{key}={value}" for key, value in settings.items()]
    return ["train_stage2.py", "--config", "configs/train/mini/stage2.yaml", *values]


def run_command(command: Sequence[str], output: Path) -> None:
    """As `python` with these arguments would, from the checkout; what it writes goes into a file."""
    os.setsid()  # what it starts can be ended along with it
    os.chdir(ROOT)
    with output.open("w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    first, *rest = command
    if first == "-m":
        sys.argv = rest
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(command)
        runpy.run_path(first, run_name="__main__")


def carry_out(item: Item, seconds: float, folder: Path) -> Outcome:
    file, output = folder / "item.json", folder / "item.log"
    file.unlink(missing_ok=True)
    outcome = Outcome(item.title, " ".join(("python", *item.command)), "passed")
    processes = multiprocessing.get_context("forkserver")
    processes.set_forkserver_preload(["benchmarks.speed.__main__", "diffbir.model.training.command"])
    process = processes.Process(target=run_command, args=(item.command, output))
    process.start()
    start = time.monotonic()
    try:
        process.join(seconds)
        if process.exitcode is None:
            outcome.status = "out of time"
        elif process.exitcode:
            outcome.status, outcome.output = "failed", output.read_text()[-2000:]
    finally:
        if process.exitcode is None:
            with suppress(ProcessLookupError):  # before it has a group of its own
                os.killpg(process.pid, signal.SIGKILL)
            process.kill()
            process.join()
    outcome.seconds = time.monotonic() - start
    output.unlink(missing_ok=True)
    if file.exists():
        outcome.records = [json.loads(line) for line in file.read_text().splitlines()]
        file.unlink()
    return outcome


def markdown(outcomes: Sequence[Outcome]) -> str:
    lines = ["| | | s |", "|---|---|---|"]
    lines += [f"| {o.title} | {o.status} | {o.seconds:.0f} |" for o in outcomes]
    tables = [report.table(record) for o in outcomes for record in o.records]
    failures = [f"\n{o.title} failed:\n\n```\n{o.output}\n```" for o in outcomes if o.status == "failed"]
    return "\n".join([*lines, *tables, *failures]) + "\n"


@entry_point
def main(argv: Sequence[str] | None = None) -> int:
    p = arguments.parser(__doc__)
    p.add_argument("--output", type=Path, required=True, help="folder for results.json and performance.md")
    p.add_argument("--device", default="cuda", help="(default: %(default)s)")
    p.add_argument("--minutes", type=float, default=10, help="in all (default: %(default)s)")
    p.add_argument("--tiny", action="store_true", help="a rehearsal with small networks")
    p.add_argument("--only", nargs="+", metavar="TITLE", help="items whose titles begin so")
    args = p.parse_args(argv)
    folder = args.output.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    items = list(plan(args.device, args.tiny, folder))
    if args.only:
        items = [item for item in items if item.title.startswith(tuple(args.only))]
    if not items:
        raise UserError(f"--only {' '.join(args.only)}: no item's title begins so")
    end, outcomes = time.monotonic() + 60 * args.minutes, []
    for item in items:
        left = end - time.monotonic()
        if left < SHORTEST:
            outcomes.append(Outcome(item.title, " ".join(("python", *item.command)), "not begun"))
        else:
            outcomes.append(carry_out(item, left if args.tiny else min(left, item.seconds), folder))
        print(f"{outcomes[-1].status:<12} {outcomes[-1].seconds:5.0f} s  {item.title}", flush=True)
        (folder / "results.json").write_text(json.dumps([asdict(o) for o in outcomes], indent=1))
        (folder / "performance.md").write_text(markdown(outcomes))
    return int(any(o.status == "failed" for o in outcomes))


if __name__ == "__main__":
    sys.exit(main())
