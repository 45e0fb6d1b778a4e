"""Restoring in one step: which networks run, the dial, and what a preset may say."""

import pytest
import torch
from omegaconf import OmegaConf
from torch.testing import assert_close

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.control import LatentBranch
from diffbir.model.networks.lora import add_lora, factors, merge_lora
from diffbir.model.networks.text import NullTextEncoder
from diffbir.model.networks.unet import UNet
from diffbir.model.restorer import OneStep, Restorer
from diffbir.model.sampling.denoiser import ControlledUNet
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.weights.checkpoint import save_weights
from diffbir.utils.cli import UserError

SIZE = dict(
    model_channels=16, channel_mult=[1, 2], attention_factors=[2], head_channels=8, context_dim=None, norm_groups=8
)
UNET = dict(num_res_blocks=1, **SIZE)
AUTOENCODER = dict(
    patch=2, channels=16, channel_mult=[1], num_res_blocks=1, z_channels=4, mid_attention=False, norm_groups=0
)
TRAINED = {"start_t": 200, "steps": 1, "residual": 1.0, "color": "none", "guidance_scale": 0.0}


def disturbed(network: torch.nn.Module, seed: int) -> torch.nn.Module:
    g = torch.Generator().manual_seed(seed)
    for p in network.parameters():
        if p.dim() > 1:  # of unit gain, so that nothing saturates
            p.data = torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5
        else:
            p.data = torch.full_like(p, float(p.data.mean() > 0.5))  # scales of norms 1, biases 0
    return network.eval()


def pair(seed: int) -> dict[str, torch.nn.Module]:
    return {"unet": disturbed(UNet(**UNET), seed), "branch": disturbed(LatentBranch(**UNET), seed + 1)}


def restorer(chain: bool = True) -> Restorer:
    return Restorer(
        autoencoder=disturbed(AutoencoderKL(**AUTOENCODER), 9),
        text_encoder=NullTextEncoder(),
        diffusion=Diffusion(prediction="v", zero_terminal_snr=True),
        one_step=OneStep(ControlledUNet(**pair(3)), TRAINED),
        **(pair(1) if chain else {}),
    )


def photo() -> torch.Tensor:
    return torch.rand(1, 3, 24, 32, generator=torch.Generator().manual_seed(0))


def test_each_solver_runs_its_own_networks_with_its_own_options():
    r = restorer()
    assert r.network_for("ddim") is r.network
    assert r.network_for("one_step") is r.one_step.network
    assert r.options(solver="one_step").residual == 1.0 and r.options(solver="one_step").steps == 1
    assert r.options(solver="ddim").residual == 0.0 and r.options(solver="ddim").steps == 50
    assert r.options(solver="one_step", residual=0.5).residual == 0.5  # what is asked for counts most
    one = r.restore(photo(), r.options(solver="one_step")).image
    assert torch.equal(one, r.restore(photo(), r.options(solver="one_step", seed=7)).image)  # there is no noise
    alone = restorer(chain=False)
    assert torch.equal(one, alone.restore(photo(), alone.options(solver="one_step")).image)


def test_the_dial_goes_from_the_network_s_result_to_stage_1_to_the_pixel():
    """z = E(I_reg) + lambda (z_0 - E(I_reg)) with lambda = 1 / (1 + k): the distance falls as lambda, exactly."""
    r = restorer()
    i_reg = photo()
    latent = r.autoencoder.encode(i_reg)
    found = []
    for scale in (0, 1e2, 1e3, 1e4, 1e5, 1e12):
        estimates, options = [], r.options(solver="one_step", guidance_scale=scale)
        image = r.restore(i_reg, options, on_step=lambda i, z_0, estimates=estimates: estimates.append(z_0)).image
        found.append((scale, estimates[-1] - latent, (image - i_reg).abs().mean().item()))
    whole = found[0][1]
    elements = 4 * 256**2  # of the latent of a 512x512 image
    for scale, difference, _ in found:
        assert_close(difference, whole / (1 + 2 * scale / elements), rtol=1e-3, atol=1e-5)
    distances = [distance for *_, distance in found]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 1e-3 and distances[-1] < 1e-6


def test_what_is_missing_is_said():
    with pytest.raises(UserError, match="no networks for solver one_step"):
        r = Restorer(autoencoder=AutoencoderKL(**AUTOENCODER), diffusion=Diffusion(), **pair(1))
        r.restore(photo(), r.options(solver="one_step"))
    alone = restorer(chain=False)
    with pytest.raises(UserError, match="restore in one step; use solver one_step instead of ddpm"):
        alone.restore(photo(), alone.options(solver="ddpm"))
    with pytest.raises(UserError, match="stage 1 alone"):
        Restorer().restore(photo(), restorer().options(solver="one_step"))


def config(**one_step):
    targets = {
        "autoencoder": ("model.networks.autoencoder.AutoencoderKL", AUTOENCODER),
        "text_encoder": ("model.networks.text.NullTextEncoder", {}),
        "unet": ("model.networks.unet.UNet", UNET),
        "branch": ("model.networks.control.LatentBranch", UNET),
    }
    return OmegaConf.create(
        {
            "networks": {name: {"target": target, "params": params} for name, (target, params) in targets.items()},
            "diffusion": {"target": "model.sampling.diffusion.Diffusion", "params": {"prediction": "v"}},
            "sampling": {"solver": "one_step"},
            "one_step": {"sampling": TRAINED, **one_step},
        }
    )


