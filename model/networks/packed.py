"""Layers for inference on a CPU, whose weights lie in the order that oneDNN computes with.

PyTorch brings the weights of a convolution into that order in every call, which takes longer than the convolution
itself where the picture is small (1280 channels at 8x8 positions: three quarters of the time), and its linear layers
use another library, which is slower on many CPUs. These are the operators that `torch.compile` emits.

The layers compute what the originals do up to rounding, and give a gradient for their input as those do.
"""

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbir.model.networks.layers import ACTIVATIONS, SLOPE, DoublingConv2d, interleave, phases

OPS = torch.ops.mkldnn
FUSED = {
    "": ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "leaky_relu": ("leaky_relu", [SLOPE], ""),
}  # oneDNN's names


@cache
def available() -> bool:
    """Whether this torch, on this machine, has the operators and they compute what is expected."""
    if not torch.backends.mkldnn.is_available():
        return False
    x = torch.linspace(-1, 1, 2048, device="cpu")
    layers = {
        (64, 32): nn.Linear(32, 32, device="cpu"),
        (1, 32, 8, 8): nn.Conv2d(32, 32, 3, padding=1, device="cpu"),
    }
    try:
        with torch.no_grad():
            return all(
                torch.allclose(packed(layer)(x.view(shape)), layer(x.view(shape)), rtol=1e-3, atol=1e-4)
                for shape, layer in layers.items()
            )
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


class PackedLinear(nn.Module):
    """An `nn.Linear`."""

    def __init__(self, layer: nn.Linear):
        super().__init__()
        self.register_buffer("weight", OPS._reorder_linear_weight(layer.weight.detach(), None))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(x, "")

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """See `layers.activated`."""
        if needs_gradient(x):
            return ACTIVATIONS[activation](F.linear(x, self.weight.to_dense(), self.bias))
        return OPS._linear_pointwise(x, self.weight, self.bias, *FUSED[activation])


class PackedConv2d(nn.Module):
    """An `nn.Conv2d` padded by zeros; the result is channels last."""

    def __init__(self, layer: nn.Conv2d):
        super().__init__()
        self.shape = [list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups]
        size = [1, layer.in_channels, 64, 64]  # others take the same order
        self.register_buffer("weight", OPS._reorder_convolution_weight(layer.weight.detach(), *self.shape, size))
        self.register_buffer("bias", None if layer.bias is None else layer.bias.detach())

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(x, "")

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """See `layers.activated`."""
        if needs_gradient(x):
            padding, stride, dilation, groups = self.shape
            y = F.conv2d(x, self.weight.to_dense(), self.bias, stride, padding, dilation, groups)
            return ACTIVATIONS[activation](y)
        x = x.contiguous(memory_format=torch.channels_last)
        return OPS._convolution_pointwise(x, self.weight, self.bias, *self.shape, *FUSED[activation])


class PackedDoublingConv2d(nn.Module):
    """A `DoublingConv2d` whose four kernels are added up once."""

    def __init__(self, layer: DoublingConv2d):
        super().__init__()
        self.layers = nn.ModuleList()
        for row in phases(layer.weight):
            for weight in row:
                phase = nn.Conv2d(layer.in_channels, layer.out_channels, 2, padding=1, device="meta")
                phase.weight, phase.bias = nn.Parameter(weight), layer.bias
                self.layers.append(PackedConv2d(phase))

    def forward(self, x: Tensor) -> Tensor:
        return self.activated(x, "")

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """See `layers.activated`."""
        outputs = [layer.activated(x, activation) for layer in self.layers]
        return interleave([outputs[:2], outputs[2:]])


def needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def packed(layer: nn.Module) -> nn.Module:
    """The layer for inference in place of this one, or itself where there is none or nothing to gain."""
    if type(layer) is nn.Linear:
        return PackedLinear(layer)
    if type(layer) is DoublingConv2d:
        return PackedDoublingConv2d(layer)
    if type(layer) is nn.Conv2d and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return PackedConv2d(layer)
    return layer


@torch.no_grad()
def pack(network: nn.Module) -> nn.Module:
    """Replaces the layers of a network on the CPU in place, one by one, so that no weight is there twice for long."""
    if not available():
        return network
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            new = packed(child)
            if new is not child:
                setattr(module, name, new)
    return network
