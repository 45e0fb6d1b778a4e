"""VGG16 against torchvision's own forward pass, and DISTS against what the authors' package computes."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from skimage import data
from torch import Tensor
from torch.testing import assert_close
from torchvision import models
from torchvision.transforms.functional import normalize

from diffbir.utils.cli import UserError
from diffbir.utils.metrics import DISTS, VGG16

# Computed by DISTS_pytorch.DISTS (DISTS-pytorch 0.1) with the same VGG16 weights put into it, on the pairs below.
PUBLISHED = json.loads(Path(__file__).with_name("dists.json").read_text())


@pytest.fixture(scope="module")
def dists(vgg16) -> DISTS:
    return DISTS(vgg16=vgg16)


def pair(name: str) -> tuple[Tensor, Tensor]:
    """A damaged photo and the photo, (1, 3, H, W) each: crops of 256 pixels, or all of a photo with odd sides."""
    photo = {"astronaut": data.astronaut, "coffee": data.coffee, "cat": data.chelsea, "rocket": data.rocket}[name]()
    y = torch.from_numpy(photo.copy()).permute(2, 0, 1)[None].float() / 255
    y = y if name == "cat" else y[..., :256, :256]
    if name in ("astronaut", "cat"):
        noise = torch.randn(y.shape, generator=torch.Generator().manual_seed(0))
        return (y + 0.1 * noise).clamp(0, 1), y
    small = F.avg_pool2d(y, 4)
    return F.interpolate(small, y.shape[-2:], mode="bilinear"), y


@pytest.mark.parametrize("name", PUBLISHED)
def test_dists_is_that_of_its_authors(dists, name):
    assert_close(dists(*pair(name)).item(), PUBLISHED[name], rtol=0, atol=1e-4)


def test_dists_is_per_image_and_zero_for_equal_images(dists):
    (x, y), (p, q) = pair("astronaut"), pair("coffee")
    x, y, p, q = (v[..., :64, :64] for v in (x, y, p, q))
    scores = dists(torch.cat([x, p, y]), torch.cat([y, q, y]))
    assert_close(scores, torch.cat([dists(x, y), dists(p, q), torch.zeros(1)]), rtol=0, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):  # features in half precision, statistics and result in float32
        rounded = dists(x, y)
    assert rounded.dtype == torch.float32 and not torch.equal(rounded, scores[:1])
    assert_close(rounded, scores[:1], rtol=5e-3, atol=0)


def test_dists_gradient_reduces_the_distance(dists):
    """A small step against the gradient lowers the distance by step * |gradient|**2, to first order."""
    x, y = (v[..., :64, :64] for v in pair("astronaut"))
    x.requires_grad_()
    distance = dists(x, y).sum()
    (gradient,) = torch.autograd.grad(distance, x)
    step = 0.02 / gradient.square().sum()  # a drop of 0.02
    with torch.no_grad():
        drop = distance - dists(x - step * gradient, y).sum()
    assert 0 < drop.item() < 0.04
    assert not any(p.requires_grad for p in dists.parameters())


def test_vgg16_is_that_of_torchvision(vgg16):
    """Its own forward pass, read out before every max-pool; also after a gradient was asked for."""
    reference = models.vgg16(weights=None).features.eval()
    reference.load_state_dict({k: v.float() for k, v in load_file(vgg16).items()})
    x = pair("rocket")[1][..., :97, :64]
    expected, h = [], normalize(x, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    with torch.no_grad():
        for layer in reference:
            if isinstance(layer, torch.nn.MaxPool2d):
                expected.append(h.clone())
            h = layer(h)
    maps = VGG16(vgg16)(x)
    assert [m.shape[1] for m in maps] == list(VGG16.widths)
    for ours, theirs in zip(maps, expected, strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_vgg16_weights_are_the_published_ones(vgg16):
    """First numbers of torchvision's `vgg16-397923af`; another kernel layout or the other VGG16 differ there."""
    first = load_file(vgg16)["0.weight"][0, 0].float()
    assert_close(first[0], torch.tensor([-0.5537, 0.1427, 0.5290]), rtol=1e-3, atol=0)


def test_missing_vgg16_says_how_to_make_it(tmp_path):
    with pytest.raises(UserError, match=r"convert_weights.py --vgg16"):
        VGG16(tmp_path / "vgg16.safetensors")
