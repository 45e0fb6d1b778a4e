"""What every training minimises, against closed forms: losses of known outputs, and the latents that networks see.

Weights of zero make a layer say its bias, whatever it is shown: so outputs and posteriors are known.
"""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.control import LatentBranch
from diffbir.model.networks.text import NullTextEncoder
from diffbir.model.networks.unet import UNet
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.training.autoencoder import AutoencoderTraining
from diffbir.model.training.prior import PriorTraining
from diffbir.model.training.stage1 import Stage1
from diffbir.model.training.stage2 import Stage2
from diffbir.utils.metrics import LPIPS

MEAN, DEVIATION, SCALE = 0.7, 0.2, 1.5  # of every posterior; and what latents are multiplied by
UNET = {"in_channels": 4, "model_channels": 16, "channel_mult": [1], "num_res_blocks": 1, "attention_factors": []}
UNET |= {"head_channels": 16, "context_dim": None, "norm_groups": 4}


def says(layer: nn.Module, *values: float) -> None:
    """Makes a convolution's output constant, a value for each equal part of its channels."""
    nn.init.zeros_(layer.weight)
    with torch.no_grad():
        for part, value in zip(layer.bias.chunk(len(values)), values, strict=True):
            part.fill_(value)


def autoencoder(output: float = 0.5) -> AutoencoderKL:
    """Every image has the posterior N(MEAN, DEVIATION^2) and is decoded to `output`."""
    network = AutoencoderKL(channels=8, channel_mult=[1, 1], num_res_blocks=1, norm_groups=4, scale_factor=SCALE)
    says(network.quant_conv, MEAN, 2 * math.log(DEVIATION))
    says(network.decoder.conv_out, 2 * output - 1)
    return network


def step(module: nn.Module, batch: dict) -> Tensor:
    """The loss of one training step, outside of a trainer."""
    module.log = module.log_dict = lambda *_, **__: None
    loss = module.training_step(batch, 0)
    return loss["loss"] if isinstance(loss, dict) else loss


@pytest.mark.parametrize(
    "loss, expected",
    [("psnr", math.log(1e-3)), ("l2", (1e-2 + 1e-4) / 2), ("l1", (1e-1 + 1e-2) / 2)],
)
def test_stage_1_loses_what_its_name_says(loss, expected):
    """Errors of 0.1 and 0.01: -PSNR is the mean of both images' logarithms, not the logarithm of the mean."""
    module = Stage1(nn.Identity(), loss, optimizer=None)
    hq = torch.full((2, 3, 8, 8), 0.5)
    lq = hq + torch.tensor([0.1, -0.01]).view(2, 1, 1, 1)
    assert step(module, {"lq": lq, "hq": hq}).item() == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("kl_weight, perceptual_weight", [(0, 0), (0.1, 0), (0, 2)], ids=["l1", "kl", "lpips"])
def test_the_autoencoder_loses_l1_at_two_sizes_and_perceptual_distance_and_divergence(kl_weight, perceptual_weight):
    """Output c + e, image a checkerboard c - d, c + d with d > e: an L1 of d at full size and of e at 1/8."""
    c, d, e = 0.5, 0.3, 0.1
    module = AutoencoderTraining(autoencoder(c + e), perceptual_weight, kl_weight, optimizer=None)
    y, x = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    hq = (c + d * (1 - 2 * ((x + y) % 2))).expand(1, 3, 64, 64).float()
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(MEAN, DEVIATION), torch.distributions.Normal(0.0, 1.0)
    )
    lpips = LPIPS()(torch.full_like(hq, c + e), hq).mean()
    assert kl > 1 and lpips > 0.1
    expected = d + e + kl_weight * kl + perceptual_weight * lpips
    assert_close(step(module, {"hq": hq}), expected, rtol=1e-4, atol=0)


def stage2(diffusion: Diffusion, **kwargs) -> Stage2:
    networks = {"unet": UNet(out_channels=4, **UNET), "branch": LatentBranch(**UNET)}
    networks |= {"autoencoder": autoencoder(), "text_encoder": NullTextEncoder()}
    return Stage2(**networks, diffusion=diffusion, optimizer=None, **kwargs)


def prior(diffusion: Diffusion) -> PriorTraining:
    return PriorTraining(UNet(out_channels=4, **UNET), autoencoder(), NullTextEncoder(), diffusion, optimizer=None)


