"""What wraps a denoiser: guidance, classifier-free guidance, tiling."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from model.condition import Condition
from model.denoiser import bind, tent, tiled, window_starts, with_cfg, with_guidance
from model.guidance import LatentL2Guidance

ELEMENTS = 4 * 8 * 6


def distance(z_0: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """D of the paper, for one image."""
    return (z_0 - target).square().sum() / ELEMENTS


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_guidance_equals_autograd_of_the_formula(scale):
    z_0, target = torch.randn(1, 4, 8, 6), torch.randn(1, 4, 8, 6)

    def gradient(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad(distance(z, target), z)[0]

    explicit = LatentL2Guidance(target, scale, ELEMENTS, implicit=False)(z_0, 500)
    assert_close(explicit, z_0 - scale * gradient(z_0))
    implicit = LatentL2Guidance(target, scale, ELEMENTS)(z_0, 500)
    assert_close(implicit, z_0 - scale * gradient(implicit))


def test_implicit_guidance_never_overshoots_and_is_monotonic():
    z_0, target = torch.randn(2, 4, 8, 6), torch.randn(2, 4, 8, 6)
    scales = [0, 0.5, 10, ELEMENTS / 2, 1e4, 1e9]
    distances = [distance(LatentL2Guidance(target, s, ELEMENTS)(z_0, 0), target).item() for s in scales]
    assert distances == sorted(distances, reverse=True)
    assert_close(LatentL2Guidance(target, 0.0, ELEMENTS)(z_0, 0), z_0)
    assert distances[-1] < 1e-10


def test_guidance_corrects_every_estimate():
    target = torch.ones(1, 4, 8, 6)
    guided = with_guidance(lambda z, t: z * 0, LatentL2Guidance(target, ELEMENTS / 2, ELEMENTS))
    assert_close(guided(target, 3), target / 2)  # k = 1: half way


def by_text(z_t, t, condition):
    return z_t + condition.text.mean(dim=(1, 2)).view(-1, 1, 1, 1) + condition.latent


def test_classifier_free_guidance_extrapolates_in_one_call():
    calls = []

    def denoise(z_t, t, condition):
        calls.append(len(z_t))
        return by_text(z_t, t, condition)

    condition = Condition(latent=torch.randn(2, 4, 8, 6), text=torch.randn(2, 3, 5))
    negative, z = torch.randn(2, 3, 5), torch.randn(2, 4, 8, 6)
    p, n = by_text(z, 0, condition), by_text(z, 0, Condition(condition.latent, negative))
    assert_close(with_cfg(denoise, negative, 4.0)(z, 0, condition), n + 4 * (p - n))
    assert calls == [4]
    assert with_cfg(denoise, negative, 1.0) is denoise


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (33, 17), (64, 64)])
@pytest.mark.parametrize("tile, overlap", [(16, 4), (16, 0), (24, 20)])
def test_tiling_a_pointwise_denoiser_changes_nothing(size, tile, overlap):
    """Weights sum to one and every window sees its own part of the condition, image included."""
    condition = Condition(
        latent=torch.randn(2, 4, *size), text=torch.randn(2, 3, 5), image=torch.rand(2, 3, 4 * size[0], 4 * size[1])
    )

    def denoise(z_t, t, c):
        image = torch.nn.functional.avg_pool2d(c.image, 4).mean(1, keepdim=True)
        return by_text(z_t, t, c) * 2 + image

    z = torch.randn(2, 4, *size)
    assert_close(tiled(denoise, tile, overlap)(z, 9, condition), denoise(z, 9, condition), rtol=0, atol=1e-5)


@pytest.mark.parametrize("length", [5, 16, 17, 31, 100])
def test_windows_cover_everything_and_overlap(length):
    starts = list(window_starts(length, 16, 4))
    assert starts[0] == 0
    assert starts[-1] == max(length - 16, 0)
    assert all(b - a <= 12 for a, b in itertools.pairwise(starts))


def test_tent_is_symmetric_and_positive():
    assert_close(tent(7), tent(7).flip(0))
    assert (tent(8) > 0).all()


def test_bind_fixes_the_condition():
    condition = Condition(latent=torch.ones(1, 4, 2, 2), text=torch.zeros(1, 1, 1))
    assert_close(bind(by_text, condition)(torch.zeros(1, 4, 2, 2), 0), torch.ones(1, 4, 2, 2))
