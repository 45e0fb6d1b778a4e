"""Our networks against those of diffusers and transformers, with the same weights."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.testing import assert_close

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.condition import Condition
from diffbir.model.networks.control import ImageControlNet, LatentBranch
from diffbir.model.networks.text import OpenClipTextEncoder
from diffbir.model.networks.unet import UNet
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.weights.diffusers_layout import (
    COMPONENTS,
    config_json,
    find_component,
    is_diffusers,
    scheduler_json,
    sources,
    to_diffusers,
    unused,
)
from tests.golden.fill import fill

diffusers = pytest.importorskip("diffusers")
transformers = pytest.importorskip("transformers")

SMALL = dict(
    model_channels=32, channel_mult=[1, 2, 3], attention_factors=[1, 4], head_channels=16, context_dim=24, norm_groups=8
)
OTHER = SMALL | dict(num_res_blocks=1, attention_factors=[2], in_channels=3)
VAE = dict(channels=8, channel_mult=[1, 2, 3], norm_groups=4, scale_factor=0.3)
PROMPTS = ["", "a photo of a cat"]

# Role and a small network of ours.
CASES = {
    "latent branch": ("branch", lambda: LatentBranch(**SMALL)),
    "unet": ("unet", lambda: UNet(**SMALL, transformer_depth=2)),
    "another unet": ("unet", lambda: UNet(**OTHER, out_channels=5)),
    "branch": ("branch", lambda: ImageControlNet(image_widths=[8, 12, 16], **SMALL)),
    "another branch": ("branch", lambda: ImageControlNet(image_widths=[8, 16], **OTHER)),
    "autoencoder": ("autoencoder", lambda: AutoencoderKL(**VAE)),
    "autoencoder without attention": (
        "autoencoder",
        lambda: AutoencoderKL(**VAE, num_res_blocks=1, z_channels=3, mid_attention=False),
    ),
    "text encoder": ("text_encoder", lambda: OpenClipTextEncoder(width=32, layers=3, heads=2)),
}
WITHOUT_TEXT = {"unet without text": ("unet", lambda: UNet(**SMALL | dict(context_dim=None)))}


def their_class(config: dict) -> type:
    name = config.get("_class_name") or config["architectures"][0]
    return getattr(transformers if name == "CLIPTextModel" else diffusers, name)


def their_network(role: str, network: nn.Module) -> nn.Module:
    """A new network of theirs, built from our configuration."""
    config = config_json(role, network)
    kind = their_class(config)
    if kind is transformers.CLIPTextModel:
        return kind(transformers.CLIPTextConfig.from_dict(config))
    return kind.from_config(config)


def assemble(role: str, network: nn.Module, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our state, made of a file of theirs; what the file lacks is zero."""
    own = network.state_dict()
    found = {key: source.join([state[k] for k in source.keys]) for key, source in sources(role, own, state).items()}
    return found | {key: torch.zeros_like(own[key]) for key in unused(role, own)}


def save_folder(role: str, network: nn.Module, folder: Path) -> Path:
    """A component of a diffusers folder, as it would be published."""
    file = folder / COMPONENTS.get(role, "controlnet/diffusion_pytorch_model.safetensors")
    file.parent.mkdir()
    state = {k: v.contiguous().clone() for k, v in to_diffusers(role, network.state_dict()).items()}
    save_file(state, file, metadata={"format": "pt"})
    (file.parent / "config.json").write_text(json.dumps(config_json(role, network)))
    return file


