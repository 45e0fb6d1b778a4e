"""Windows over large pictures: exact cover, no seams."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing import assert_close

import diffbir.model.sampling.tiling as tiling
from diffbir.model.networks.rrdbnet import RRDBNet
from diffbir.model.networks.swinir import SwinIR
from diffbir.model.options import Options
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer
from diffbir.model.sampling.tiling import Windows, in_windows, map_in_windows, plans
from diffbir.utils.choices import AUTOMATIC, NEVER
from diffbir.utils.config import ROOT
from diffbir.utils.image import read_rgb, to_tensor

CPU = torch.device("cpu")
PHOTO = ROOT / "inputs" / "demo" / "village-phone.jpg"


@st.composite
def windows(draw, multiple: int = 1) -> Windows:
    tile = draw(st.integers(2, 20))
    overlap = draw(st.integers(0, tile - 1))
    margin = draw(st.integers(0, max(0, (overlap * multiple - 1) // 2)))
    return Windows(tile * multiple, overlap * multiple, margin, multiple)


@settings(deadline=None)
@given(windows=windows(), length=st.integers(1, 60))
def test_windows_cover_any_length_and_their_weights_sum_to_one(windows, length):
    starts, weights = windows.starts(length), windows.weights(length)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - windows.tile)
    assert all(0 < b - a <= windows.tile - windows.overlap for a, b in itertools.pairwise(starts))
    total = torch.zeros(length, dtype=torch.float64)
    for start, weight in zip(starts, weights, strict=True):
        total[start : start + windows.tile] += weight
    assert_close(total, torch.ones_like(total))
    assert (weights >= 0).all()


@settings(deadline=None)
@given(windows=windows(multiple=4), units=st.integers(1, 40))
def test_windows_lie_on_the_grid_of_the_network(windows, units):
    starts = windows.starts(4 * units)
    assert all(start % 4 == 0 for start in starts)
    assert all(0 < b - a <= windows.tile - windows.overlap for a, b in itertools.pairwise(starts))


def test_weights_are_symmetric_smooth_and_zero_only_in_the_margin():
    first, middle, last = Windows(32, 16, margin=4).weights(64)
    assert_close(middle, middle.flip(0))
    assert_close(first, last.flip(0))
    assert (middle == 0).nonzero().flatten().tolist() == [0, 1, 2, 3, 28, 29, 30, 31]
    assert middle.diff().abs().max() < 0.2
    assert first[0] == 1  # nothing is dropped at the picture's border


@settings(deadline=None, max_examples=40)
@given(
    windows=windows(),
    batch=st.integers(1, 5),
    size=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    scale=st.sampled_from([1, 3]),
)
def test_a_pointwise_function_is_not_changed(windows, batch, size, scale):
    def function(x: Tensor) -> Tensor:
        return F.interpolate(x**2, scale_factor=float(scale), mode="nearest")

    x = torch.rand(2, 3, *size)
    windows = Windows(windows.tile, windows.overlap, windows.margin, batch=batch)
    assert_close(map_in_windows(function, x, windows), function(x), rtol=0, atol=1e-6)


def test_scales_below_one():
    x, windows = torch.rand(1, 2, 40, 52), Windows(16, 8, 2, multiple=4)
    assert_close(map_in_windows(lambda x: F.avg_pool2d(x, 4), x, windows), F.avg_pool2d(x, 4), rtol=0, atol=1e-6)


@pytest.mark.parametrize("size", [(17, 90), (64, 64), (61, 33)])
def test_a_network_that_sees_no_further_than_the_margin_is_not_changed(size):
    """Three 3x3 convolutions see three pixels; where the picture ends, they see the same zeros."""
    network = nn.Sequential(*(layer for c in (3, 8, 8) for layer in (nn.Conv2d(c, 8, 3, padding=1), nn.SiLU())))
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        whole = network(x)
        assert_close(map_in_windows(network, x, Windows(24, 8, margin=3, batch=2)), whole, rtol=0, atol=1e-5)
        assert (map_in_windows(network, x, Windows(24, 8, margin=0)) - whole).abs().max() > 1e-4


def test_a_network_that_enlarges_is_not_changed():
    """Fifteen convolutions of a block, four before and after it, and three at a finer scale: under 20 pixels."""
    network, x = RRDBNet(features=8, blocks=1, growth=4), torch.rand(1, 3, 71, 64)
    with torch.no_grad():
        assert_close(map_in_windows(network, x, Windows(56, 48, margin=20)), network(x), rtol=0, atol=1e-5)


def test_a_network_on_a_grid_is_not_changed():
    """Without Swin blocks, SwinIR is a few convolutions on patches of 4 pixels; it pads to whole attention windows."""
    head = dict(sf=4, unshuffle_scale=4, upsampler="pixelshuffledirect")
    network, x = SwinIR(embed_dim=8, depths=(0,), num_heads=(1,), **head).eval(), torch.rand(1, 3, 131, 229)
    windows = Windows(128, 64, margin=24, multiple=network.multiple)
    with torch.no_grad():
        assert_close(map_in_windows(network, x, windows), network(x), rtol=0, atol=1e-5)


def test_equal_windows_are_computed_together():
    sizes = []

    def function(cut):
        sizes.append(tuple(cut(x).shape))
        assert_close(cut(text), text.repeat(sizes[-1][0] // 2, 1, 1))
        return cut(x)

    x, text = torch.rand(2, 3, 40, 24), torch.rand(2, 4, 5)
    assert_close(in_windows(function, 40, 24, Windows(16, 8, batch=3)), x)
    assert sizes == [(6, 3, 16, 16)] * 2 + [(4, 3, 16, 16)]


@pytest.mark.parametrize("multiple, pixels", [(1, 1), (64, 1), (32, 1), (8, 8), (1, 4)])
def test_plans_shrink_and_can_be_cut(multiple, pixels):
    found = plans(512, torch.device("cuda"), multiple, pixels)
    assert found[0].tile == 512 // pixels
    assert [w.batch for w in found[:3]] == [4, 2, 1]
    first, *others = plans(512, CPU, multiple, pixels)  # nothing is gained there by computing windows together
    assert others == found[2:] and first == dataclasses.replace(others[0], most=768 // pixels)
    assert found[0].most == 768 // pixels and all(w.most == w.tile for w in found[1:])
    assert all(b.tile * b.batch < a.tile * a.batch for a, b in itertools.pairwise(found))
    for w in found:
        assert 2 * w.margin < w.overlap < w.tile
        assert all(n % multiple == 0 for n in (w.tile, w.overlap))


@pytest.mark.parametrize(
    "size, side, number",
    [
        ((512, 512), 512, 1),
        ((640, 480), 640, 1),
        ((768, 768), 768, 1),
        ((1024, 1024), 640, 4),
        ((576, 1024), 640, 2),
        ((2048, 2048), 512, 25),
    ],
)
def test_windows_are_larger_where_less_is_computed_then(size, side, number):
    found = []

    def function(cut):
        found.append(cut(x))
        return found[-1]

    windows = plans(512, CPU, 64)[0]
    x = torch.rand(1, 1, *size)
    assert_close(in_windows(function, *size, windows), x)
    assert windows.fitted(*size).tile == side and len(found) == number
    computed = sum(part.shape[-2] * part.shape[-1] for part in found)
    rigid = plans(512, CPU, 64)[1]
    assert computed <= rigid.computed(size[0]) * rigid.computed(size[1])


def test_automatic_windows_follow_free_memory(monkeypatch):
    sides = []
    for gigabytes in (1, 4, 16):
        monkeypatch.setattr(tiling, "free_bytes", lambda device, n=gigabytes: n * 2**30)
        sides.append(plans(AUTOMATIC, CPU)[0].tile)
    assert sides[0] * 4 == sides[1] * 2 == sides[2]
    assert plans(NEVER, CPU)[0].starts(10**6) == [0]


def test_the_pipeline_goes_on_with_smaller_windows_when_memory_runs_out(caplog):
    class Hungry(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.shape[-2] * x.shape[-1] > 128**2:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
            return x / 2

    x = torch.rand(1, 3, 200, 300)
    assert_close(Restorer(Hungry()).restore(x, Options(stage="1", tile=256)).image, x / 2)
    assert "out of memory with Windows(tile=256" in caplog.text
    with pytest.raises(RuntimeError, match="allocate"):
        Restorer(Hungry()).restore(x, Options(stage="1", tile=NEVER))


# Seams, with the embedded model


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    return Restorer.from_config(load_preset("mini", overrides=["sampling.solver=ddim"]))


@pytest.fixture(scope="module")
def photo() -> Tensor:
    image = to_tensor(read_rgb(PHOTO))[None]
    return F.interpolate(image, (320, 416), mode="bicubic", antialias=True).clamp(0, 1)


def steps(image: Tensor, windows: Windows) -> Tensor:
    """Mean difference of neighbouring pixels over that elsewhere: at the sides of windows, and where their use ends.

    Vertically and horizontally: (4,).
    """
    ratios = []
    for dim in (2, 3):
        step = image.diff(dim=dim).abs().mean(dim=(0, 1, 5 - dim))  # (length - 1,)
        starts = torch.tensor(windows.starts(image.shape[dim]))
        for margin in (0, windows.margin):
            sides = torch.cat([starts[1:] + margin, starts[:-1] + windows.tile - margin])
            at = torch.zeros(len(step), dtype=torch.bool).index_fill(0, sides - 1, True)
            ratios.append(step[at].mean() / step[~at].mean())
    return torch.stack(ratios)


def seams(image: Tensor, whole: Tensor, windows: Windows) -> float:
    """By what factor windows raise the steps at their sides; the picture's own edges, there and elsewhere, cancel."""
    return (steps(image, windows) / steps(whole, windows)).max().item()


