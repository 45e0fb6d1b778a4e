"""The latent diffusion model: golden numbers at full size, invariants at small size."""

import json
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from diffbir.model.networks.autoencoder import AutoencoderKL, ResnetBlock
from diffbir.model.networks.condition import Condition
from diffbir.model.networks.control import ImageControlNet, LatentBranch
from diffbir.model.networks.layers import reflect_index, timestep_embedding
from diffbir.model.networks.text import NullTextEncoder, OpenClipTextEncoder
from diffbir.model.networks.unet import UNet
from diffbir.model.sampling.denoiser import ControlledUNet
from tests.golden.fill import data, fill, image

SMALL = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[2], head_channels=16)
PROMPTS = ["", "a photo of a cat", "low quality, blurry, low-resolution, noisy, unsharp, weird textures"]


def agree(output: torch.Tensor, golden: torch.Tensor) -> None:
    assert ((output - golden).abs().max() / golden.std()).item() < 1e-4


@pytest.mark.slow
@torch.no_grad()
def test_full_size_unet_and_branch_compute_the_published_numbers(models_golden):
    x, hint = data("x_noisy", (1, 4, 16, 16)), data("hint", (1, 4, 16, 16))
    t, text = torch.tensor([500]), data("context", (1, 77, 1024))
    branch = fill(LatentBranch())
    control = branch(x, t, Condition(latent=hint, text=text))
    del branch
    agree(torch.stack([c.mean() for c in control]), models_golden["control_mean"])
    agree(torch.stack([c.std() for c in control]), models_golden["control_std"])
    for i in (0, 5, 12):
        agree(control[i][:, 0], models_golden[f"control_{i}_channel0"])
    unet = fill(UNet())
    agree(unet(x, t, text), models_golden["unet_out"])
    agree(unet(x, t, text, control), models_golden["eps_out"])
    agree(unet(x, t, text, [0.5 * c for c in control]), models_golden["eps_out_strength_0.5"])


@pytest.mark.slow
@torch.no_grad()
def test_full_size_autoencoder_computes_the_published_numbers(models_golden):
    net = fill(AutoencoderKL())
    q = net.posterior(image("vae_in", (1, 3, 64, 48)))
    agree(q.mean, models_golden["vae_mode"])
    agree(q.logvar, models_golden["vae_logvar"])
    agree(net.reconstruct(data("vae_z", (1, 4, 8, 6))) * 2 - 1, models_golden["vae_decode"])


@pytest.mark.slow
@torch.no_grad()
def test_full_size_text_encoder_computes_the_published_numbers(models_golden):
    net = fill(OpenClipTextEncoder())
    assert torch.equal(net.tokenize(PROMPTS), models_golden["clip_tokens"])
    output = net(PROMPTS)
    agree(output[..., :16], models_golden["clip_out_head"])
    agree(output.mean(-1), models_golden["clip_out_mean"])


def small_pair(kind: type = LatentBranch, context_dim: int | None = None, **kwargs):
    unet = fill(UNet(**SMALL, context_dim=context_dim))
    branch = kind(**SMALL, context_dim=context_dim, **kwargs)
    branch.init_from(unet)
    condition = Condition(
        latent=torch.randn(2, 4, 8, 8),
        text=None if context_dim is None else torch.randn(2, 5, context_dim),
        image=torch.rand(2, 3, 32, 32),
    )
    return unet, branch, condition


@pytest.mark.parametrize("kind, kwargs", [(LatentBranch, {}), (ImageControlNet, {"image_widths": [8, 12, 16]})])
@pytest.mark.parametrize("context_dim", [None, 24])
@torch.no_grad()
def test_a_new_branch_leaves_the_unet_unchanged(kind, kwargs, context_dim):
    unet, branch, condition = small_pair(kind, context_dim, **kwargs)
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    alone = unet(z_t, t, condition.text)
    assert alone.std() > 0.1  # the comparison would be empty if the UNet said nothing
    assert_close(ControlledUNet(unet, branch)(z_t, t, condition), alone, rtol=0, atol=0)


@torch.no_grad()
def test_a_new_branch_computes_the_encoder_of_its_unet_whatever_the_condition():
    """The condition's channels start at zero, so the features before the zero convolutions are the UNet's own."""
    unet, branch, condition = small_pair()
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    x = torch.cat([z_t, condition.latent], dim=1)
    for own, copied in zip(unet.encode(z_t, unet.embed(t), None), branch.encode(x, branch.embed(t), None), strict=True):
        assert_close(copied, own, rtol=0, atol=0)


def test_initialisation_follows_the_published_list():
    """Which keys are extended by zeros and which are new, at full size, without memory."""
    published = json.loads((Path(__file__).parents[2] / "golden" / "control_init.json").read_text())
    with torch.device("meta"):
        unet, branch = UNet().state_dict(), LatentBranch().state_dict()
    assert sorted(set(branch) - set(unet)) == published["scratch"]
    assert [k for k in branch if k in unet and branch[k].shape != unet[k].shape] == published["new_zero"]


def test_the_condition_reaches_the_output_once_trained():
    unet, branch, condition = small_pair()
    fill(branch)
    z_t, t = torch.randn(2, 4, 8, 8), torch.tensor([3, 700])
    network = ControlledUNet(unet, branch)
    other = Condition(latent=condition.latent + 1)
    assert (network(z_t, t, condition) - network(z_t, t, other)).abs().mean() > 1e-3
    assert_close(network(z_t, t, condition, strength=0.0), unet(z_t, t))


