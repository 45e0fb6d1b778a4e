"""Fully sharded data parallel training (FSDP2, Zhao et al. 2023, https://arxiv.org/abs/2304.11277).

Every rank keeps its share of what is trained: weights, gradients, optimizer state and average. Checkpoints and exported
weights are whole, the same as those of one process.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.strategies import ModelParallelStrategy
from pytorch_lightning.strategies.parallel import ParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map_only

from diffbir.utils.cli import UserError

ON_CPU = torch.__version__ >= "2.9"  # earlier, streams are missing (2.6), or gloo sums where it should average


def shard(network: nn.Module, mesh: DeviceMesh, gather: torch.dtype | None = None) -> None:
    """Spreads a network over the ranks of a mesh, in place; its blocks are gathered one after the other.

    Parameters keep their names and become `DTensor`s.

    Args:
        gather: type in which the others' shares are fetched and computed with; None is their own.
    """
    network.to(memory_format=torch.contiguous_format)  # shards are rows of the first dimension
    # Gradients are summed in float32 all the same; inputs are left to autocast.
    policy = MixedPrecisionPolicy(param_dtype=gather, reduce_dtype=torch.float32, cast_forward_inputs=False)
    options = {"mesh": mesh, "mp_policy": policy if gather else MixedPrecisionPolicy()}
    for blocks in network.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                fully_shard(block, **options)
    fully_shard(network, **options)
    for method in getattr(network, "entry_points", ()):
        register_fsdp_forward_method(network, method)


def whole(tree: Any) -> Any:
    """Gathers the sharded tensors of nested containers; all ranks must call it."""
    return tree_map_only(DTensor, lambda x: x.full_tensor(), tree)


def local(x: Tensor) -> Tensor:
    """This rank's share of a sharded tensor; any other as it is."""
    return x.to_local() if isinstance(x, DTensor) else x


def sharded_like(value: Tensor, reference: Tensor) -> Tensor:
    """A whole tensor that all ranks hold -> spread like the reference, or as it is if that is whole."""
    if isinstance(value, DTensor) or not isinstance(reference, DTensor):
        return value
    return distribute_tensor(value.to(reference.device), reference.device_mesh, reference.placements)


class FSDP(ModelParallelStrategy):
    """Shards what is trained over all ranks; frozen networks stay whole on each of them.

    Args:
        gather: 'bf16' fetches weights in half the bytes, for bf16-mixed precision, which rounds most of them anyway;
            what every rank keeps, and the optimizer, stay float32.

    Raises:
        UserError: on CPUs with a torch that adds gradients up there instead of averaging them (before 2.9).
    """

    def __init__(self, gather: str | None = None, **kwargs: Any):
        if gather not in (None, "bf16"):
            raise UserError(f"trainer.params.strategy: gather must be bf16 or null, not '{gather}'")
        self.gather = torch.bfloat16 if gather else None
        super().__init__(tensor_parallel_size=1, save_distributed_checkpoint=False, **kwargs)

    def setup_environment(self) -> None:
        if self.root_device.type == "cpu" and not ON_CPU:
            raise UserError("trainer.params.strategy: sharded training on CPUs needs torch 2.9 or newer; take ddp")
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    # Lightning gathers optimizer state by names; ours, like that of one process, is by number.
    lightning_restore_optimizer = True
    restore_checkpoint_after_setup = False

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return whole(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return whole(optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        own = self.lightning_module.state_dict()
        state = {k: sharded_like(v, own[k]) for k, v in checkpoint["state_dict"].items()}
        self.lightning_module.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {
                    k: sharded_like(v, p) if isinstance(v, Tensor) and v.shape == p.shape else v
                    for k, v in saved["state"].get(number, {}).items()
                }
                for number, p in enumerate(parameters)
            }
            optimizer.load_state_dict({**saved, "state": state})
