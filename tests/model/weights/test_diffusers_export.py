"""The folder for diffusers: what its own classes and the folder's pipeline compute, against ours; and the way back."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from diffbir import Restorer
from diffbir.model.build import build_networks
from diffbir.model.networks.condition import Condition
from diffbir.model.networks.control import LatentBranch
from diffbir.model.networks.unet import UNet
from diffbir.model.presets import load_preset
from diffbir.model.sampling.denoiser import ControlledUNet
from diffbir.model.weights.checkpoint import CheckpointError, load_weights, save_weights
from diffbir.model.weights.diffusers_layout import config_json, to_diffusers
from diffbir.utils.image import read_rgb
from scripts import convert_weights
from scripts.diffusers_pipeline import DiffBIRPipeline

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SIZE = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[1, 2], head_channels=16)
SIZE |= dict(context_dim=32, norm_groups=8)
NETWORKS = {
    "stage1": (
        "swinir.SwinIR",
        dict(embed_dim=12, depths=[2], num_heads=[2], window_size=4, unshuffle_scale=2, sf=2, upsampler="nearest+conv"),
    ),
    "autoencoder": ("autoencoder.AutoencoderKL", dict(channels=16, channel_mult=[1, 2], norm_groups=4)),
    "text_encoder": ("text.OpenClipTextEncoder", dict(width=32, layers=3, heads=2)),
    "unet": ("unet.UNet", SIZE),
    "branch": ("control.LatentBranch", SIZE),
}
SAMPLING = dict(
    solver="ddim", steps=4, cfg_scale=2.0, negative_prompt="low quality", guidance_scale=2000.0, residual=0.5
)
PROMPTS = ["", "a photo of a CAT", "  über-naïve? 12,000 €/kg & it's   <x>\n日本", "a " * 100]


def disturbed(network: nn.Module, seed: int) -> nn.Module:
    """Every weight random, of unit gain, so that no path is silent and nothing saturates."""
    g = torch.Generator().manual_seed(seed)
    for name, p in network.named_parameters():
        noise = torch.randn(p.shape, generator=g)
        if p.ndim > 1:
            p.data = noise / math.prod(p.shape[1:]) ** 0.5
        else:
            p.data = 1 + 0.1 * noise if name.endswith("weight") else 0.05 * noise
    return network.eval()


@pytest.fixture(scope="module")
def preset(tmp_path_factory) -> Path:
    """A small model with all five networks, of random weights."""
    folder = tmp_path_factory.mktemp("preset")
    config = {
        "networks": {n: {"target": f"model.networks.{t}", "params": p} for n, (t, p) in NETWORKS.items()},
        "diffusion": {"target": "model.sampling.diffusion.Diffusion", "params": {"prediction": "eps"}},
        "weights": {name: str(folder / f"{name}.safetensors") for name in NETWORKS},
        "sampling": SAMPLING,
    }
    bare = OmegaConf.create({"networks": config["networks"]})
    for i, (name, network) in enumerate(build_networks(bare).items()):
        save_weights(disturbed(network, i).state_dict(), config["weights"][name])
    (folder / "preset.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))
    return folder / "preset.yaml"


@pytest.fixture(scope="module")
def folder(preset, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("sd") / "out"
    assert convert_weights.main(["--preset", str(preset), "--diffusers", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def networks(preset) -> dict[str, nn.Module]:
    return {name: network.eval() for name, network in build_networks(load_preset(preset)).items()}


def photo() -> Image.Image:
    return Image.fromarray(read_rgb("inputs/demo/village-phone.jpg")[:44, :70])


@torch.no_grad()
def relative_difference(ours: dict[str, nn.Module], unet: nn.Module, controlnet: nn.Module, text: Tensor, z: Tensor):
    """Largest difference of the predictions at two timesteps over their standard deviation."""
    c, t = torch.randn(z.shape, generator=torch.Generator().manual_seed(1)), torch.tensor([700, 20])
    own = ControlledUNet(ours["unet"], ours["branch"])(z, t, Condition(c, text))
    hidden = text if text is not None else z.new_zeros(len(z), 1, 1)
    down, middle = controlnet(z, t, hidden, controlnet_cond=c, return_dict=False)
    added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
    theirs = unet(z, t, hidden, **added).sample
    alone = ours["unet"](z, t, text)
    assert (own - alone).std() > 1e-2 * own.std()  # the branch has a say
    return ((own - theirs).abs().max() / own.std()).item()


def test_stock_unet_and_controlnet_predict_what_ours_do(networks, folder):
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    controlnet = diffusers.ControlNetModel.from_pretrained(folder / "controlnet")
    text = networks["text_encoder"](["a cat", ""]).detach()
    assert relative_difference(networks, unet, controlnet, text, torch.randn(2, 4, 8, 12)) < 1e-4


def test_the_stock_pipeline_samples_what_ours_does(preset, networks, folder):
    """StableDiffusionControlNetPipeline from the folder, given the latents of noise and stage 1's result."""
    pipeline = diffusers.StableDiffusionControlNetPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    restorer = Restorer.from_preset(preset, "cpu")
    i_reg = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    found = []
    options = restorer.options(stage="2", seed=5, cfg_scale=3.0, guidance_scale=0.0, tile=0)
    restorer.restore(i_reg, options, on_step=lambda i, z_0: found.append(z_0))
    (theirs,) = pipeline(
        [""],
        image=networks["autoencoder"].encode(i_reg).detach(),
        height=8,
        width=8,
        num_inference_steps=4,
        guidance_scale=3.0,
        negative_prompt=["low quality"],
        latents=torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(5)),
        output_type="latent",
    ).images
    assert (theirs - found[-1][0]).abs().max() < 1e-3 * found[-1].std()


