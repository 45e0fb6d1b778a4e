"""A network is found wherever a training put it in its file."""

import functools
import logging
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.control import LatentBranch
from diffbir.model.networks.rrdbnet import RRDBNet
from diffbir.model.networks.text import OpenClipTextEncoder
from diffbir.model.networks.unet import UNet
from diffbir.model.weights.checkpoint import CheckpointError, load_weights, read_state_dict
from diffbir.model.weights.diffusers_layout import to_diffusers
from tests.golden.fill import fill

State = dict[str, Tensor]


def rrdbnet(salt: int = 0) -> RRDBNet:
    return fill(RRDBNet(features=4, blocks=1, growth=2), salt=salt)


def shifted(state: State, by: float = 1.0) -> State:
    """Another network of the same keys and shapes."""
    return {key: value + by for key, value in state.items()}


def prefixed(state: State, prefix: str) -> State:
    return {prefix + key: value for key, value in state.items()}


def assert_loads(content: dict, expected: State, network: nn.Module, path: Path, role: str | None = None) -> None:
    torch.save(content, path)
    state = load_weights(network, path, role).state_dict()
    assert state.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(state[key], value), key


@pytest.fixture(scope="module")
def state() -> State:
    return rrdbnet().state_dict()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "weights.pth"


@pytest.mark.parametrize("wrapper", ["params", "params_ema", "model", "ema", "net", "generator", "weights", "any.name"])
@pytest.mark.parametrize("beside", [{}, {"epoch": 3, "config": {"lr": 1e-4}, "best": None, "optimizer": [{"lr": 0.1}]}])
def test_a_wrapper_of_any_name(state, path, wrapper, beside):
    assert_loads({wrapper: state, **beside}, state, rrdbnet(salt=1), path, "stage1")


@pytest.mark.parametrize("prefix", ["", "module."])
def test_real_esrgan_as_basicsr_writes_it(path, prefix):
    """The names of its file RealESRGAN_x4plus.pth, https://github.com/xinntao/Real-ESRGAN/releases/tag/v0.1.0."""
    names = ["conv_first", *(f"body.{b}.rdb{i}.conv{j}" for b in (0, 1) for i in (1, 2, 3) for j in (1, 2, 3, 4, 5))]
    names += ["conv_body", "conv_up1", "conv_up2", "conv_hr", "conv_last"]
    make = functools.partial(RRDBNet, features=4, blocks=2, growth=2)
    state = fill(make()).state_dict()
    theirs = [f"{prefix}{name}.{part}" for name in names for part in ("weight", "bias")]
    assert_loads({"params_ema": dict(zip(theirs, state.values(), strict=True))}, state, make(), path, "stage1")


@pytest.mark.parametrize("nested", [("state_dict", "model"), ("checkpoint", "model", "params")])
def test_wrappers_in_wrappers(state, path, nested):
    content = state
    for name in reversed(nested):
        content = {name: content, "step": 7}
    assert_loads(content, state, rrdbnet(salt=1), path)
    assert read_state_dict(path).keys() == state.keys()