@pytest.mark.parametrize("tile", [64, 128])
def test_stage_1_has_no_seams(restorer, photo, tile):
    windows = plans(tile, CPU, restorer.stage1.multiple)[0].fitted(*photo.shape[-2:])
    whole, tiled = (restorer.restore(photo, restorer.options(stage="1", tile=t)).image for t in (NEVER, tile))
    assert not torch.equal(tiled, whole)
    assert seams(tiled, whole, windows) <= 1.05
    with torch.inference_mode():
        hard = map_in_windows(restorer.stage1, photo, Windows(64, 0, multiple=32))
    assert seams(hard, whole, Windows(64, 0)) > 1.05  # what this would look like


def test_the_pipeline_has_no_seams(restorer, photo):
    tile, unit = 128, restorer.autoencoder.factor
    windows = plans(tile, CPU, restorer.network.unet.factor, unit)[0].fitted(*(n // unit for n in photo.shape[-2:]))
    in_pixels = Windows(windows.tile * unit, windows.overlap * unit, windows.margin * unit, windows.multiple * unit)
    whole, tiled = (restorer.restore(photo, restorer.options(steps=2, tile=t)).image for t in (NEVER, tile))
    assert seams(tiled, whole, in_pixels) <= 1.05
    assert abs(tiled.mean(dim=(2, 3)) - whole.mean(dim=(2, 3))).max() < 1 / 255