def outputs(role: str, ours: nn.Module, theirs: nn.Module) -> list[tuple[Tensor, Tensor]]:
    """What both compute on the same random input."""
    if role in ("unet", "branch"):
        z_t, t = torch.randn(2, theirs.config.in_channels, 8, 12), torch.tensor([3, 700])
        text = torch.randn(2, 5, theirs.config.cross_attention_dim)
    if role == "unet":
        return [(ours(z_t, t, text), theirs(z_t, t, text).sample)]
    if role == "branch" and isinstance(ours, LatentBranch):
        c = torch.randn(2, ours.hint_channels, 8, 12)
        down, middle = theirs(z_t, t, text, controlnet_cond=c, return_dict=False)
        return list(zip(ours(z_t, t, Condition(c, text)), [*down, middle], strict=True))
    if role == "branch":
        f = 2 ** (len(theirs.config.conditioning_embedding_out_channels) - 1)
        image = torch.rand(2, 3, 8 * f, 12 * f)
        # Ours takes images in [0, 1] and shows its first convolution [-1, 1]; theirs shows it what it is given.
        down, middle = theirs(z_t, t, text, controlnet_cond=image * 2 - 1, return_dict=False)
        return list(zip(ours(z_t, t, Condition(text=text, image=image)), [*down, middle], strict=True))
    if role == "autoencoder":
        x, z = torch.rand(2, 3, 16, 24), torch.randn(2, ours.z_channels, 4, 6)
        q, their_q = ours.posterior(x), theirs.encode(x * 2 - 1).latent_dist
        return [
            (q.mean, their_q.mean),
            (q.logvar, their_q.logvar),
            (ours.encode(x), their_q.mode() * theirs.config.scaling_factor),
            (ours.decode(z), theirs.decode(z / theirs.config.scaling_factor).sample / 2 + 0.5),
        ]
    return [(ours(PROMPTS), theirs(input_ids=ours.tokenize(PROMPTS)).last_hidden_state)]


def assert_same_outputs(role: str, ours: nn.Module, theirs: nn.Module) -> None:
    for own, their in outputs(role, ours.eval(), theirs.eval()):
        assert own.std() > 1e-3  # the comparison would be empty if the networks said nothing
        assert ((own - their).abs().max() / own.std()).item() < 1e-4


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_their_network_loads_what_we_write_and_computes_the_same(case, tmp_path):
    role, build = CASES[case]
    ours = fill(build())
    file = save_folder(role, ours, tmp_path)
    theirs, report = their_class(config_json(role, ours)).from_pretrained(file.parent, output_loading_info=True)
    assert not any(report.values()), report
    assert is_diffusers(role, load_file(file))
    assert_same_outputs(role, ours, theirs)