def test_every_parameter_of_unet_and_branch_gets_a_gradient():
    unet, branch, condition = small_pair(context_dim=24)
    fill(branch)
    ControlledUNet(unet, branch)(torch.randn(2, 4, 8, 8), torch.tensor([3, 700]), condition).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in [*unet.parameters(), *branch.parameters()])


def test_timestep_embedding_closed_form():
    t, dim = torch.tensor([0, 1, 999]), 8
    expected = [
        [torch.cos(v * 10000 ** (-i / 4)) for i in torch.arange(4.0)]
        + [torch.sin(v * 10000 ** (-i / 4)) for i in torch.arange(4.0)]
        for v in t.float()
    ]
    assert_close(timestep_embedding(t, dim), torch.tensor(expected), rtol=0, atol=1e-4)


@torch.no_grad()
def test_autoencoder_scales_and_shapes():
    net = fill(AutoencoderKL(channels=8, channel_mult=[1, 2, 4], num_res_blocks=1, norm_groups=4, scale_factor=0.5))
    x = torch.rand(2, 3, 16, 24)
    q = net.posterior(x)
    assert_close(net.encode(x), 0.5 * q.mean)
    assert_close(net.decode(0.5 * q.mean), net.reconstruct(q.mean))
    assert net.decode(net.encode(x)).shape == x.shape
    draws = torch.stack([q.sample() for _ in range(2000)])
    assert_close(draws.mean(0), q.mean, rtol=0, atol=0.2)
    assert_close(draws.std(0), torch.exp(0.5 * q.logvar), rtol=0.15, atol=0)


@torch.no_grad()
def test_a_decoder_of_another_shape():
    """Encodes as an autoencoder with the encoder's shape does, and decodes as one with the decoder's."""
    shape = dict(channels=8, channel_mult=[1, 2, 4], num_res_blocks=1, norm_groups=4, mid_attention=False)
    its = dict(patch=2, channel_mult=[2, 4], norm_groups=0)
    net, encoder, decoder = (
        fill(AutoencoderKL(**params)) for params in (shape | {"decoder": its}, shape, {**shape, **its})
    )
    encoder.encoder.load_state_dict(net.encoder.state_dict())
    decoder.decoder.load_state_dict(net.decoder.state_dict())
    x, z = torch.rand(1, 3, 16, 24), torch.randn(1, 4, 4, 6)
    assert torch.equal(net.encode(x), encoder.encode(x)) and torch.equal(net.decode(z), decoder.decode(z))
    with pytest.raises(ValueError, match="the encoder's factor is 4, the decoder's 8"):
        AutoencoderKL(**shape, decoder={"patch": 2})


def test_kl_agrees_with_torch_distributions():
    from torch.distributions import Normal, kl_divergence

    from diffbir.model.networks.autoencoder import DiagonalGaussian

    q = DiagonalGaussian(torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3))
    expected = kl_divergence(Normal(q.mean, torch.exp(0.5 * q.logvar)), Normal(0.0, 1.0)).sum(dim=(1, 2, 3))
    assert_close(q.kl(), expected)


def test_small_text_encoder_depends_on_the_prompt_and_null_says_nothing():
    net = OpenClipTextEncoder(width=32, layers=3, heads=2)
    output = net(["a cat", "a dog"])
    assert output.shape == (2, 77, 32)
    assert_close(output[0, :2], output[1, :2])  # start token and "a": causal attention sees no further
    assert (output[0, 2:] - output[1, 2:]).abs().max() > 1e-3
    assert NullTextEncoder()(["a cat"]) is None


@pytest.mark.parametrize("n", [1, 2, 3, 7])
def test_reflection_of_any_length_is_periodic(n):
    index = reflect_index(n, 0, 40).tolist()
    bounce = [*range(n), *range(n - 2, 0, -1)] if n > 1 else [0]
    assert index == [bounce[i % len(bounce)] for i in range(n + 40)]


def test_checkpointing_changes_neither_output_nor_gradients():
    outputs, gradients = [], []
    for checkpointing in (False, True):
        unet = fill(UNet(**SMALL, context_dim=24, checkpointing=checkpointing))
        branch = fill(LatentBranch(**SMALL, context_dim=24, checkpointing=checkpointing))
        latent, text = data("latent", (2, 4, 8, 8)), data("text", (2, 5, 24))
        condition = Condition(latent=latent, text=text)
        output = ControlledUNet(unet, branch)(data("z", (2, 4, 8, 8)), torch.tensor([3, 700]), condition)
        output.square().mean().backward()
        outputs.append(output)
        gradients.append({k: p.grad for net in (unet, branch) for k, p in net.named_parameters()})
    assert torch.equal(*outputs)
    assert_close(*gradients, rtol=0, atol=0)


def test_checkpointing_keeps_fewer_activations():
    def kept(checkpointing: bool) -> int:
        unet, total = UNet(**SMALL, context_dim=None, checkpointing=checkpointing), 0

        def count(x):
            nonlocal total
            total += x.nbytes
            return x

        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            unet(torch.randn(2, 4, 16, 16), torch.tensor([3, 700]))
        return total

    assert kept(True) < 0.4 * kept(False)


@pytest.mark.parametrize("groups", [0, 2])
def test_in_place_a_block_computes_the_same_and_leaves_its_input(groups):
    """Without a norm, what SiLU sees is the input that the skip needs."""
    block, x = ResnetBlock(4, 4, groups), data("x", (1, 4, 6, 6))
    expected, before = block(x).detach(), x.clone()
    with torch.inference_mode():
        assert_close(block(x), expected)
    assert torch.equal(x, before)
