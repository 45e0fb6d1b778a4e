"""LoRA files of every spelling, made with PEFT on networks of diffusers and transformers, against what these give."""

import json

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import inference
from diffbir.model.build import build_networks, file_and_scale, with_additions
from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.text import NullTextEncoder, OpenClipTextEncoder
from diffbir.model.networks.unet import UNet
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.weights.checkpoint import save_weights
from diffbir.utils.cli import UserError
from tests.golden.fill import fill
from tests.model.weights.test_diffusers_export import SIZE, disturbed
from tests.model.weights.test_diffusers_layout import VAE, their_network, to_diffusers

peft = pytest.importorskip("peft")

RANK, ALPHA = 3, 6.0
LAYERS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1", "conv_shortcut", "ff.net.0.proj", "time_emb_proj"],
    "autoencoder": ["conv1", "conv_in", "to_q", "to_out.0", "quant_conv"],
    "text_encoder": ["q_proj", "v_proj", "out_proj", "fc1"],
}
MAKE = {
    "unet": lambda: UNet(**SIZE),
    "autoencoder": lambda: AutoencoderKL(**VAE),
    "text_encoder": lambda: OpenClipTextEncoder(width=32, layers=3, heads=2),
}
PREFIX = {"unet": "unet", "autoencoder": "vae", "text_encoder": "te"}


def adapted(role: str) -> tuple[nn.Module, dict[str, Tensor], nn.Module]:
    """Ours; PEFT's state for theirs of the same weights; theirs with the additions."""
    ours = fill(MAKE[role]()).eval()
    theirs = their_network(role, ours)
    state = to_diffusers(role, ours.state_dict())
    names = set(theirs.state_dict())
    theirs.load_state_dict({k if k in names else k.removeprefix("text_model."): v for k, v in state.items()})
    model = peft.get_peft_model(theirs, peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=LAYERS[role]))
    g = torch.Generator().manual_seed(0)
    for name, p in model.named_parameters():
        if "lora_" in name:
            p.data = 0.3 * torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5
    return ours, {k: v.clone() for k, v in peft.get_peft_model_state_dict(model).items()}, model.eval()


def layer_of(key: str) -> tuple[str, str]:
    layer, _, factor = key.removeprefix("base_model.model.").removesuffix(".weight").rpartition(".")
    return layer, {"lora_A": "down", "lora_B": "up"}[factor]


def diffusers_file(role, state, folder):
    prefix = {"text_encoder": "text_encoder"}.get(role, PREFIX[role])
    save_file(
        {f"{prefix}.{k.removeprefix('base_model.model.')}": v for k, v in state.items()}, folder / "lora.safetensors"
    )
    return f"{folder / 'lora.safetensors'}:{ALPHA / RANK}"  # it carries no scale


def old_diffusers_file(role, state, folder):
    named = {}
    for key, value in state.items():
        layer, factor = layer_of(key)
        block, _, name = layer.rpartition(".attn1.")
        if block:
            layer = f"{block}.attn1.processor.{name.removesuffix('.0')}"
        named[f"{PREFIX[role]}.{layer}{'_' if block else '.'}lora.{factor}.weight"] = value
    torch.save(named, folder / "pytorch_lora_weights.bin")
    return f"{folder / 'pytorch_lora_weights.bin'}:{ALPHA / RANK}"