@pytest.mark.parametrize("case", [name for name in CASES if name != "latent branch"])  # theirs can do more than it
@torch.no_grad()
def test_our_network_computes_the_same_from_their_weights(case, tmp_path):
    role, build = CASES[case]
    ours = build()
    theirs = fill(their_network(role, ours), salt=1)
    theirs.save_pretrained(tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    ours.load_state_dict(assemble(role, ours, load_file(file)))
    assert_same_outputs(role, ours, theirs)


@pytest.mark.parametrize("case", CASES | WITHOUT_TEXT)
def test_the_round_trip_is_exact(case):
    role, build = (CASES | WITHOUT_TEXT)[case]
    ours = fill(build())
    state = assemble(role, ours, to_diffusers(role, ours.state_dict()))
    idle = unused(role, ours.state_dict())
    for key, value in ours.state_dict().items():
        assert torch.equal(state[key], torch.zeros_like(value) if key in idle else value), key


def meta_shapes(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {key.removeprefix("text_model."): tuple(value.shape) for key, value in state.items()}


@pytest.mark.parametrize("role", COMPONENTS)
def test_full_size_keys_and_shapes_are_those_of_stable_diffusion(role):
    """Theirs from the published configuration of SD 2.1-base, ours from the defaults; both without memory."""
    widths = [320, 640, 1280, 1280]
    clip = transformers.CLIPTextConfig(
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=23,
        num_attention_heads=16,
        hidden_act="gelu",
        projection_dim=512,
    )
    with torch.device("meta"):
        ours, theirs = {
            "unet": lambda: (
                UNet(),
                diffusers.UNet2DConditionModel(
                    block_out_channels=widths,
                    attention_head_dim=[5, 10, 20, 20],
                    cross_attention_dim=1024,
                    use_linear_projection=True,
                ),
            ),
            "autoencoder": lambda: (
                AutoencoderKL(),
                diffusers.AutoencoderKL(
                    block_out_channels=[128, 256, 512, 512],
                    down_block_types=["DownEncoderBlock2D"] * 4,
                    up_block_types=["UpDecoderBlock2D"] * 4,
                    layers_per_block=2,
                ),
            ),
            "text_encoder": lambda: (OpenClipTextEncoder(), transformers.CLIPTextModel(clip)),
            "branch": lambda: (
                LatentBranch(),
                diffusers.ControlNetModel(
                    block_out_channels=widths,
                    attention_head_dim=[5, 10, 20, 20],
                    cross_attention_dim=1024,
                    use_linear_projection=True,
                    conditioning_channels=4,
                    conditioning_embedding_out_channels=[8],
                ),
            ),
        }[role]()
    assert meta_shapes(to_diffusers(role, ours.state_dict())) == meta_shapes(theirs.state_dict())
    config, published = config_json(role, ours), theirs.config.to_dict() if role == "text_encoder" else theirs.config
    for name in set(config) - {"_class_name", "architectures", "model_type"}:
        value = published[name]
        assert config[name] == (list(value) if isinstance(value, tuple) else value), name


def test_published_prefixes_and_old_attention_names_are_read():
    clip, vae = OpenClipTextEncoder(width=32, layers=3, heads=2), fill(AutoencoderKL(**VAE))
    written = to_diffusers("text_encoder", clip.state_dict())
    assert all(key.startswith("text_model.") for key in written)
    bare = {key.removeprefix("text_model."): value for key, value in written.items()}
    assert is_diffusers("text_encoder", bare)
    assert assemble("text_encoder", clip, bare).keys() == clip.state_dict().keys()

    old = {}
    for key, value in to_diffusers("autoencoder", vae.state_dict()).items():
        for name, old_name in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items():
            key = key.replace(f".{name}.", f".{old_name}.")
        old[key] = value
    assert "encoder.mid_block.attentions.0.proj_attn.weight" in old
    state = assemble("autoencoder", vae, old)
    assert all(torch.equal(state[key], value) for key, value in vae.state_dict().items())


@torch.no_grad()
def test_a_text_encoder_with_all_layers_is_read_up_to_the_one_before_last():
    ours, longer = (OpenClipTextEncoder(width=32, layers=layers, heads=2) for layers in (3, 4))
    file = to_diffusers("text_encoder", fill(longer).state_dict())  # three layers, of which `ours` needs two
    file["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    ours.load_state_dict(assemble("text_encoder", ours, file))
    clip = longer.model.transformer
    clip.resblocks = clip.resblocks[:-1]
    assert_close(ours(PROMPTS), longer(PROMPTS), rtol=0, atol=0)


@pytest.mark.parametrize("role, network", [("unet", UNet), ("branch", LatentBranch), ("autoencoder", AutoencoderKL)])
def test_our_own_files_are_not_taken_for_theirs(role, network):
    with torch.device("meta"):
        assert not is_diffusers(role, network().state_dict())


def test_components_are_found_in_the_usual_formats(tmp_path):
    assert find_component(tmp_path, "unet") == tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    assert find_component(tmp_path, "stage1") == tmp_path / "stage1.safetensors"
    folder = tmp_path / "text_encoder"
    folder.mkdir()
    for name in ("pytorch_model.bin", "model.fp16.safetensors", "model.safetensors"):  # each preferred to those before
        (folder / name).touch()
        assert find_component(tmp_path, "text_encoder") == folder / name


@pytest.mark.parametrize("settings", [{}, {"prediction": "v", "zero_terminal_snr": True}])
def test_their_scheduler_has_our_noise_schedule(settings):
    ours = Diffusion(**settings)
    theirs = diffusers.DDIMScheduler.from_config(scheduler_json(ours))
    assert_close(theirs.alphas_cumprod.double(), torch.from_numpy(ours.alpha_bar), rtol=1e-4, atol=1e-6)
    theirs.set_timesteps(10)
    assert theirs.timesteps[0] == ours.timesteps - 1
    z_0, eps, t = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.tensor([20, 900])
    assert_close(theirs.add_noise(z_0, eps, t), ours.diffuse(z_0, t, eps), rtol=0, atol=1e-4)
    step = theirs.step(ours.target(z_0, t, eps)[1:], 900, ours.diffuse(z_0, t, eps)[1:])
    assert_close(step.pred_original_sample, z_0[1:], rtol=0, atol=1e-3)
