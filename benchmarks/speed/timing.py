"""Several ways to compute the same, timed in turns in one process."""

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

PROC = Path("/proc/self")


@dataclass(frozen=True)
class Timing:
    """Medians of one way.

    Args:
        seconds: wall time.
        cpu_seconds: time that the process had a core for, on all threads; other programs disturb it less.
        fastest: least wall time.
        working_bytes: most memory over what was held before the call; None where the system doesn't say.
    """

    seconds: float
    cpu_seconds: float
    fastest: float
    working_bytes: int | None


def interleave(
    runs: Mapping[str, Callable[[], Any]], device: torch.device, repeats: int = 5, warmup: int = 1
) -> tuple[dict[str, Timing], dict[str, Any]]:
    """Every repetition runs each way once, so that whatever else the machine does meets them all.

    Memory is measured in a call of its own, which isn't timed; not without a warm-up.

    Returns:
        Timing by name; what the last warm-up call of each returned, if any, by name.
    """
    outputs, working = {}, {}
    for name, run in runs.items():
        for _ in range(warmup):
            outputs[name] = run()
        working[name] = working_bytes(run, device) if warmup else None
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            synchronize(device)
            start, cpu = time.perf_counter(), time.process_time()
            run()
            synchronize(device)
            times[name].append((time.perf_counter() - start, time.process_time() - cpu))
    timings = {}
    for name, values in times.items():
        wall, cpu = zip(*values, strict=True)
        timings[name] = Timing(statistics.median(wall), statistics.median(cpu), min(wall), working[name])
    return timings, outputs


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def working_bytes(run: Callable[[], Any], device: torch.device) -> int | None:
    """Most memory that a call takes, over what is held before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    if not (PROC / "clear_refs").exists():
        return None
    ctypes.CDLL(None).malloc_trim(0)  # what was freed counts as taken until it is given back
    (PROC / "clear_refs").write_text("5")  # the peak starts anew (proc(5))
    before = status("VmRSS")
    run()
    return max(0, status("VmHWM") - before)


def status(field: str) -> int:
    """Bytes."""
    line = next(line for line in (PROC / "status").read_text().splitlines() if line.startswith(field + ":"))
    return 1024 * int(line.split()[1])


def difference(output: Any, reference: Any) -> float:
    """Largest difference of two nested outputs over the root mean square of the second."""
    pairs = [
        (x.double().cpu(), y.double().cpu())
        for x, y in zip(tree_leaves(output), tree_leaves(reference), strict=True)
        if isinstance(x, Tensor)
    ]
    return max((((x - y).abs().max() / y.square().mean().sqrt()).item() for x, y in pairs), default=0.0)
