"""Where to compute, and in which precision, where nobody says so."""

import time

import torch
import torch.nn.functional as F

from diffbir.utils.cli import UserError
from diffbir.utils.precision import PRECISIONS


def pick_device(name: str | torch.device) -> torch.device:
    """Resolves 'auto'.

    Raises:
        UserError: the device doesn't exist here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name} is not available here; use --device cpu") from error
    return torch.device(name)


def pick_precision(name: str, device: torch.device) -> str:
    """Resolves 'auto' (fp16 on CUDA, else fp32) and 'fastest' (on a CPU, that is measured); a key of `PRECISIONS`.

    Raises:
        UserError: an unknown precision.
    """
    if name == "fastest" and device.type == "cpu":
        return fastest_on_cpu()
    if name in ("auto", "fastest"):
        return "fp16" if device.type == "cuda" else "fp32"
    if name not in PRECISIONS:
        raise UserError(f"there is no precision '{name}'; give auto, fastest, {', '.join(PRECISIONS)}")
    return name


def fastest_on_cpu(repeats: int = 5) -> str:
    """fp32 or bf16, by the least time of a convolution; a CPU may have instructions for bf16 and yet be slower."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return "fp32"  # bf16 would be emulated
    least = {}
    for name in ("fp32", "bf16"):
        dtype = PRECISIONS[name]
        x = torch.ones(1, 128, 64, 64, dtype=dtype).to(memory_format=torch.channels_last)
        weight = torch.ones(128, 128, 3, 3, dtype=dtype)
        times = []
        with torch.inference_mode():
            for _ in range(1 + repeats):
                start = time.perf_counter()
                F.conv2d(x, weight, padding=1)
                times.append(time.perf_counter() - start)
        least[name] = min(times[1:])
    return min(least, key=least.get)
