"""Attention inside windows and the convolution after a doubling against their plain formulas, with gradients."""

import pytest
import torch
from torch.testing import assert_close

from benchmarks.speed import plain
from diffbir.model.networks import attention, swinir
from diffbir.model.networks.layers import DoublingConv2d


def gradients(output: torch.Tensor, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    weight = torch.linspace(-1, 1, output.numel()).view(output.shape)
    return torch.autograd.grad((output * weight).sum(), inputs)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("device", ["cpu", "others"])
def test_window_attention_is_the_published_formula(masked, device, monkeypatch):
    """Also the way that other devices go, whose fused kernel takes windows for heads."""
    if device == "others":
        monkeypatch.setattr(attention, "has_fused_bias", lambda q: True)
    g = torch.Generator().manual_seed(0)
    qkv = torch.randn(2, 3, 16, 3 * 2 * 5, generator=g, requires_grad=True)
    bias = torch.randn(2, 16, 16, generator=g, requires_grad=True)
    mask = torch.where(torch.rand(3, 16, 16, generator=g) < 0.3, -100.0, 0.0) if masked else None
    ours, published = (f(qkv, 2, bias, mask) for f in (attention.window_attention, plain.window_attention))
    assert_close(ours, published)
    assert_close(gradients(ours, qkv, bias), gradients(published, qkv, bias))


@pytest.mark.parametrize("size", [(1, 1), (5, 8)])
def test_the_convolution_of_a_doubled_image_at_less_cost(size):
    g = torch.Generator().manual_seed(0)
    conv = DoublingConv2d(3, 4)
    x = torch.randn(2, 3, *size, generator=g, requires_grad=True)
    ours, doubled = conv(x), plain.upsample_conv(x, conv)
    assert_close(ours, doubled)
    assert_close(gradients(ours, x, *conv.parameters()), gradients(doubled, x, *conv.parameters()))


def test_the_benchmark_compares_the_same_network():
    """Output and gradients of the straightforward form are those of the network as it is."""
    torch.manual_seed(0)
    net = swinir.SwinIR(embed_dim=24, depths=[2, 2], num_heads=[2, 2], sf=4, unshuffle_scale=4)
    x = torch.rand(1, 3, 64, 96)
    ours = net(x)
    straightforward = plain.PlainSwinIR(net)(x)
    assert_close(ours, straightforward)
    assert_close(
        gradients(ours, *net.parameters()), gradients(straightforward, *net.parameters()), rtol=1e-3, atol=1e-4
    )