def peft_folder(role, state, folder):
    save_file(state, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": ALPHA}))
    return str(folder / "adapter_model.safetensors")


def kohya_file(role, state, folder):
    named = {}
    for key, value in state.items():
        layer, factor = layer_of(key)
        if role == "text_encoder" and not layer.startswith("text_model."):
            layer = f"text_model.{layer}"
        name = f"lora_{PREFIX[role]}_{layer.replace('.', '_')}"
        named[f"{name}.lora_{factor}.weight"], named[f"{name}.alpha"] = value, torch.tensor(ALPHA)
    save_file(named, folder / "kohya.safetensors")
    return str(folder / "kohya.safetensors")


def nested_file(role, state, folder):
    """As published one-step restorers have it: a dict for each network, adapters with names, and the ranks."""
    inner = {}
    for key, value in state.items():
        inner[key.removeprefix("base_model.model.").replace(".weight", ".default_encoder.weight")] = value
    torch.save({f"state_dict_{PREFIX[role]}": inner, "rank_unet": RANK, "modules": ["a", "b"]}, folder / "one_step.pkl")
    return f"{folder / 'one_step.pkl'}:{ALPHA / RANK}"


CASES = [
    *((role, write) for role in ("unet", "autoencoder") for write in (diffusers_file, kohya_file, nested_file)),
    ("unet", old_diffusers_file),
    ("unet", peft_folder),
    ("text_encoder", kohya_file),
    ("text_encoder", diffusers_file),
]


@torch.no_grad()
def outputs(role: str, ours: nn.Module, theirs: nn.Module) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    if role == "unet":
        z, t, text = torch.randn(2, 4, 8, 8, generator=g), torch.tensor([3, 700]), torch.randn(2, 5, 32, generator=g)
        return ours(z, t, text), theirs(z, t, text).sample
    if role == "autoencoder":
        x = torch.rand(1, 3, 16, 24, generator=g)
        return ours.encode(x), theirs.base_model.model.encode(2 * x - 1).latent_dist.mode() * VAE["scale_factor"]
    prompts = ["a cat", ""]
    return ours(prompts), theirs.base_model.model(input_ids=ours.tokenize(prompts)).last_hidden_state


@pytest.mark.parametrize("role, write", CASES, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_merged_file_computes_what_peft_does(role, write, tmp_path):
    ours, state, theirs = adapted(role)
    before, expected = outputs(role, ours, theirs)
    assert (before - expected).abs().max() > 1e-2 * expected.std()  # the additions have a say
    with_additions({role: ours}, *file_and_scale(write(role, state, tmp_path)))
    found, expected = outputs(role, ours, theirs)
    assert (found - expected).abs().max() < 1e-4 * expected.std()


def config(tmp_path, **more):
    return OmegaConf.create(
        {
            "networks": {
                "unet": {"target": "model.networks.unet.UNet", "params": SIZE},
                "text_encoder": {"target": "model.networks.text.NullTextEncoder"},
            },
            **more,
        }
    )


def test_presets_name_files_which_add_up_and_networks_that_are_not_built_are_left_out(tmp_path):
    ours, state, _ = adapted("unet")
    spec = kohya_file("unet", state, tmp_path)
    save_weights(ours.state_dict(), tmp_path / "unet.safetensors")
    weights = {"weights": {"unet": str(tmp_path / "unet.safetensors")}}
    plain, half, twice = (
        build_networks(config(tmp_path, **weights, lora=lora))["unet"].state_dict()
        for lora in (None, f"{spec}:0.5", [f"{spec}:0.25", f"{spec}:0.25"])
    )
    changed = [key for key in plain if not torch.equal(plain[key], half[key])]
    assert len(changed) == len(state) / 2
    for key in changed:
        torch.testing.assert_close(half[key], twice[key])
    assert list(build_networks(config(tmp_path, **weights, lora=spec), ["text_encoder"])) == ["text_encoder"]


def test_whole_weights_beside_the_additions_take_the_place_of_the_network_s_own(tmp_path):
    ours, state, _ = adapted("unet")
    name = next(key for key in state if "to_q.lora_A" in key)
    inner = {k.removeprefix("base_model.model."): v for k, v in state.items() if k.startswith(name[:-13])}
    inner["conv_in.weight"] = torch.full_like(ours.input_blocks[0][0].weight, 0.5)
    torch.save({"state_dict_unet": inner}, tmp_path / "one_step.pkl")
    with_additions({"unet": ours}, tmp_path / "one_step.pkl")
    assert (ours.input_blocks[0][0].weight == 0.5).all()


def test_specifications_may_have_colons():
    assert file_and_scale("a/b.safetensors") == ("a/b.safetensors", 1.0)
    assert file_and_scale("a/b.safetensors:0.7") == ("a/b.safetensors", 0.7)
    assert file_and_scale("C:/b.safetensors") == ("C:/b.safetensors", 1.0)


A, B = torch.ones(2, 32), torch.ones(32, 2)
LAYER = "lora_unet_down_blocks_0_attentions_0_proj_in"


@pytest.mark.parametrize(
    "state, words",
    [
        ({f"{LAYER}.hada_w1_a": A}, "'.*hada_w1_a', which is no addition of low rank"),
        ({f"{LAYER}.lora_down.weight": A, f"{LAYER}.dora_scale": A}, "dora_scale', which is no addition of low rank"),
        ({f"{LAYER}.lora_down.weight": A}, "only one of the factors"),
        ({"lora_unet_x.lora_down.weight": A, "lora_unet_x.lora_up.weight": B}, "'lora_unet_x' is no layer of UNet"),
        ({f"{LAYER}.lora_down.weight": A[:, :8], f"{LAYER}.lora_up.weight": B}, "do not fit its weight"),
        ({"conv_in.weight": A}, "holds no addition of low rank"),
    ],
)
def test_other_files_are_refused_in_one_sentence(state, words, tmp_path):
    save_weights(state, tmp_path / "lora.safetensors")
    with pytest.raises(UserError, match=words) as error:
        with_additions({"unet": UNet(**SIZE), "text_encoder": NullTextEncoder()}, tmp_path / "lora.safetensors")
    assert "lora.safetensors" in str(error.value)


@pytest.mark.parametrize("licence, warned", [("CC BY-NC 4.0", True), ("Non-Commercial", True), ("Apache-2.0", False)])
def test_a_non_commercial_licence_is_said(licence, warned, tmp_path, caplog):
    ours, state, _ = adapted("unet")
    named = {f"unet.{key.removeprefix('base_model.model.')}": value for key, value in state.items()}
    save_file(named, tmp_path / "lora.safetensors", metadata={"modelspec.license": licence})
    with_additions({"unet": ours}, tmp_path / "lora.safetensors")
    assert ("lora.safetensors is not for commercial use" in caplog.text) == warned


def test_code_in_a_file_is_never_run(tmp_path):
    torch.save({"x": torch.nn.Linear(1, 1)}, tmp_path / "lora.bin")
    with pytest.raises(UserError, match=r"entry 'x' holds .*Linear, which is refused"):
        with_additions({"unet": UNet(**SIZE)}, tmp_path / "lora.bin")


def test_the_command_line_of_conversion_merges(tmp_path):
    from scripts import convert_weights

    ours, state, _ = adapted("unet")
    spec = kohya_file("unet", state, tmp_path)
    save_weights(ours.state_dict(), tmp_path / "unet.safetensors")
    weights = {"weights": {"unet": str(tmp_path / "unet.safetensors")}}
    (tmp_path / "preset.yaml").write_text(OmegaConf.to_yaml(config(tmp_path, **weights)))
    flags = [
        "--preset",
        tmp_path / "preset.yaml",
        "--only",
        "unet",
        "--lora",
        spec,
        "--output",
        tmp_path / "out.safetensors",
    ]
    assert convert_weights.main([str(flag) for flag in flags]) == 0
    expected = with_additions({"unet": ours}, spec)["unet"].state_dict()
    for key, value in load_file(tmp_path / "out.safetensors").items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-6)


def test_the_command_line_merges_and_the_manifest_tells_with_what(tmp_path, capsys):
    network = build_networks(load_preset("mini"), ["unet"])["unet"]
    n, *shape = network.out[2].weight.shape
    down = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    factors = {"unet.out.2.lora_A.weight": down, "unet.out.2.lora_B.weight": torch.ones(n, 1, 1, 1)}
    save_weights(factors, tmp_path / "lora.safetensors")
    photo, spec = tmp_path / "photo.png", f"{tmp_path / 'lora.safetensors'}:0.5"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)).save(photo)

    def run(name: str, *flags: str) -> np.ndarray:
        args = ["--input", str(photo), "--output", str(tmp_path / name), "--steps", "2", "--device", "cpu", *flags]
        assert inference.main(args) == 0
        return np.asarray(Image.open(tmp_path / name / "photo.png")).astype(int)

    plain, merged = run("plain"), run("merged", "--lora", spec)
    quarter = ["--lora", spec.replace(":0.5", ":0.25")]
    assert np.abs(merged - plain).max() > 8
    assert np.abs(merged - run("twice", *quarter, *quarter)).max() <= 1
    (line,) = map(json.loads, (tmp_path / "merged" / "manifest.jsonl").read_text().splitlines())
    assert line["settings"]["lora"] == [spec]
    capsys.readouterr()
    assert (run("merged") == merged).all()  # is finished
    assert "lora ['" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["torch file called .safetensors", "safetensors called .bin", "index of two parts"])
