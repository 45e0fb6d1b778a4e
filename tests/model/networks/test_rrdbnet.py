import pytest
import torch

from diffbir.model.networks.rrdbnet import RRDBNet
from tests.golden.fill import fill, image

SMALL = dict(features=8, blocks=2, growth=4)


@torch.no_grad()
def test_full_size_computes_the_published_numbers(models_golden):
    golden = models_golden["bsrnet_out"]
    output = fill(RRDBNet()).eval()(image("bsrnet_in", (1, 3, 12, 20)))
    assert (output - golden).abs().max() < 1e-4 * golden.std()


@pytest.mark.parametrize("size", [(1, 1), (5, 7), (16, 24)])
@torch.no_grad()
def test_any_size_is_enlarged_by_the_scale(size):
    net = RRDBNet(**SMALL).eval()
    output = net(torch.rand(2, 3, *size))
    assert output.shape == (2, 3, net.scale * size[0], net.scale * size[1])
    assert output.isfinite().all()


def test_every_parameter_gets_a_gradient():
    net = RRDBNet(**SMALL)
    net(torch.rand(1, 3, 8, 8)).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())
