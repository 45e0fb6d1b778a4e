"""How much a training step computes, and how much the device could."""

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from diffbir.model.training.base import Trainable

log = logging.getLogger(__name__)

# Matrix products in bf16 without sparsity, TFLOP/s, from the makers' data sheets; the first name that fits counts.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.4,
    "H100 PCIe": 756.0,
    "H100": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "A40": 149.7,
    "A10": 125.0,
    "4090": 165.2,
    "3090": 71.0,
}


def peak(device: torch.device) -> float | None:
    """FLOP/s of a GPU in bf16, if it is known."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((1e12 * value for key, value in PEAKS.items() if key in name), None)


def on_meta(module: Trainable) -> Trainable:
    """A copy without values: shapes and types only. To be made before the weights are sharded."""
    memo: dict[int, Any] = {id(module._trainer): None}  # not to be copied along
    for p in module.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in module.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(module, memo)


def count_flops(twin: Trainable, batch: dict[str, Any]) -> int | None:
    """Floating-point operations of the loss of a batch and its gradient, a multiplication and an addition each.

    Counted from shapes on the meta device, without computing. None, said, where a step depends on values.

    Args:
        twin: see `on_meta`.
    """
    twin.log = twin.log_dict = lambda *args, **kwargs: None
    batch = tree_map_only(Tensor, lambda x: torch.empty_like(x, device="meta"), batch)
    try:
        with FlopCounterMode(display=False) as counter, torch.random.fork_rng():
            output = twin.training_step(batch, 0)
            (output["loss"] if isinstance(output, dict) else output).backward()
    except (NotImplementedError, RuntimeError) as error:
        log.info("TFLOP/s aren't logged, for a step can't be counted without computing it: %s", str(error)[:200])
        return None
    return counter.get_total_flops()