@pytest.mark.parametrize(
    "options", [{}, {"upscale": 1.5, "prompt": "a cat", "seed": 3}, {"color": "none", "min_side": 64}]
)
def test_the_folder_s_pipeline_gives_our_picture(preset, folder, options):
    pipeline = DiffBIRPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    theirs = np.asarray(pipeline(photo(), **options).images[0]).astype(int)
    ours = np.asarray(Restorer.from_preset(preset, "cpu")(photo(), **options)).astype(int)
    assert ours.std() > 10 and abs(theirs - ours).max() <= 1


def test_so_does_that_of_the_embedded_model_which_has_no_text(tmp_path, monkeypatch):
    """Opened as users do, by its path; the same picture to one level in 256, and another for another stage 1."""
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    folder = str(tmp_path / "mini")
    assert convert_weights.main(["--preset", "mini", "--diffusers", folder]) == 0
    pipeline = diffusers.DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    pipeline.set_progress_bar_config(disable=True)
    restorer = Restorer.from_preset("mini", "cpu")
    theirs = np.asarray(pipeline(photo(), steps=5).images[0]).astype(int)
    ours = np.asarray(restorer(photo(), steps=5, solver="ddim")).astype(int)  # not the preset's one step
    assert abs(theirs - ours).max() <= 1
    flat = np.asarray(pipeline(photo(), steps=5, stage1=lambda x: x.mean() + 0 * x).images[0])
    assert abs(flat - theirs).mean() > 10
    with pytest.raises(ValueError, match="unknown option stepz"):
        pipeline(photo(), stepz=5)

    networks = build_networks(load_preset("mini"))
    difference = relative_difference(networks, pipeline.unet, pipeline.controlnet, None, torch.randn(2, 4, 8, 12))
    assert difference < 1e-4
    empty = build_networks(load_preset("mini", overrides=["weights=null"]))
    for name in ("stage1", "autoencoder", "unet", "branch"):
        assert_same(load_weights(empty[name], folder, name), networks[name])


def assert_same(network: nn.Module, expected: nn.Module, unused: tuple[str, ...] = ()) -> None:
    state = network.state_dict()
    for key, value in expected.state_dict().items():
        assert key.startswith(unused) or torch.equal(state[key], value), key


@pytest.mark.parametrize("name", NETWORKS)
def test_the_round_trip_is_bitwise(name, preset, networks, folder):
    """Except what no output depends on, which the file lacks."""
    (network,) = build_networks(load_preset(preset, overrides=["weights=null"]), [name]).values()
    last = "model.transformer.resblocks.2."
    assert_same(
        load_weights(network, folder, name), networks[name], ("model.text_projection", "model.logit_scale", last)
    )


