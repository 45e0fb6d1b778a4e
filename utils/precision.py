"""Number formats of networks by name."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor, nn

from diffbir.utils import choices

PRECISIONS = dict(zip(choices.PRECISIONS, (torch.float32, torch.float16, torch.bfloat16), strict=True))
HALF = (torch.float16, torch.bfloat16)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)


def full_precision(x: Tensor) -> AbstractContextManager:
    """Where nothing is cast down, on the device of x; there is nothing to cast where a tensor has no values."""
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


@contextmanager
def keeping_precision(*modules: nn.Module) -> Iterator[None]:
    """Turns modules that become float32 inside back at the end; that loses nothing, for every half is a float32."""
    dtypes = [dtype_of(module) for module in modules]
    try:
        yield
    finally:
        for module, dtype in zip(modules, dtypes, strict=True):
            if dtype_of(module) != dtype:
                module.to(dtype)