def test_a_preset_names_weights_for_one_step_beside_those_of_the_chain(tmp_path):
    for name, network in pair(5).items():
        save_weights(network.state_dict(), tmp_path / f"{name}.safetensors")
    files = {name: str(tmp_path / f"{name}.safetensors") for name in ("unet", "branch")}
    both = Restorer.from_config(config(weights=files))
    assert both.options().solver == "one_step" and both.options().start_t == 200
    own = dict(both.one_step.network.unet.named_parameters())
    for name, value in pair(5)["unet"].named_parameters():
        assert torch.equal(own[name], value)
    assert not torch.equal(
        both.network.unet.input_blocks[0][0].weight, both.one_step.network.unet.input_blocks[0][0].weight
    )
    alone = Restorer.from_config(config())
    assert alone.network is None and alone.one_step is not None


def test_one_step_may_be_additions_to_the_weights_of_the_chain(tmp_path):
    adapted = add_lora(UNet(**UNET), 2)
    for p in adapted.parameters():
        p.data += 0.1 if p.requires_grad else 0
    additions = {f"unet.{key}": value for key, value in factors(adapted.state_dict(), adapted).items()}
    file = tmp_path / "lora.safetensors"
    save_weights(additions, file)
    for name, network in pair(5).items():
        save_weights(network.state_dict(), tmp_path / f"{name}.safetensors")
    save_weights(disturbed(AutoencoderKL(**AUTOENCODER), 9).state_dict(), tmp_path / "autoencoder.safetensors")
    preset = config(lora=str(file))
    preset.weights = {name: str(tmp_path / f"{name}.safetensors") for name in ("unet", "branch", "autoencoder")}
    both = Restorer.from_config(preset)
    for key, value in both.network.unet.state_dict().items():
        assert torch.equal(value, pair(5)["unet"].state_dict()[key])  # the chain keeps its own
    expected = merge_lora(pair(5)["unet"], factors(adapted.state_dict(), adapted)).state_dict()
    for key, value in both.one_step.network.unet.state_dict().items():
        assert torch.equal(value, expected[key])
    assert both.one_step.network.branch is both.network.branch  # what isn't changed is there once
    assert both.one_step.autoencoder is both.autoencoder
    own = {"autoencoder.decoder.conv_out.lora_A.weight": torch.ones(1, 16, 1, 1).expand(1, 16, 3, 3)}
    own["autoencoder.decoder.conv_out.lora_B.weight"] = torch.ones(12, 1, 1, 1)
    save_weights({**additions, **own}, file)
    decoding = Restorer.from_config(preset)
    one = [r.restore(photo(), r.options(solver="one_step")).image for r in (both, decoding)]
    assert (one[0] - one[1]).abs().max() > 1e-3
    chains = [r.restore(photo(), r.options(solver="ddim", steps=2)).image for r in (both, decoding)]
    assert torch.equal(*chains)  # they keep their decoder
    save_weights({f"decoder.{key}": value for key, value in additions.items()}, file)
    with pytest.raises(UserError, match=r"lora\.safetensors: 'decoder\..* belongs to none of unet, branch"):
        Restorer.from_config(preset)
    save_weights({"unet.nowhere.lora_A.weight": torch.ones(1)}, file)
    with pytest.raises(UserError, match=r"lora\.safetensors: 'nowhere' is no layer of UNet"):
        Restorer.from_config(preset)


def test_chains_keep_their_networks_beside_whole_weights_and_additions(tmp_path):
    for name, network in {**pair(5), "autoencoder": disturbed(AutoencoderKL(**AUTOENCODER), 9)}.items():
        save_weights(network.state_dict(), tmp_path / f"{name}.safetensors")
    other = {"unet": disturbed(UNet(**UNET), 7), "autoencoder": disturbed(AutoencoderKL(**AUTOENCODER), 10)}
    for name, network in other.items():
        save_weights(network.state_dict(), tmp_path / f"other_{name}.safetensors")
    adapted = add_lora(UNet(**UNET), 2)
    for p in adapted.parameters():
        p.data += 0.1 if p.requires_grad else 0
    additions = factors(adapted.state_dict(), adapted)
    save_weights({f"unet.{key}": value for key, value in additions.items()}, tmp_path / "lora.safetensors")
    whole = {name: str(tmp_path / f"other_{name}.safetensors") for name in other}
    preset = config(weights=whole, lora=str(tmp_path / "lora.safetensors"))
    preset.weights = {name: str(tmp_path / f"{name}.safetensors") for name in ("unet", "branch", "autoencoder")}
    r, z = Restorer.from_config(preset), torch.randn(1, 4, 12, 16)
    with torch.no_grad():
        assert_close(r.one_step.autoencoder.decode(z), other["autoencoder"].decode(z), rtol=1e-4, atol=1e-4)
        own = disturbed(AutoencoderKL(**AUTOENCODER), 9).decode(z)
        assert_close(r.autoencoder.decode(z), own, rtol=1e-4, atol=1e-4)
    of_one_step = merge_lora(other["unet"], additions).state_dict()
    for key, value in pair(5)["unet"].state_dict().items():
        assert torch.equal(r.network.unet.state_dict()[key], value)
        assert torch.equal(r.one_step.network.unet.state_dict()[key], of_one_step[key])


def test_a_wrong_key_is_named():
    with pytest.raises(UserError, match=r"one_step\.sampling\.stepz"):
        Restorer.from_config(config(sampling={"stepz": 1}))
    with pytest.raises(UserError, match="weight"):
        Restorer.from_config(config(weight={}))
