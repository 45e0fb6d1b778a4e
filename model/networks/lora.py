"""Low-rank adaptation (Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685): W + B A, W frozen."""

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ORIGINAL = ".parametrizations.weight.original"


class LowRank(nn.Module):
    """Adds a trained matrix of low rank to a weight; zero at the start.

    Args:
        weight: (out, in, ...), a linear layer's or a convolution's.
        rank: of the addition.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        outputs, inputs = weight.shape[0], weight[0].numel()
        rank = min(rank, outputs, inputs)
        # In float32 whatever the frozen weight is: small additions would be rounded away.
        self.down = nn.Parameter(torch.empty(rank, inputs, device=weight.device))
        self.up = nn.Parameter(torch.zeros(outputs, rank, device=weight.device))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


def add_lora(network: nn.Module, rank: int) -> nn.Module:
    """Freezes a network and gives every linear layer and convolution an addition of low rank, in place."""
    network.requires_grad_(False)
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    return network


def merged(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state with the additions folded into the weights, under the names that these have without them.

    Exactly the weights that the adapted network computes with.
    """
    adapted = [key.removesuffix(ORIGINAL) for key in state if key.endswith(ORIGINAL)]
    plain = {key: value for key, value in state.items() if ".parametrizations.weight." not in key}
    for layer in adapted:
        weight = state[f"{layer}{ORIGINAL}"]
        down, up = (state[f"{layer}.parametrizations.weight.0.{name}"] for name in ("down", "up"))
        plain[f"{layer}.weight"] = weight + (up @ down).view_as(weight)
    return plain
