"""Low-rank adaptation (Hu et al. 2021, LoRA, https://arxiv.org/abs/2106.09685): W + B A, W frozen."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

ORIGINAL = ".parametrizations.weight.original"
DOWN, UP = ".lora_A.weight", ".lora_B.weight"  # of a layer, in files: the names that PEFT gives A and B


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

    @torch.no_grad()
    def begin(self, down: Tensor, up: Tensor) -> None:
        """Begins a new addition with this one, (rank, inputs) and (outputs, rank), or its best approximation."""
        down, up = approximation(down, up, len(self.down))
        self.down[: len(down)], self.up[:, : len(down)] = down, up


def approximation(down: Tensor, up: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of this rank to B A, A `down` (r, inputs) and B `up` (outputs, r); itself if r <= rank."""
    return (down, up) if len(down) <= rank else factorized(up @ down, rank)


def factorized(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of this rank, at most, to a matrix (outputs, inputs), as factors A and B."""
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    root = s[:rank].sqrt()
    return root[:, None] * v[:rank], u[:, :rank] * root


def add_lora(network: nn.Module, rank: int) -> nn.Module:
    """Freezes a network and gives every linear layer and convolution an addition of low rank, in place."""
    network.requires_grad_(False)
    layers = [m for m in network.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    return network


def begin_lora(network: nn.Module, additions: Mapping[str, Tensor]) -> nn.Module:
    """Lets the additions of an adapted network begin with these, in place; see `LowRank.begin`.

    Args:
        additions: see `factors`.

    Raises:
        ValueError: a key that is of no adapted layer, lacks its partner, or has another shape.
    """
    own = {n: m.parametrizations.weight for n, m in network.named_modules() if parametrize.is_parametrized(m, "weight")}
    for name, (down, up) in pairs(additions, network, {n: weight.original for n, weight in own.items()}).items():
        own[name][0].begin(down, up)
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


def factors(state: Mapping[str, Tensor], network: nn.Module) -> dict[str, Tensor]:
    """The additions alone, as files hold them: `<layer>.lora_A.weight` (rank, in, ...) and `<layer>.lora_B.weight`.

    Args:
        state: of the adapted `network`.
    """
    found = {}
    for name, layer in network.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            down, up = (state[f"{name}.parametrizations.weight.0.{part}"] for part in ("down", "up"))
            kernel = layer.weight.shape[2:]
            found[name + DOWN] = down.reshape(len(down), layer.weight.shape[1], *kernel)
            found[name + UP] = up.reshape(*up.shape, *(1 for _ in kernel))
    return found


@torch.no_grad()
def merge_lora(network: nn.Module, additions: Mapping[str, Tensor], scale: float = 1.0) -> nn.Module:
    """Adds scale x B A to the weights of a network, in place; computed in float32, kept in the weights' own type.

    Args:
        additions: see `factors`.

    Raises:
        ValueError: a key that is of no layer of the network, lacks its partner, or has another shape.
    """
    layers = {name: m.weight for name, m in network.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    joint = {name: m for name, m in network.named_modules() if isinstance(m, nn.MultiheadAttention)}
    layers |= {f"{name}.in_proj": m.in_proj_weight for name, m in joint.items()}  # its three projections
    for name, (down, up) in pairs(additions, network, layers).items():
        weight = layers[name]
        weight.copy_(weight.float() + scale * (up @ down).view_as(weight))
    return network


def pairs(
    additions: Mapping[str, Tensor], network: nn.Module, weights: Mapping[str, Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """Layer -> both of its factors, as float32 matrices that fit its weight: (rank, inputs) and (outputs, rank)."""
    found = {}
    for name in sorted({key.removesuffix(DOWN).removesuffix(UP) for key in additions}):
        if name not in weights or name + DOWN not in additions or name + UP not in additions:
            raise ValueError(f"'{name}' is no layer of {type(network).__name__}, or not both of its factors are there")
        weight = weights[name]
        down, up = additions[name + DOWN].float().flatten(1), additions[name + UP].float().flatten(1)
        if (up.shape[0], down.shape[1]) != weight.flatten(1).shape or up.shape[1] != down.shape[0]:
            shapes = f"{tuple(up.shape)} x {tuple(down.shape)}"
            raise ValueError(f"the factors of '{name}', {shapes}, do not fit its weight, {tuple(weight.shape)}")
        found[name] = down, up
    return found
