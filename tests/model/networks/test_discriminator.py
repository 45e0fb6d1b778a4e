"""Discriminators: their losses in closed form, their spectral norms against numpy, what every logit sees."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from diffbir.model.networks.discriminator import ADVERSARIAL, FeatureHeads, UNetDiscriminator, accuracy


def test_a_logit_for_every_pixel_that_sees_its_surroundings():
    torch.manual_seed(0)
    network = UNetDiscriminator(features=8).eval()
    x = torch.rand(1, 3, 64, 64, requires_grad=True)
    logits = network(x)
    assert logits.shape == (1, 1, 64, 64)
    logits[0, 0, 32, 32].backward()
    seen = x.grad.abs().sum(1)[0] > 0
    assert seen[32, 32] and seen[32, 22:42].all() and seen[22:42, 32].all()


def test_the_convolutions_inside_have_spectral_norm_one():
    torch.manual_seed(0)
    network = UNetDiscriminator(features=8)
    for _ in range(100):
        network(torch.rand(1, 3, 16, 16))  # each pass is a power iteration
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d) and parametrize.is_parametrized(m)]
    assert len(layers) == 8
    for layer in layers:
        assert np.linalg.norm(layer.weight.detach().flatten(1).numpy(), 2) == pytest.approx(1, abs=2e-2)


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


@pytest.mark.parametrize(
    "name, discriminator, generator",
    [
        ("hinge", lambda r, f: max(0, 1 - r) + max(0, 1 + f), lambda f: -f),
        (
            "softplus",
            lambda r, f: math.log1p(math.exp(-r)) + math.log1p(math.exp(f)),
            lambda f: math.log1p(math.exp(-f)),
        ),
    ],
)
@pytest.mark.parametrize("real, fake", [(0.3, -0.4), (-2.0, 1.5), (3.0, -3.0)])
def test_losses_in_closed_form(name, discriminator, generator, real, fake):
    of_discriminator, of_generator = ADVERSARIAL[name]
    r, f = torch.full((2, 1, 4, 4), real), torch.full((2, 1, 4, 4), fake)
    assert of_discriminator(r, f).item() == pytest.approx(discriminator(real, fake), rel=1e-5)
    assert of_generator(f).item() == pytest.approx(generator(fake), rel=1e-5)


def test_accuracy_is_the_share_of_right_signs():
    assert accuracy(torch.tensor([1.0, 2.0, -1.0, 3.0]), torch.tensor([-1.0, 1.0])).item() == pytest.approx(0.625)


def test_heads_give_logits_for_every_map_whatever_its_magnitude():
    torch.manual_seed(0)
    heads = FeatureHeads((4, 6), hidden=8).eval()
    maps = [torch.rand(2, 4, 8, 8) + 0.1, torch.rand(2, 6, 4, 4) + 0.1]
    logits = heads(maps)
    assert [tuple(x.shape) for x in logits] == [(2, 1, 8, 8), (2, 1, 4, 4)]
    for a, b in zip(logits, heads([100 * m for m in maps]), strict=True):
        torch.testing.assert_close(a, b)
