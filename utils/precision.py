"""Number formats of networks by name."""

import torch
from torch import nn

from diffbir.utils import choices

PRECISIONS = dict(zip(choices.PRECISIONS, (torch.float32, torch.float16, torch.bfloat16), strict=True))
HALF = (torch.float16, torch.bfloat16)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next((p.dtype for p in module.parameters()), torch.float32)
