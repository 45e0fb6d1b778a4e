"""Layers for inference on a CPU, whose weights lie in the order that oneDNN computes with.

PyTorch brings the weights of a convolution into that order in every call, which takes longer than the convolution
itself where the picture is small (1280 channels at 8x8 positions: three quarters of the time), and its linear layers
use another library, which is slower on many CPUs. These are the operators that `torch.compile` emits.

The layers compute what the originals do up to rounding, and give a gradient for their input as those do. Weights have
their names and values until a layer is first called.
"""

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbir.model.networks import winograd
from diffbir.model.networks.layers import ACTIVATIONS, SLOPE, Conv3x3, DoublingConv2d, interleave, phases
from diffbir.model.networks.unet import GEGLU
from diffbir.utils.precision import dtype_of

OPS = torch.ops.mkldnn
TOLERANCES = {torch.float32: {"rtol": 1e-3, "atol": 1e-4}, torch.bfloat16: {"rtol": 3e-2, "atol": 3e-2}}
WIDE = 1024  # channels
PLAIN = [[1, 1], [1, 1], [1, 1], 1]  # padding, stride, dilation and groups of the usual 3x3 convolution
FUSED = {
    "": ("none", [], ""),
    "gelu": ("gelu", [], "none"),
    "leaky_relu": ("leaky_relu", [SLOPE], ""),
}  # oneDNN's names


@cache
def available(dtype: torch.dtype = torch.float32) -> bool:
    """Whether this torch, on this machine, has the operators and they compute what is expected."""
    if not torch.backends.mkldnn.is_available() or dtype not in TOLERANCES:
        return False
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False  # it would be emulated
    x = torch.linspace(-1, 1, 2048, device="cpu").to(dtype)
    layers = {
        (64, 32): nn.Linear(32, 32, device="cpu", dtype=dtype),
        (1, 32, 8, 8): nn.Conv2d(32, 32, 3, padding=1, device="cpu", dtype=dtype),
    }
    try:
        with torch.no_grad():
            return all(
                torch.allclose(packed(layer)(x.view(shape)), layer(x.view(shape)), **TOLERANCES[dtype])
                for shape, layer in layers.items()
            )
    except (RuntimeError, AttributeError, NotImplementedError):
        return False


class Packed(nn.Module):
    """A layer that keeps its weights as they are until it is first called, and from then on in another order."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
        return self.activated(x, "", **kwargs)

    def replace(self, weight: Tensor) -> None:
        del self.weight
        self.register_buffer("weight", weight)

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        """For another type or place: from the order of the layer."""
        if self.weight.is_mkldnn:
            self.replace(self.weight.to_dense())
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies: their weight lies as it was at first, and they bring it into order themselves."""
        if not self.weight.is_mkldnn:
            return self.__dict__
        return self.__dict__ | {"_buffers": self._buffers | {"weight": self.weight.to_dense()}}


class PackedLinear(Packed):
    """An `nn.Linear`."""

    def activated(self, x: Tensor, activation: str) -> Tensor:
        """See `layers.activated`."""
        if needs_gradient(x):
            return ACTIVATIONS[activation](F.linear(x, self.weight.to_dense(), self.bias))
        if not self.weight.is_mkldnn:
            self.replace(OPS._reorder_linear_weight(self.weight.detach(), None))
        return OPS._linear_pointwise(x, self.weight, self.bias, *FUSED[activation])


class PackedConv2d(Packed):
    """An `nn.Conv2d` padded by zeros; the result is channels last.

    The best order depends on the size of the picture, and with another's a convolution can take twenty times as long:
    so the weights are put in order when a size is new. Where Winograd's algorithm pays, that order is its own.
    """

    def __init__(self, layer: nn.Conv2d):
        super().__init__(layer)
        self.settings = [list(layer.padding), list(layer.stride), list(layer.dilation), layer.groups]
        self.plain = layer.kernel_size == (3, 3) and self.settings == PLAIN and layer.bias is not None
        self.size: tuple[int, ...] = ()  # of the picture and its padding

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> nn.Module:
        self.size = ()
        return super()._apply(fn, *args, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"size": ()}

    def activated(self, x: Tensor, activation: str, padding: Sequence[int] | None = None) -> Tensor:
        """See `layers.activated`; `padding` is another than the layer's own."""
        own, stride, dilation, groups = self.settings
        settings = [list(padding or own), stride, dilation, groups]
        if needs_gradient(x):
            y = F.conv2d(x, self.weight.to_dense(), self.bias, stride, settings[0], dilation, groups)
            return ACTIVATIONS[activation](y)
        if (*x.shape, *settings[0]) != self.size:
            self.size = (*x.shape, *settings[0])
            self.put_in_order(x, settings)
        if not self.weight.is_mkldnn:
            return ACTIVATIONS[activation](winograd.conv2d(x, self.weight, self.bias, settings[0]))
        x = x.contiguous(memory_format=torch.channels_last)
        return OPS._convolution_pointwise(x, self.weight, self.bias, *settings, *FUSED[activation])

    def put_in_order(self, x: Tensor, settings: Sequence[Any]) -> None:
        """Puts the weights in the order that is best for pictures like x."""
        weight = self.weight.detach().to_dense()
        if self.plain and x.dtype == torch.float32 and winograd.pays(x.shape, weight.shape, settings[0]):
            with torch.inference_mode(False):  # gradients may be asked for later
                self.replace(winograd.in_order(weight))
        else:
            self.replace(OPS._reorder_convolution_weight(weight, *settings, list(x.shape)))


