"""What wraps a denoiser: guidance, classifier-free guidance, tiling."""

import pytest
import torch
from torch.testing import assert_close

import diffbir.model.sampling.tiling as tiling
from diffbir.model.networks.condition import Condition
from diffbir.model.networks.control import LatentBranch
from diffbir.model.networks.layers import repeat_to
from diffbir.model.networks.unet import UNet
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer
from diffbir.model.sampling.cache import CachedControlledUNet
from diffbir.model.sampling.denoiser import ControlledUNet, bind, rising, tiled, with_cfg, with_guidance
from diffbir.model.sampling.guidance import LatentL2Guidance
from diffbir.model.sampling.tiling import Windows
from tests.golden.fill import data, fill

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
    """As the networks, takes several texts for each image."""
    text = condition.text.mean(dim=(1, 2)).view(-1, 1, 1, 1)
    return repeat_to(z_t + condition.latent, len(text)) + text


def test_classifier_free_guidance_extrapolates_in_one_call():
    calls = []

    def denoise(z_t, t, condition):
        calls.append((len(z_t), len(condition.text)))
        return by_text(z_t, t, condition)

    condition = Condition(latent=torch.randn(2, 4, 8, 6), text=torch.randn(2, 3, 5))
    negative, z = torch.randn(1, 3, 5), torch.randn(2, 4, 8, 6)
    p, n = by_text(z, 0, condition), by_text(z, 0, Condition(condition.latent, negative.repeat(2, 1, 1)))
    guided = with_cfg(denoise, negative, lambda t: 4.0 if t > 100 else 1.0)
    assert_close(guided(z, 500, condition), n + 4 * (p - n))
    assert calls.pop() == (2, 4)
    assert_close(guided(z, 50, condition), p)
    assert calls.pop() == (2, 2)  # no second text where the scale is 1
    assert with_cfg(denoise, None, lambda t: 4.0) is denoise


def test_the_rising_scale_closed_form():
    scale = rising(6.0)
    assert scale(1000) == 1
    assert scale(0) == pytest.approx(7)
    assert scale(1000 - 1000 * 0.5**0.2) == pytest.approx(4)
    assert all(scale(t) >= scale(t + 1) for t in range(999))


@torch.no_grad()
def test_two_texts_in_one_call_give_what_two_calls_give():
    """The part before the first attention to the text is computed once."""
    size = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[2], head_channels=16)
    network = ControlledUNet(fill(UNet(**size, context_dim=24)), fill(LatentBranch(**size, context_dim=24)))
    z_t, t, latent = data("z", (2, 4, 8, 8)), torch.tensor([3, 700]), data("latent", (2, 4, 8, 8))
    a, b = data("a", (2, 5, 24)), data("b", (2, 5, 24))
    seen = []
    network.unet.input_blocks[1].register_forward_hook(lambda m, i, o: seen.append(len(o)))
    both = network(z_t, t, Condition(latent, torch.cat([a, b])))
    assert seen == [2]
    alone = [network(z_t, t, Condition(latent, text)) for text in (a, b)]
    assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)
    assert (alone[0] - alone[1]).abs().max() > 1e-3


# Step caching


def chain(branch_every: int, deep_every: int):
    """A cached network over 6 steps, what it gives, and how often its parts ran."""
    size = dict(model_channels=32, channel_mult=[1, 2, 2], num_res_blocks=1, attention_factors=[2], head_channels=16)
    network = ControlledUNet(fill(UNet(**size, context_dim=None)), fill(LatentBranch(**size, context_dim=None)))
    calls = {"branch": 0, "middle": 0, "out": 0}
    for name, module in (("branch", network.branch), ("middle", network.unet.middle_block), ("out", network.unet.out)):
        module.register_forward_hook(lambda m, i, o, name=name: calls.update({name: calls[name] + 1}))
    cached = CachedControlledUNet(network, branch_every, deep_every)
    condition, outputs, exact = Condition(data("latent", (2, 4, 16, 16))), [], []
    with torch.no_grad():
        for t in (900, 895, 890, 885, 880, 875):
            z_t = data("z", (2, 4, 16, 16)) + t / 1000
            outputs.append(cached(z_t, torch.full((2,), t), condition))
        counted = dict(calls)
        for t in (900, 895, 890, 885, 880, 875):
            exact.append(network(data("z", (2, 4, 16, 16)) + t / 1000, torch.full((2,), t), condition))
    return torch.stack(outputs), torch.stack(exact), counted


def test_caching_nothing_changes_nothing():
    outputs, exact, calls = chain(1, 1)
    assert torch.equal(outputs, exact)
    assert calls == {"branch": 6, "middle": 6, "out": 6}


@pytest.mark.parametrize(
    "every, runs", [((2, 1), {"branch": 3, "middle": 6}), ((1, 3), {"branch": 2, "middle": 2})], ids=["branch", "deep"]
)
def test_cached_steps_compute_less_and_stay_close(every, runs):
    outputs, exact, calls = chain(*every)
    assert calls == {**runs, "out": 6}
    period = max(every)
    assert torch.equal(outputs[::period], exact[::period])  # where everything is computed
    error = (outputs - exact).abs().mean()
    assert 0 < error < 0.25 * (exact[0] - exact[-1]).abs().mean() + 0.05 * exact.std()


