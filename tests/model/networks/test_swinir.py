import pytest
import torch
from torch.testing import assert_close

from diffbir.model.networks.swinir import SwinIR, shift_mask, window_partition, window_reverse
from tests.golden.fill import fill, image

SMALL = dict(embed_dim=24, depths=[2, 2], num_heads=[2, 2])
HEADS = {
    "pixelshuffle": dict(upsampler="pixelshuffle", sf=4),
    "pixelshuffledirect": dict(upsampler="pixelshuffledirect", sf=4),
    "nearest_conv": dict(upsampler="nearest+conv", sf=4),
    "denoise": dict(upsampler="", sf=1),
}


def relative_error(output: torch.Tensor, golden: torch.Tensor) -> float:
    return ((output - golden).abs().max() / golden.std()).item()


@pytest.mark.parametrize("head", HEADS)
@torch.no_grad()
def test_every_head_computes_the_published_numbers(head, models_golden):
    net = fill(SwinIR(**SMALL, **HEADS[head])).eval()
    assert (
        relative_error(net(image("swinir_small_in", (1, 3, 32, 32))), models_golden[f"swinir_small_{head}_out"]) < 1e-4
    )


@pytest.mark.slow
@torch.no_grad()
def test_full_size_computes_the_published_numbers(models_golden):
    net = fill(SwinIR(unshuffle_scale=8)).eval()
    assert relative_error(net(image("swinir_in", (1, 3, 64, 128))), models_golden["swinir_out"]) < 1e-4


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (33, 64), (128, 96)])
@torch.no_grad()
def test_any_size_keeps_its_size(size):
    net = SwinIR(**SMALL, sf=4, unshuffle_scale=4).eval()
    output = net(torch.rand(1, 3, *size))
    assert output.shape == (1, 3, *size)
    assert output.isfinite().all()


@torch.no_grad()
def test_padding_does_not_depend_on_content_beyond_the_image():
    """A padded image must give what the same image, reflected by hand, gives."""
    net = SwinIR(**SMALL, sf=1, upsampler="").eval()
    x = torch.rand(1, 3, 20, 30)
    by_hand = torch.nn.functional.pad(x, (0, 2, 0, 4), mode="reflect")
    assert_close(net(x), net(by_hand)[..., :20, :30])


def test_windows_round_trip():
    x = torch.randn(2, 16, 24, 5)
    assert_close(window_reverse(window_partition(x, 8), 8, 16, 24), x, rtol=0, atol=0)


def test_the_shift_mask_separates_exactly_what_the_roll_brought_together():
    """Two tokens of a window may attend iff they were less than a window apart before the cyclic shift."""
    H = W = 16
    ys, xs = torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij")
    rolled = torch.stack([ys, xs], dim=-1)[None].roll((-4, -4), dims=(1, 2))
    positions = window_partition(rolled, 8)[0]  # (nW, N, 2)
    near = ((positions[:, :, None] - positions[:, None]).abs() < 8).all(-1)
    assert torch.equal(shift_mask(H, W, 8, 4, torch.device("cpu")) == 0, near)


def test_every_parameter_gets_a_gradient():
    for head in HEADS.values():
        net = SwinIR(**SMALL, **head)
        net(torch.rand(1, 3, 16, 16)).square().mean().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())


def test_a_wrong_head_is_named():
    with pytest.raises(ValueError, match="nearest"):
        SwinIR(upsampler="nearest")