def test_the_tokenizer_counts_as_ours(networks, folder):
    """But for exclamation marks: they fill up prompts, and transformers sets such apart (in published folders too)."""
    theirs = transformers.CLIPTokenizer.from_pretrained(folder / "tokenizer")
    found = theirs(PROMPTS, padding="max_length", truncation=True, max_length=77, return_tensors="pt").input_ids
    assert torch.equal(found, networks["text_encoder"].tokenize(PROMPTS))


def test_a_controlnet_whose_embedding_was_trained_on_is_refused(folder, tmp_path):
    state = load_file(folder / "controlnet/diffusion_pytorch_model.safetensors")
    state["controlnet_cond_embedding.conv_in.weight"][0, 0, 1, 1] += 1e-3
    save_file(state, tmp_path / "trained.safetensors")
    with pytest.raises(CheckpointError, match="its embedding of the condition is no plain convolution"):
        load_weights(LatentBranch(**SIZE), tmp_path / "trained.safetensors", "branch")


def test_a_unet_that_attends_to_text_is_refused_by_one_without(tmp_path):
    size = SIZE | {"context_dim": None}
    state = to_diffusers("unet", UNet(**size).state_dict())
    name = next(key for key in state if key.endswith("attn2.to_out.0.bias"))
    state[name] = torch.ones_like(state[name])
    save_weights(state, tmp_path / "text.safetensors")
    with pytest.raises(CheckpointError, match="it attends to text"):
        load_weights(UNet(**size), tmp_path / "text.safetensors", "unet")


def of_one_network(tmp_path: Path, name: str, target: str, params: dict) -> list[str]:
    """Arguments that convert a preset of one network, of random weights."""
    yaml = {"networks": {name: {"target": f"model.networks.{target}", "params": params}}}
    (tmp_path / "preset.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(yaml)))
    return ["--preset", str(tmp_path / "preset.yaml"), "--diffusers", str(tmp_path / "out")]


@pytest.mark.parametrize(
    "params",
    [{"patch": 2}, {"norm_groups": 0}, {"decoder": {"norm_groups": 0}}, {"decoder": {"patch": 2, "channel_mult": [1]}}],
)
def test_an_autoencoder_that_diffusers_cannot_build_stays_ours(params, tmp_path):
    target, size = NETWORKS["autoencoder"]
    assert convert_weights.main(of_one_network(tmp_path, "autoencoder", target, size | params)) == 0
    folder = tmp_path / "out"
    assert not (folder / "vae").exists()
    weights = f"weights.autoencoder={folder / 'autoencoder.safetensors'}"
    opened = build_networks(load_preset(folder / "autoencoder.yaml", overrides=[weights]))["autoencoder"]
    again = build_networks(load_preset(tmp_path / "preset.yaml"))["autoencoder"]
    assert_same(opened, load_weights(again, folder, "autoencoder"))
    assert opened.patch == params.get("patch", 1) and any(p.any() for p in opened.parameters())


def test_a_branch_that_diffusers_cannot_build_is_refused(tmp_path, capsys):
    size = SIZE | {"hint_channels": 5}
    assert convert_weights.main(of_one_network(tmp_path, "branch", "control.LatentBranch", size)) == 1
    assert "diffusers has no class for LatentBranch with this: 5 channels" in capsys.readouterr().err


@pytest.mark.slow
@torch.no_grad()
def test_full_size_stock_networks_predict_what_ours_do():
    """Stable Diffusion's UNet and the branch with random weights, which both sides share in memory: 5 GB."""
    ours = {"unet": UNet(), "branch": LatentBranch()}
    theirs = []
    for i, (role, network) in enumerate(ours.items()):
        disturbed(network, i)
        config = config_json(role, network)
        with torch.device("meta"):
            their = getattr(diffusers, config["_class_name"]).from_config(config)
        their.load_state_dict(to_diffusers(role, network.state_dict()), assign=True)
        theirs.append(their.eval())
    text = torch.randn(2, 77, 1024)
    assert relative_difference(ours, *theirs, text, torch.randn(2, 4, 16, 16)) < 1e-4