@pytest.mark.parametrize("size", [(8, 8), (16, 40), (33, 17), (64, 64)])
@pytest.mark.parametrize("windows", [Windows(16, 4), Windows(16, 0, batch=3), Windows(24, 20, margin=8, batch=4)])
def test_tiling_a_pointwise_denoiser_changes_nothing(size, windows):
    """Weights sum to one and every window sees its own part of the condition, image included; text is repeated."""
    condition = Condition(
        latent=torch.randn(2, 4, *size), text=torch.randn(2, 3, 5), image=torch.rand(2, 3, 4 * size[0], 4 * size[1])
    )

    def denoise(z_t, t, c):
        image = torch.nn.functional.avg_pool2d(c.image, 4).mean(1, keepdim=True)
        return by_text(z_t, t, c) * 2 + repeat_to(image, len(c.text))

    z, negative = torch.randn(2, 4, *size), torch.randn(1, 3, 5)
    whole = with_cfg(denoise, negative, lambda t: 3.0)(z, 9, condition)
    assert_close(
        tiled(with_cfg(denoise, negative, lambda t: 3.0), [windows])(z, 9, condition), whole, rtol=0, atol=1e-5
    )


def test_windows_shrink_when_memory_runs_out_and_stay_small():
    sides = []

    def denoise(z_t, t, c):
        sides.append((len(z_t), z_t.shape[-1]))
        if len(z_t) * z_t.shape[-1] > 16:
            raise torch.OutOfMemoryError
        return 2 * z_t

    z, condition = torch.randn(1, 4, 32, 64), Condition(latent=torch.randn(1, 4, 32, 64))
    windowed = tiled(denoise, [Windows(32, 8, batch=2), Windows(32, 8), Windows(16, 4)])
    for _ in range(2):
        assert_close(windowed(z, 0, condition), 2 * z)
    assert sides[:2] == [(2, 32), (1, 32)]
    assert set(sides[2:]) == {(1, 16)}


def test_bind_fixes_the_condition():
    condition = Condition(latent=torch.ones(1, 4, 2, 2), text=torch.zeros(1, 1, 1))
    assert_close(bind(by_text, condition)(torch.zeros(1, 4, 2, 2), 0), torch.ones(1, 4, 2, 2))


@torch.no_grad()
def test_a_cache_forgets_what_has_another_size():
    """Windows that shrink when memory runs out, or a second text that comes and goes."""
    size = dict(model_channels=32, channel_mult=[1, 2, 2], num_res_blocks=1, attention_factors=[2], head_channels=16)
    network = ControlledUNet(fill(UNet(**size, context_dim=8)), fill(LatentBranch(**size, context_dim=8)))
    cached, text = CachedControlledUNet(network, 2, 2), data("text", (2, 3, 8))
    for t, n, side in ((900, 1, 16), (890, 2, 16), (880, 1, 8), (870, 1, 16)):
        z_t, condition = data("z", (1, 4, side, side)), Condition(data("l", (1, 4, side, side)), text[:n])
        steps = torch.tensor([t])
        assert torch.equal(cached(z_t, steps, condition), network(z_t, steps, condition))


@torch.inference_mode()
@pytest.mark.parametrize("every", [{"branch_every": 2}, {"deep_every": 2}], ids=["branch", "deep"])
def test_other_windows_after_running_out_of_memory_reuse_nothing_of_the_old_ones(every, monkeypatch):
    """Memory runs out in the second window of the third step; from there on, all is as if smaller windows began."""
    monkeypatch.setattr(tiling, "SMALLEST", 32)
    monkeypatch.setattr(tiling, "STRETCH", 1)
    restorer = Restorer.from_config(load_preset("mini", overrides=["sampling.solver=ddim"]))
    f, unet, chain = restorer.autoencoder.factor, restorer.network.unet, (900, 800, 700, 600, 500)
    latent = data("latent", (1, restorer.autoencoder.z_channels, 96 // f, 96 // f))
    condition = Condition(latent, restorer.text_encoder([""]), data("image", (1, 3, 96, 96)))

    def run(tile, timesteps):
        denoise = restorer.denoiser(None, restorer.options(tile=tile, **every))
        return [denoise(latent + t / 1000, t, condition) for t in timesteps]

    expected, calls, large = run(32, chain[2:]), [], 64 // f

    def scarce(module, inputs):
        side = inputs[0].shape[-1]
        calls.append(side)
        if side == large and calls.count(large) in (2 * 4 + 2, 2 * 4 + 3):  # the second plan has the same windows
            raise torch.OutOfMemoryError

    hook = unet.input_blocks[0].register_forward_pre_hook(scarce)
    found = run(64, chain)[2:]
    hook.remove()
    assert calls.count(large) == 2 * 4 + 3
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)
