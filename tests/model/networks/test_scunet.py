import pytest
import torch
from torch.nn.functional import pad
from torch.testing import assert_close

from diffbir.model.networks.scunet import SCUNet
from tests.golden.fill import fill, image

SMALL = dict(config=[2] * 7, dim=16, head_dim=8)


@torch.no_grad()
def test_full_size_computes_the_published_numbers(models_golden):
    """The width of the input is no multiple of 64, so that this is also about the padding."""
    golden = models_golden["scunet_out"]
    output = fill(SCUNet()).eval()(image("scunet_in", (1, 3, 64, 48)))
    assert (output - golden).abs().max() < 1e-4 * golden.std()


@pytest.mark.parametrize("size", [(1, 1), (5, 70), (64, 64), (33, 129)])
@torch.no_grad()
def test_any_size_keeps_its_size(size):
    net = SCUNet(**SMALL).eval()
    output = net(torch.rand(2, 3, *size))
    assert output.shape == (2, 3, net.scale * size[0], net.scale * size[1])
    assert output.isfinite().all()


@torch.no_grad()
def test_images_of_a_batch_do_not_mix():
    net = SCUNet(**SMALL).eval()
    x = torch.rand(2, 3, 64, 128)
    assert_close(net(x), torch.cat([net(x[:1]), net(x[1:])]))


@torch.no_grad()
def test_padding_repeats_the_border():
    net = SCUNet(**SMALL).eval()
    x = torch.rand(1, 3, 20, 30)
    assert_close(net(x), net(pad(x, (0, 34, 0, 44), mode="replicate"))[..., :20, :30])


def test_every_parameter_gets_a_gradient():
    net = SCUNet(**SMALL)
    net(torch.rand(1, 3, 64, 64)).square().mean().backward()
    assert all(p.grad.isfinite().all() and p.grad.abs().sum() > 0 for p in net.parameters())


@torch.no_grad()
def test_a_network_built_on_meta_and_then_filled_computes():
    net = fill(SCUNet(**SMALL))
    with torch.device("meta"):
        empty = SCUNet(**SMALL)
    empty.load_state_dict(net.state_dict(), assign=True)
    x = torch.rand(1, 3, 64, 64)
    assert_close(empty(x), net(x))
