"""Packed layers compute what the originals do, keep their keys, and leave gradients and other types alone."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffbir.model.build import for_inference
from diffbir.model.networks import packed, winograd
from diffbir.model.networks.layers import Conv3x3, DoublingConv2d
from diffbir.model.networks.swinir import SwinIR
from diffbir.model.networks.unet import GEGLU, UNet

pytestmark = pytest.mark.skipif(not packed.available(), reason="torch without oneDNN's operators")
LAYERS = {
    "linear": (nn.Linear(24, 40), (2, 7, 24)),
    "without bias": (nn.Linear(24, 40, bias=False), (2, 24)),
    "3x3": (nn.Conv2d(24, 40, 3, padding=1), (2, 24, 9, 6)),
    "strips": (Conv3x3(24, 40), (2, 24, 9, 6)),
    "1x1": (nn.Conv2d(24, 40, 1), (2, 24, 9, 6)),
    "stride": (nn.Conv2d(24, 40, 3, stride=2, padding=1), (1, 24, 9, 6)),
    "groups": (nn.Conv2d(24, 48, 3, padding=1, groups=2), (1, 24, 9, 6)),
    "gated": (GEGLU(24, 40), (2, 7, 24)),
    "doubling": (DoublingConv2d(24, 40), (2, 24, 9, 6)),
    "wide doubling": (DoublingConv2d(packed.WIDE, 8), (1, packed.WIDE, 3, 2)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_packed_layer_computes_the_same(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    new = packed.packed(layer)
    assert type(new) is not type(layer)
    with torch.inference_mode():
        assert_close(new(x), layer(x), rtol=1e-4, atol=1e-5)
        if x.ndim == 4:  # other sizes and layouts than the one that it was packed for
            larger = torch.randn(1, x.shape[1], 33, 70).to(memory_format=torch.channels_last)
            assert_close(new(larger), layer(larger), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not packed.available(torch.bfloat16), reason="a CPU without bf16")
@pytest.mark.parametrize("name", ["strips", "doubling", "wide doubling"])
def test_strips_with_a_row_of_their_neighbours(name):
    layer, shape = LAYERS[name]
    x, new = torch.randn(shape), packed.packed(layer)
    with torch.inference_mode():
        strip = nn.functional.pad(x, (0, 0, 1, 1))
        for _ in range(2):
            assert_close(new(strip, padding=(0, 1)), layer(strip, padding=(0, 1)), rtol=1e-4, atol=1e-5)
            assert_close(new(x), layer(strip, padding=(0, 1)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("size, rows", [((1, 32, 32), None), ((3, 34, 40), 4), ((5, 32, 34), 1000)])
def test_wide_convolutions_by_winograd_are_exact(size, rows, monkeypatch):
    """In one block, in blocks of rows of which the last is smaller, and in blocks of images; against float64."""
    n, H, W = size
    if rows is not None:
        monkeypatch.setattr(winograd, "BLOCK", 16 * 256 * rows * W // 4)
    layer = nn.Conv2d(256, 256, 3, padding=1)
    x = torch.randn(n, 256, H, W)
    new = packed.packed(layer)
    with torch.inference_mode():
        exact = copy.deepcopy(layer).double()(x.double())
        error = (new(x) - exact).std() / exact.std()
        assert not new.weight.is_mkldnn and error < 1e-6
        assert torch.equal(new.weight, layer.weight)
        assert error < 2 * (layer(x) - exact).std() / exact.std() + 1e-7
        assert_close(copy.deepcopy(new)(x), new(x), rtol=0, atol=0)
        odd = torch.randn(1, 256, 33, 35)  # another size, in oneDNN's order
        assert_close(new(odd), layer(odd), rtol=1e-4, atol=1e-5)
        assert new.weight.is_mkldnn and not winograd.pays(odd.shape, layer.weight.shape)
        assert_close(new(x), layer(x), rtol=1e-4, atol=1e-5)
        strip = nn.functional.pad(x, (0, 0, 1, 1))
        assert_close(new(strip, padding=(0, 1)), layer(x), rtol=1e-4, atol=1e-5)
        assert not new.weight.is_mkldnn
    x.requires_grad_()
    (ours,) = torch.autograd.grad(new(x).square().sum(), x)
    (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
    assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "kind", [{"stride": 2}, {"padding": 2}, {"padding": 2, "dilation": 2}, {"groups": 2}, {"bias": False}]
)
def test_other_wide_convolutions_stay_direct(kind):
    layer = nn.Conv2d(512, 512, 3, **{"padding": 1, **kind})
    x = torch.randn(1, 512, 32, 32)
    new = packed.packed(layer)
    with torch.inference_mode():
        assert_close(new(x), layer(x), rtol=1e-4, atol=1e-5)
    assert new.weight.is_mkldnn


@pytest.mark.skipif(not packed.available(torch.bfloat16), reason="a CPU without bf16")
def test_wide_convolutions_in_bf16_stay_direct():
    layer, x = nn.Conv2d(256, 256, 3, padding=1), torch.randn(1, 256, 32, 32)
    new = packed.packed(copy.deepcopy(layer))
    with torch.inference_mode():
        assert_close(new(x), layer(x), rtol=1e-4, atol=1e-5)
        assert_close(new.bfloat16()(x.bfloat16()).float(), layer(x), rtol=0.05, atol=0.05)
        assert new.weight.is_mkldnn


@pytest.mark.parametrize("name", LAYERS)
def test_in_bf16_too_and_back_in_float32(name):
    layer, shape = LAYERS[name]
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    new = packed.packed(copy.deepcopy(layer).bfloat16())
    with torch.inference_mode():
        expected = layer(x)
        assert_close(new(x.bfloat16()).float(), expected, rtol=0.05, atol=0.05)
        rounded = copy.deepcopy(layer).bfloat16().float()
        assert_close(new.float()(x), rounded(x), rtol=0.02, atol=0.02)  # sums of kernels were rounded, too


def test_a_gradient_is_that_of_the_original():
    for layer, shape in LAYERS.values():
        x = torch.randn(shape, requires_grad=True)
        (ours,) = torch.autograd.grad(packed.packed(layer)(x).square().sum(), x)
        (theirs,) = torch.autograd.grad(layer(x).square().sum(), x)
        assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "make, inputs",
    [
        (
            lambda: UNet(
                model_channels=32,
                channel_mult=[1, 2],
                num_res_blocks=1,
                head_channels=16,
                norm_groups=8,
                context_dim=16,
            ),
            lambda: (torch.randn(2, 4, 8, 12), torch.tensor([3, 900]), torch.randn(2, 5, 16)),
        ),
        (
            lambda: SwinIR(embed_dim=24, depths=[2, 2], num_heads=[2, 2], sf=4, unshuffle_scale=4),
            lambda: (torch.rand(1, 3, 40, 64),),
        ),
    ],
    ids=["unet", "swinir"],
)
def test_a_network_for_inference_computes_the_same(make, inputs):
    torch.manual_seed(0)
    network, x = make(), inputs()
    for p in network.parameters():
        nn.init.normal_(p, std=0.1)
    with torch.inference_mode():
        before, state = network(*x), network.state_dict()
        for_inference(network, "cpu")
        assert network.state_dict().keys() == state.keys()  # until it runs
        assert all(torch.equal(value, state[key]) for key, value in network.state_dict().items())
        assert_close(network(*x), before, rtol=1e-3, atol=1e-4)
        assert not any(type(module) in (nn.Linear, nn.Conv2d) for module in network.modules())
        assert_close(copy.deepcopy(network)(*x), network(*x))


def test_only_what_allows_it_is_packed():
    """Networks of others may read the weights of their layers; fp16 has no such operators."""
    other = nn.Sequential(nn.Linear(8, 8))
    assert type(for_inference(other, "cpu")[0]) is nn.Linear
    half = SwinIR(embed_dim=24, depths=[2], num_heads=[2]).half()
    assert type(for_inference(half, "cpu").conv_hr) is nn.Conv2d
