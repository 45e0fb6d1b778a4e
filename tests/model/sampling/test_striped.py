"""The autoencoder in strips equals the autoencoder."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from diffbir.model.build import for_inference
from diffbir.model.networks import packed, winograd
from diffbir.model.networks.autoencoder import AttnBlock, AutoencoderKL
from diffbir.model.sampling import striped
from diffbir.model.sampling.striped import CPU, StripedAutoencoder, Stripes, stream

CONVOLUTIONS = dict(channels=8, channel_mult=(1, 2, 4), num_res_blocks=1, mid_attention=False, norm_groups=2)
PATCHES = dict(patch=2, channels=8, channel_mult=(1, 2), num_res_blocks=1, mid_attention=False, norm_groups=0)
MIXED = dict(CONVOLUTIONS, decoder=dict(patch=2, channel_mult=(1, 2), num_res_blocks=2, norm_groups=0))
ATTENTION = dict(channels=16, channel_mult=(1, 2, 2, 4), num_res_blocks=2, mid_attention=True, norm_groups=4)


@pytest.fixture(
    scope="module",
    params=[CONVOLUTIONS, ATTENTION, PATCHES, MIXED],
    ids=["convolutions", "attention", "patches", "patches_in_the_decoder"],
)
def autoencoder(request) -> AutoencoderKL:
    torch.manual_seed(0)
    model = AutoencoderKL(**request.param).eval().requires_grad_(False)
    model.options = request.param
    for norm in (m for m in model.modules() if isinstance(m, nn.GroupNorm)):
        nn.init.normal_(norm.weight, 1, 0.3)
        nn.init.normal_(norm.bias, 0, 0.3)
    return model


@pytest.mark.parametrize("size", [(1, 1), (2, 9), (13, 3), (7, 5)])
@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("home", [None, CPU])
def test_strips_change_nothing(autoencoder, size, rows, home):
    """Statistics are those of the whole image, so even one whose brightness changes from top to bottom is exact."""
    f, (h, w) = autoencoder.factor, size
    striped = StripedAutoencoder(autoencoder, [Stripes(rows * w * f**2, home)])
    image = torch.rand(2, 3, h * f, w * f) * torch.linspace(0, 1, h * f)[:, None]
    z = torch.randn(2, 4, h, w) + torch.linspace(-2, 2, h)[:, None]
    assert_close(striped.encode(image), autoencoder.encode(image), rtol=1e-4, atol=1e-5)
    assert_close(striped.decode(z), autoencoder.decode(z), rtol=1e-4, atol=1e-5)


@pytest.mark.skipif(not packed.available(), reason="torch without oneDNN's operators")
@pytest.mark.parametrize("narrow", [False, True])
def test_packed_layers_in_strips_change_nothing(autoencoder, narrow, monkeypatch):
    """With convolutions by Winograd's algorithm, too, where they are wide: here already where they are narrow."""
    if narrow:
        monkeypatch.setattr(winograd, "CHANNELS", 8)
        monkeypatch.setattr(winograd, "TILES", 1)
    f = autoencoder.factor
    ours = for_inference(copy.deepcopy(autoencoder), "cpu")
    image, z = torch.rand(2, 3, 6 * f, 5 * f), torch.randn(2, 4, 6, 5)
    for rows in (1, 4, 9):
        striped = StripedAutoencoder(ours, [Stripes(rows * 5 * f**2)])
        assert_close(striped.encode(image), autoencoder.encode(image), rtol=1e-3, atol=1e-4)
        assert_close(striped.decode(z), autoencoder.decode(z), rtol=1e-3, atol=1e-4)
    layers = [m for m in ours.modules() if isinstance(m, packed.PackedConv2d)]
    assert layers and narrow == any(not layer.weight.is_mkldnn for layer in layers if layer.size)