PREFIXES = [
    "module.",
    "_orig_mod.",
    "model.",
    "net_g.",
    "rrdbnet.",
    "module._orig_mod.",
    "model.net_g.module.",
    "stage1.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("role", [None, "stage1"])
def test_prefixes_that_all_keys_share(state, path, prefix, role):
    assert_loads({"state_dict": prefixed(state, prefix)}, state, rrdbnet(salt=1), path, role)


@pytest.mark.parametrize("inside", ["_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."])
def test_modules_that_were_wrapped_one_by_one(state, path, inside):
    content = {key.replace("RRDB_trunk.0.", f"RRDB_trunk.0.{inside}"): value for key, value in state.items()}
    assert content.keys() != state.keys()
    assert_loads(content, state, rrdbnet(salt=1), path)


@pytest.mark.parametrize(
    "average, raw",
    [
        ("params_ema", "params"),
        ("ema", "model"),
        ("model_ema", "model"),
        ("ema_state_dict", "state_dict"),
        ("g_ema", "g"),
        ("ema", "non_ema"),
    ],
)
@pytest.mark.parametrize("first", ["average", "raw"])
def test_the_average_is_taken_where_both_are_there_and_it_is_said(state, path, average, raw, first, caplog):
    content = {average: state, raw: shifted(state)}
    assert_loads(dict(sorted(content.items(), reverse=first == "raw")), state, rrdbnet(salt=1), path)
    assert f"{path}: '{average}' is taken, and not '{raw}'" in caplog.text


def test_an_average_beside_bare_keys(state, path, caplog):
    assert_loads({**shifted(state), "ema": state}, state, rrdbnet(salt=1), path)
    assert "'ema' is taken, and not 'the top level'" in caplog.text


def test_the_average_of_a_training_here_is_taken(state, path, caplog):
    content = {
        "state_dict": prefixed(shifted(state), "trained.stage1."),
        "callbacks": {"EMA": {"steps": 3, "average": prefixed(state, "trained.stage1.")}, "Checkpoint": {"best": None}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(3)}}}],
    }
    assert_loads(content, state, rrdbnet(salt=1), path, "stage1")
    assert "'callbacks: EMA: average: trained.stage1' is taken, and not 'state_dict: trained.stage1'" in caplog.text


def test_the_generator_of_a_pair_is_the_one_that_fits(state, path, caplog):
    """Both have a `conv_first`; what is left out is said."""
    critic = {
        "conv_first.weight": torch.ones(8, 3, 3, 3),
        "conv_first.bias": torch.ones(8),
        "head.weight": torch.ones(1),
    }
    caplog.set_level(logging.INFO)
    assert_loads({"net_d": critic, "net_g": state}, state, rrdbnet(salt=1), path)
    assert "left out: net_d: 3" in caplog.text
    assert_loads(prefixed(critic, "net_d.") | prefixed(state, "net_g."), state, rrdbnet(salt=1), path)


def test_what_a_training_keeps_beside_is_left_out(state, path):
    optimizer = {"state": {key: {"exp_avg": value} for key, value in shifted(state).items()}}
    beside = {"step": 3, "epoch": torch.tensor(3), "loss_scale": torch.tensor(1.5), "optimizer": optimizer}
    assert_loads({**state, **beside}, state, rrdbnet(salt=1), path)
    assert_loads({"model": state, **beside, "rng_state": torch.ones(5056).byte()}, state, rrdbnet(salt=1), path)


def test_two_networks_of_the_same_shape_are_not_chosen_between(state, path):
    torch.save({"first": state, "second": shifted(state)}, path)
    with pytest.raises(CheckpointError, match=r"holds the network several times \((first, second|second, first)\)"):
        load_weights(rrdbnet(), path)
    assert_loads({"stage1": state, "other": shifted(state)}, state, rrdbnet(salt=1), path, "stage1")


@pytest.mark.parametrize("prefix", ["", "module.", "net_g."])
@pytest.mark.parametrize("wrapper", [None, "params"])
def test_a_key_that_is_too_much_is_refused_under_any_prefix(state, path, prefix, wrapper):
    content = prefixed({**state, "RRDB_trunk.1.RDB1.conv1.weight": torch.ones(2, 4, 3, 3)}, prefix)
    torch.save({wrapper: content} if wrapper else content, path)
    with pytest.raises(
        CheckpointError, match=re.escape(f"{path} does not fit RRDBNet: 1 unexpected (RRDB_trunk.1.RDB1.conv1.")
    ):
        load_weights(rrdbnet(), path)


