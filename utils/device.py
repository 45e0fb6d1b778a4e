"""Where to compute, and in which precision, where nobody says so."""

import torch

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
    """Resolves 'auto': fp16 on CUDA and fp32 elsewhere; a key of `PRECISIONS`.

    Raises:
        UserError: an unknown precision.
    """
    if name == "auto":
        return "fp16" if device.type == "cuda" else "fp32"
    if name not in PRECISIONS:
        raise UserError(f"there is no precision '{name}'; give auto, {', '.join(PRECISIONS)}")
    return name