def seen(network: nn.Module, module: nn.Module, batch: dict) -> tuple:
    """The arguments that a network gets in one training step."""
    arguments = []
    network.register_forward_pre_hook(lambda _, args: arguments.extend(args))
    torch.manual_seed(0)
    step(module, batch)
    return tuple(arguments)


def posteriors(batch: int) -> Tensor:
    return torch.tensor([MEAN, 2 * math.log(DEVIATION)]).repeat_interleave(4).view(1, 8, 1, 1).expand(batch, 8, 16, 16)


@pytest.mark.parametrize("training", ["stage 2", "stage 2 on latents", "prior"])
def test_the_clean_latent_is_a_draw_from_the_posterior(training):
    """A diffusion that adds next to no noise shows it to the network as it is."""
    diffusion = Diffusion(timesteps=1, beta_start=1e-12, beta_end=1e-12)
    images = {"hq": torch.rand(8, 3, 32, 32), "lq": torch.rand(8, 3, 32, 32), "prompt": [""] * 8}
    module = prior(diffusion) if training == "prior" else stage2(diffusion)
    if training == "stage 2 on latents":
        images = {"posterior": posteriors(8), "latent": torch.zeros(8, 4, 16, 16), "prompt": [""] * 8}
    network = (module.trained if training == "prior" else module.frozen)["unet"]
    z_0 = seen(network, module, images)[0] / SCALE
    error = DEVIATION / z_0.numel() ** 0.5
    assert z_0.mean().item() == pytest.approx(MEAN, abs=5 * error)
    assert z_0.std().item() == pytest.approx(DEVIATION, abs=5 * error)


def test_the_condition_is_the_mode_of_the_posterior():
    module = stage2(Diffusion())
    batch = {"lq": torch.rand(2, 3, 32, 32), "hq": torch.rand(2, 3, 32, 32), "prompt": [""] * 2}
    _, _, condition = seen(module.trained["branch"], module, batch)
    assert_close(condition.latent, torch.full((2, 4, 16, 16), MEAN * SCALE))


@pytest.mark.parametrize("noise_aug", [0, 1, 200])
def test_the_condition_is_noised_to_a_timestep_below_noise_aug(noise_aug):
    """A latent of ones becomes sqrt(a_t) + sqrt(1 - a_t) eps with t uniform in 0 .. noise_aug - 1: its mean and
    variance, over many images, are those of a_t."""
    diffusion, count = Diffusion(), 64
    module = stage2(diffusion, noise_aug=noise_aug)
    batch = {"posterior": posteriors(count), "latent": torch.ones(count, 4, 16, 16), "prompt": [""] * count}
    _, _, condition = seen(module.trained["branch"], module, batch)
    alpha_bar = diffusion.alpha_bar[:noise_aug] if noise_aug else np.ones(1)
    images = condition.latent.flatten(1)
    variances = images.var(1)
    assert images.mean().item() == pytest.approx(np.sqrt(alpha_bar).mean(), abs=0.01)
    assert variances.mean().item() == pytest.approx((1 - alpha_bar).mean(), rel=0.15)
    assert variances.min() >= 0.8 * (1 - alpha_bar).min()
    assert variances.max() <= 1.2 * (1 - alpha_bar).max()
    assert variances.std().item() == pytest.approx((1 - alpha_bar).std(), rel=0.15, abs=1e-4)


def test_the_validation_loss_has_the_same_noise_every_time_and_timesteps_that_cover_the_chain():
    """In batches of any size, and in any order; what a training draws in between changes nothing."""
    training, count = stage2(Diffusion(), noise_aug=200), 40
    images, timesteps = {key: torch.rand(count, 3, 16, 16) for key in ("hq", "lq")}, []
    training.frozen["unet"].register_forward_pre_hook(lambda _, args: timesteps.append(args[1]))

    def losses(*batches: list[int]) -> Tensor:
        """Of all images, by number."""
        found = torch.zeros(count)
        for numbers in batches:
            torch.rand(3)
            batch = {key: x[numbers] for key, x in images.items()}
            batch |= {"prompt": [""] * len(numbers), "number": torch.tensor(numbers)}
            found[numbers] = training.fixed_losses(batch).detach()
        return found

    whole = losses(list(range(count)))
    assert torch.histc(timesteps[0].float(), 10, 0, 1000).tolist() == pytest.approx([4] * 10, abs=1)
    assert_close(losses([5, 0, 39], [n for n in range(count) if n not in (5, 0, 39)]), whole)
    assert len(set(whole.tolist())) == count