def test_a_key_that_is_missing_is_not_taken_from_elsewhere(state, path):
    """The critic has a key of that name and shape."""
    rest = {key: value for key, value in state.items() if key != "conv_first.bias"}
    torch.save({"net_g": rest, "net_d": {"conv_first.bias": state["conv_first.bias"]}}, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(conv_first.bias\)"):
        load_weights(rrdbnet(), path)


# Stable Diffusion's parts


@pytest.fixture(scope="module")
def vae() -> AutoencoderKL:
    return fill(AutoencoderKL(channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4), salt=1)


def blank(vae: AutoencoderKL) -> AutoencoderKL:
    return AutoencoderKL(channels=8, channel_mult=[1, 2], num_res_blocks=1, norm_groups=4)


@pytest.mark.parametrize("prefix", ["", "first_stage_model.", "vae.", "model.", "module.vae."])
@pytest.mark.parametrize("layout", ["ours", "theirs"])
def test_an_autoencoder_with_its_loss_and_under_any_prefix(vae, path, prefix, layout):
    ours = vae.state_dict()
    state = ours if layout == "ours" else to_diffusers("autoencoder", ours)
    state = state | {"loss.logvar": torch.ones(()), "loss.discriminator.main.0.weight": torch.ones(4, 3, 4, 4)}
    state |= {"model_ema.decay": torch.ones(()), "model_ema.encoderconv_inweight": torch.ones(3)}
    assert_loads({"state_dict": prefixed(state, prefix), "epoch": 1}, ours, blank(vae), path, "autoencoder")


@pytest.mark.parametrize("prefix", ["text_model.", "", "text_encoder.text_model.", "te."])
def test_a_text_encoder_of_transformers_under_any_prefix(prefix, path):
    encoder = fill(OpenClipTextEncoder(width=32, layers=3, heads=2), salt=1)
    theirs = {k.removeprefix("text_model."): v for k, v in to_diffusers("text_encoder", encoder.state_dict()).items()}
    save_file({prefix + key: value.clone() for key, value in theirs.items()}, path)
    loaded = load_weights(OpenClipTextEncoder(width=32, layers=3, heads=2), path, "text_encoder").state_dict()
    used = [k for k in loaded if "resblocks.2" not in k and not k.endswith(("text_projection", "logit_scale"))]
    assert len(used) > 20
    for key in used:
        assert torch.equal(loaded[key], encoder.state_dict()[key]), key


def test_a_diffusers_key_that_is_missing_is_not_taken_from_elsewhere(vae, path):
    state = to_diffusers("autoencoder", vae.state_dict())
    extra = {"encoder.conv_in.bias": state.pop("encoder.conv_in.bias")}
    torch.save(prefixed(state, "vae.") | extra, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(encoder.conv_in.bias\)"):
        load_weights(blank(vae), path, "autoencoder")


SMALL = dict(model_channels=32, channel_mult=[1, 2], attention_factors=[1], head_channels=16, norm_groups=8)
# Of the attention to text that adds zero, which a UNet without text has there.
SILENT = re.compile(r"transformer_blocks\.\d+\.(norm2|attn2)\.")


@pytest.mark.parametrize("prefix", ["", "controlnet.", "module.unet.controlnet."])
@pytest.mark.parametrize("text", [24, None])
def test_a_latent_branch_as_a_controlnet_under_any_prefix(prefix, text, path):
    network = fill(LatentBranch(**SMALL, context_dim=text))
    theirs = prefixed(to_diffusers("branch", network.state_dict()), prefix)
    assert_loads(theirs, network.state_dict(), fill(LatentBranch(**SMALL, context_dim=text), salt=1), path, "branch")
    del theirs[f"{prefix}controlnet_cond_embedding.conv_in.bias"]
    torch.save(theirs, path)
    with pytest.raises(CheckpointError, match=r"1 missing \(input_blocks.0.0.weight\)"):
        load_weights(network, path, "branch")


@pytest.mark.parametrize("prefix", ["", "unet."])
@pytest.mark.parametrize("silent", [True, False])
def test_a_unet_without_text_with_and_without_the_attention_that_adds_zero(prefix, silent, path):
    network = fill(UNet(**SMALL, context_dim=None))
    theirs = to_diffusers("unet", network.state_dict())
    kept = {key: value for key, value in theirs.items() if silent or not SILENT.search(key)}
    assert (len(kept) < len(theirs)) == (not silent)
    assert_loads(
        prefixed(kept, prefix), network.state_dict(), fill(UNet(**SMALL, context_dim=None), salt=1), path, "unet"
    )