@pytest.mark.parametrize("height, pieces", [(6, 1), (7, 4)])
def test_what_is_not_large_is_not_cut(autoencoder, height, pieces):
    f, model, seen = autoencoder.factor, copy.deepcopy(autoencoder), []
    for part in (model.encoder, model.decoder):
        part.conv_in.register_forward_hook(lambda conv, *_: seen.append(conv))
    striped = StripedAutoencoder(model, [Stripes(2 * 5 * f**2, whole=6 * 5 * f**2)])
    striped.encode(torch.rand(1, 3, height * f, 5 * f))
    striped.decode(torch.randn(1, 4, height, 5))
    assert seen == [model.encoder.conv_in] * pieces + [model.decoder.conv_in] * pieces


def test_large_strips_give_back_memory_at_norms_and_at_the_end(autoencoder, monkeypatch):
    calls = []
    monkeypatch.setattr(striped, "give_back", lambda: calls.append(1))
    f, z = autoencoder.factor, torch.randn(1, 4, 6, 5)
    once = StripedAutoencoder(autoencoder, [Stripes(2 * 5 * f**2)])
    once.decode(z)
    assert len(calls) == 1
    monkeypatch.setattr(striped, "LARGE", 0)
    once.decode(z)
    norms = sum(isinstance(m, nn.GroupNorm) for m in autoencoder.decoder.modules())
    in_attention = sum(isinstance(m, AttnBlock) for m in autoencoder.decoder.modules())  # which has all in one piece
    assert len(calls) == 2 + norms - in_attention


def test_half_precision_is_as_good_as_in_one_piece(autoencoder):
    half = AutoencoderKL(**autoencoder.options).bfloat16().requires_grad_(False)
    half.load_state_dict(autoencoder.state_dict())
    z = torch.randn(1, 4, 9, 6)
    exact = autoencoder.decode(z)
    striped = StripedAutoencoder(half, [Stripes(half.factor**2 * 12)]).decode(z.bfloat16())
    assert striped.dtype == torch.bfloat16
    assert (striped - exact).abs().mean() < 1.5 * (half.decode(z.bfloat16()) - exact).abs().mean()


def test_layers_see_strips_alone(autoencoder):
    """Watched where the decoder changes the number of channels."""
    f, rows, seen = autoencoder.factor, 2, []
    shortcuts = [m for name, m in autoencoder.decoder.named_modules() if name.endswith("nin_shortcut")]
    hooks = [m.register_forward_hook(lambda m, x, y: seen.append(y.shape[-2])) for m in shortcuts]
    StripedAutoencoder(autoencoder, [Stripes(rows * 6 * f**2)]).decode(torch.randn(1, 4, 11, 6))
    for hook in hooks:
        hook.remove()
    assert 0 < max(seen) <= rows * f


def out_of_memory(*_):
    raise torch.OutOfMemoryError


def test_smaller_strips_that_rest_in_main_memory_follow_when_memory_runs_out(autoencoder, monkeypatch, caplog):
    striped = StripedAutoencoder(autoencoder)
    z = torch.randn(1, 4, 40, 40)
    whole = autoencoder.decode(z)
    monkeypatch.setattr(autoencoder, "decode", out_of_memory)
    assert_close(striped.decode(z), whole, rtol=1e-4, atol=5e-5)
    assert "out of memory with Stripes(pixels=262144" in caplog.text


def test_strips_follow_where_they_are_computed_when_one_piece_does_not_fit(autoencoder, monkeypatch, caplog):
    side = 528 // autoencoder.factor  # larger than a strip
    striped, z = StripedAutoencoder(autoencoder), torch.randn(1, 4, side, side)
    whole = autoencoder.decode(z)
    monkeypatch.setattr(autoencoder, "decode", out_of_memory)
    assert_close(striped.decode(z), whole, rtol=1e-3, atol=1e-4)
    assert striped.fit.plans[0].home is None and caplog.text.count("out of memory") == 1


def test_unknown_layers_are_named():
    with pytest.raises(TypeError, match="BatchNorm2d cannot be computed in strips"):
        stream(nn.BatchNorm2d(3), iter([]), None)