class PackedDoublingConv2d(Packed):
    """A `DoublingConv2d` whose four kernels are added up once."""

    def __init__(self, layer: DoublingConv2d):
        super().__init__(layer)
        self.phases = nn.ModuleList()

    def activated(self, x: Tensor, activation: str, padding: Sequence[int] = (1, 1)) -> Tensor:
        """See `layers.activated` and `layers.Conv3x3`."""
        if not self.phases:
            kernels = [kernel for row in phases(self.weight.detach()) for kernel in row]
            self.phases.extend(PackedConv2d(convolution(kernel, self.bias)) for kernel in kernels)
            self.replace(kernels[0].new_empty(0))
        return interleave(phase.activated(x, activation, padding) for phase in self.phases)


class PackedWideDoublingConv2d(PackedConv2d):
    """A `DoublingConv2d` as the convolution of the doubled picture that it is, for one of `WIDE` channels.

    Four kernels of 2x2 take 16/9 of the memory of one of 3x3 (46 MB more for 1280 channels in Stable Diffusion's UNet),
    and where a network is so wide, its picture is too small for the time that they spare to matter.
    """

    def activated(self, x: Tensor, activation: str, padding: Sequence[int] = (1, 1)) -> Tensor:
        """See `layers.activated` and `layers.Conv3x3`."""
        doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
        beyond = 1 - padding[0]  # of two rows that a row of the neighbours has become, one is seen
        return super().activated(doubled[..., beyond : doubled.shape[-2] - beyond, :], activation, padding)


class PackedGEGLU(nn.Module):
    """A `GEGLU` whose halves are layers of their own: the activation costs nothing, and half the memory is enough."""

    def __init__(self, layer: GEGLU):
        super().__init__()
        self.proj, self.halves = layer.proj, nn.ModuleList()

    def forward(self, x: Tensor) -> Tensor:
        if not self.halves:
            pairs = zip(self.proj.weight.chunk(2), self.proj.bias.chunk(2), strict=True)
            self.halves.extend(PackedLinear(linear(weight.detach(), bias.detach())) for weight, bias in pairs)
            del self.proj
        value, gate = self.halves[0](x), self.halves[1].activated(x, "gelu")
        return value * gate if needs_gradient(x) else value.mul_(gate)


def linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    layer.weight, layer.bias = (nn.Parameter(x, requires_grad=False) for x in (weight, bias))
    return layer


def convolution(weight: Tensor, bias: Tensor) -> nn.Conv2d:
    """2x2, padded by one."""
    layer = nn.Conv2d(weight.shape[1], weight.shape[0], 2, padding=1, device="meta")
    layer.weight, layer.bias = nn.Parameter(weight, requires_grad=False), nn.Parameter(bias, requires_grad=False)
    return layer


def needs_gradient(x: Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def packed(layer: nn.Module) -> nn.Module:
    """The layer for inference in place of this one, or itself where there is none or nothing to gain."""
    if type(layer) is nn.Linear:
        return PackedLinear(layer)
    if type(layer) is GEGLU:
        return PackedGEGLU(layer)
    if type(layer) is DoublingConv2d:
        return PackedDoublingConv2d(layer) if layer.in_channels < WIDE else PackedWideDoublingConv2d(layer)
    if type(layer) in (nn.Conv2d, Conv3x3) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
        return PackedConv2d(layer)
    return layer


@torch.no_grad()
def pack(network: nn.Module) -> nn.Module:
    """Replaces the layers of a network on the CPU in place, one by one, so that no weight is there twice for long."""
    if available(dtype_of(network)):
        for name, child in list(network.named_children()):
            new = packed(child)
            setattr(network, name, pack(child) if new is child else new)
    return network
