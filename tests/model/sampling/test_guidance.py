"""Guidance: closed forms, autograd, and its relation to the paper's shift of the mean."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.guidance import LatentL2Guidance, RgbL2Guidance, constant, during, mean_shift, region_weight
from diffbir.model.sampling.solvers import ddpm, posterior, spaced_timesteps
from tests.golden.fill import image

ELEMENTS = 4 * 8 * 6
ALPHA_BAR = Diffusion().alpha_bar


def test_the_region_weight_is_the_published_one(numerics_golden):
    """In float64, because rounding differs from one PyTorch to the next; the published numbers round by 3e-6."""
    x = F.interpolate(image("jpeg_in", (1, 3, 8, 8)).double(), (64, 48), mode="bicubic").clamp(0, 1)
    assert_close(region_weight(x), numerics_golden["region_weight"].double(), rtol=0, atol=4e-6)


def test_the_region_weight_is_one_where_nothing_changes():
    x = torch.full((2, 3, 12, 16), 0.3)
    x[1, :, :, 8:] = 0.9
    weight = region_weight(x)
    assert_close(weight[0], torch.ones(1, 12, 16))
    assert weight[1, :, :, 6:10].max() < 0.1
    assert_close(weight[1, :, :, :6], torch.ones(1, 12, 6))


@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_weighted_guidance_equals_autograd_of_the_formula(scale):
    z_0, target, weight = torch.randn(1, 4, 8, 6), torch.randn(1, 4, 8, 6), torch.rand(1, 1, 8, 6)

    def gradient(z):
        z = z.clone().requires_grad_()
        return torch.autograd.grad((weight * (z - target).square()).sum() / ELEMENTS, z)[0]

    explicit = LatentL2Guidance(target, scale, ELEMENTS, weight, implicit=False)(z_0, 500)
    assert_close(explicit, z_0 - scale * gradient(z_0))
    implicit = LatentL2Guidance(target, scale, ELEMENTS, weight)(z_0, 500)
    assert_close(implicit, z_0 - scale * gradient(implicit))


def test_repeats_are_steps_in_a_row_and_the_gain_switches_them_off():
    z_0, target = torch.randn(1, 4, 8, 6), torch.randn(1, 4, 8, 6)
    once = LatentL2Guidance(target, 20.0, ELEMENTS)
    gain = during(constant, start=600, stop=200)
    thrice = LatentL2Guidance(target, 20.0, ELEMENTS, gain=gain, repeats=3)
    assert_close(thrice(z_0, 400), once(once(once(z_0, 0), 0), 0))
    assert_close(thrice(z_0, 601), z_0)
    assert_close(thrice(z_0, 199), z_0)


def test_the_mean_form_shifts_the_mean_of_every_ddpm_step():
    """Guiding z_0 with scale / c_0 is subtracting scale x gradient from the step's mean, the paper's algorithm."""
    timesteps, s = spaced_timesteps(ALPHA_BAR, 7), 5.0
    target, z_T = torch.randn(1, 4, 8, 6), torch.randn(1, 4, 8, 6)

    def denoise(z, t):
        return 0.7 * z / (1 + t / 1000)

    guidance = LatentL2Guidance(target, s, ELEMENTS, gain=mean_shift(ALPHA_BAR, timesteps), implicit=False)
    ours = ddpm(
        lambda z, t: guidance(denoise(z, t), t), z_T, ALPHA_BAR, timesteps, lambda: torch.zeros(()), lambda i, z: None
    )
    z = z_T
    for t, u in pairwise(timesteps):
        c_0, c_t, _ = posterior(ALPHA_BAR, t, u)
        z_0 = denoise(z, t)
        z = c_0 * z_0 + c_t * z - s * 2 * (z_0 - target) / ELEMENTS
    assert_close(ours, z, rtol=1e-5, atol=1e-5)


def linear_decoder(seed: int = 0):
    """(B, 4, h, w) -> (B, 3, 2h, 2w), linear."""
    conv = torch.nn.ConvTranspose2d(4, 3, 2, stride=2)
    torch.manual_seed(seed)
    torch.nn.init.normal_(conv.weight)
    return conv.requires_grad_(False)


def test_rgb_guidance_follows_the_gradient_for_small_scales():
    decode, z_0, target = linear_decoder(), torch.randn(2, 4, 8, 6), torch.randn(2, 3, 16, 12)
    z = z_0.clone().requires_grad_()
    (g,) = torch.autograd.grad((decode(z) - target).square().sum() / ELEMENTS, z)
    scale = 1e-3
    with torch.inference_mode():
        guided = RgbL2Guidance(decode, target.clone(), scale, ELEMENTS)(z_0.clone(), 0)
    assert_close((z_0 - guided) / scale, g, rtol=2e-2, atol=1e-3)


def test_rgb_guidance_is_monotonic_and_stable_for_every_scale():
    decode, z_0, target = linear_decoder(), torch.randn(2, 4, 8, 6), torch.randn(2, 3, 16, 12)
    distances = []
    for scale in (0, 1, 10, 100, 1e4, 1e8):
        guided = RgbL2Guidance(decode, target, scale, ELEMENTS)(z_0, 0)
        distances.append((decode(guided) - target).square().mean().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.9 * distances[0]
    repeated = RgbL2Guidance(decode, target, 1e8, ELEMENTS, repeats=4)(z_0, 0)
    assert (decode(repeated) - target).square().mean() < distances[-1]


def test_an_infinite_scale_in_rgb_is_the_best_step_along_the_gradient():
    """Exact line search on a quadratic: a little more or less is worse."""
    decode, z_0, target = linear_decoder(), torch.randn(1, 4, 8, 6), torch.randn(1, 3, 16, 12)
    best = RgbL2Guidance(decode, target, 1e12, ELEMENTS)(z_0, 0)

    def distance(factor):
        return (decode(z_0 + factor * (best - z_0)) - target).square().mean()

    assert distance(1.0) < distance(0.95)
    assert distance(1.0) < distance(1.05)
