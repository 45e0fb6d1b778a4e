"""What a benchmark ran on, for the line below its table."""

import platform
from pathlib import Path

import torch

from diffbir.utils.versions import versions as installed

CPUINFO = Path("/proc/cpuinfo")


def processor(device: str | torch.device = "cpu") -> str:
    """Name of a GPU, or of the CPU as far as the system tells it."""
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    lines = CPUINFO.read_text().splitlines() if CPUINFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def threads() -> str:
    return f"{torch.get_num_threads()} threads"


def versions(*packages: str) -> str:
    """`torch 2.14.1, numpy 2.3.0`, as installed."""
    return ", ".join(f"{name} {version}" for name, version in installed(packages).items())