def test_files_are_told_by_what_they_hold(kind, tmp_path):
    ours, state, _ = adapted("unet")
    named = {f"unet.{key.removeprefix('base_model.model.')}": value for key, value in state.items()}
    path = tmp_path / {"torch": "lora.safetensors", "safet": "lora.bin", "index": "lora.json"}[kind[:5]]
    if kind.startswith("torch"):
        torch.save(named, path)
    elif kind.startswith("safe"):
        save_file(named, path)
    else:
        parts = {key: f"{i % 2}.safetensors" for i, key in enumerate(named)}
        for part in set(parts.values()):
            save_file({key: named[key] for key in named if parts[key] == part}, tmp_path / part)
        path.write_text(json.dumps({"weight_map": parts}))
    save_file(named, tmp_path / "plain.safetensors")
    expected = with_additions({"unet": ours}, tmp_path / "plain.safetensors", copied=True)["unet"].state_dict()
    found = with_additions({"unet": ours}, path, copied=True)["unet"].state_dict()
    assert any(not torch.equal(value, ours.state_dict()[key]) for key, value in found.items())
    for key, value in found.items():
        assert torch.equal(value, expected[key])


@torch.no_grad()
def test_the_preset_of_one_step_restorers_runs_one_step_of_the_merged_networks(tmp_path):
    """z_0 = (E(y) - s eps(E(y), 999, prompt)) / a, decoded; both networks with what one nested file adds."""
    networks, content = {}, {}
    for i, role in enumerate(MAKE):
        networks[role] = disturbed(MAKE[role](), i)
        save_weights(networks[role].state_dict(), tmp_path / f"{role}.safetensors")
    for role in ("unet", "autoencoder"):
        _, state, _ = adapted(role)
        content[f"state_dict_{PREFIX[role]}"] = {k.removeprefix("base_model.model."): v for k, v in state.items()}
    torch.save(content, tmp_path / "restorer.pkl")
    small = {"unet": SIZE, "autoencoder": VAE, "text_encoder": dict(width=32, layers=3, heads=2)}
    overrides = [f"networks.{role}.params.{k}={v}" for role, params in small.items() for k, v in params.items()]
    overrides += [f"weights.{role}={tmp_path / role}.safetensors" for role in MAKE]
    preset = load_preset("lora_one_step", overrides=overrides, lora=[f"{tmp_path / 'restorer.pkl'}:2"])
    restorer = Restorer.from_config(preset)
    options = restorer.options(prompt="a cat", color="none", min_side=0)
    assert (options.solver, options.start_t, options.steps) == ("one_step", 999, 1)

    y = torch.rand(1, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    found = []
    restorer.restore(y, options, on_step=lambda i, z_0: found.append(z_0))
    for name, scale in (("unet", 2.0), ("autoencoder", 2.0)):
        others = dict.fromkeys({"unet", "autoencoder"} - {name})
        with_additions({name: networks[name], **others}, tmp_path / "restorer.pkl", scale)
    z = networks["autoencoder"].encode(y)
    eps = networks["unet"](z, torch.tensor([999]), networks["text_encoder"](["a cat"]))
    alpha_bar = float(Diffusion().alpha_bar[999])
    expected = (z - (1 - alpha_bar) ** 0.5 * eps) / alpha_bar**0.5
    assert (found[0] - expected).abs().max() < 1e-3 * expected.std()
