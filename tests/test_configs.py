"""Every shipped YAML builds."""

from pathlib import Path

import pytest
import torch

from diffbir.model.build import build_networks
from diffbir.model.presets import PRESETS, STAGE1, load_preset, names
from diffbir.model.restorer import Restorer
from diffbir.model.training.run import OPTIONAL, REQUIRED
from diffbir.utils.config import check_keys, instantiate, load_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def of(folder: str) -> list[Path]:
    return [p for p in CONFIGS if folder in p.relative_to(ROOT / "configs").parts[0]]


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("preset", names(PRESETS))
def test_presets_build(preset):
    """With its weights if they are in the repository, else at full size without memory."""
    config = load_preset(preset)
    if preset != "mini":
        config.weights = {}
    with torch.device("cpu" if preset == "mini" else "meta"):
        assert isinstance(Restorer.from_config(config, device="cpu" if preset == "mini" else "meta"), Restorer)


@pytest.mark.parametrize("stage1", names(STAGE1))
def test_first_stages_build(stage1):
    config = load_config(STAGE1 / f"{stage1}.yaml")
    with torch.device("meta"):
        network = instantiate(config.networks.stage1)
    assert network.scale in (1, 4)


@pytest.mark.parametrize("path", of("dataset"), ids=relative)
def test_degradations_build(path):
    config = load_config(path)
    recipes = [*config.get("recipes", {}).values(), config.get("degradation")]
    assert recipes != [None]
    assert all(callable(instantiate(recipe)) for recipe in recipes if recipe is not None)


@pytest.mark.parametrize("path", [p for p in of("train") if p.name != "base.yaml"], ids=relative)
def test_trainings_build(path, request):
    """Full-size ones without memory, on the meta device."""
    if any(key in path.read_text() for key in ("feature_heads", "dists_weight", "include: one_step.yaml")):
        request.getfixturevalue("vgg16")
    pairs = request.getfixturevalue("tmp_path")
    for name in ("hq", "reg", "teacher"):
        (pairs / name).symlink_to(ROOT / "inputs/demo")
    cached = [f"pairs={pairs}", f"val_pairs={pairs}"]
    config = load_config(path, cached if "cached" in path.stem else ["photos=inputs/demo"])
    check_keys(config, REQUIRED, OPTIONAL)
    config.weights = {}
    with torch.device("cpu" if "mini" in path.parts else "meta"):
        networks = build_networks(config)
        extras = {"diffusion": instantiate(config.diffusion)} if "diffusion" in config else {}
        module = instantiate(config.module)(**networks, **extras, seed=0)
    configured = module.configure_optimizers()
    optimizer = configured["optimizer"] if isinstance(configured, dict) else configured
    assert sum(p.numel() for group in optimizer.param_groups for p in group["params"]) > 0
    instantiate(config.data)
    instantiate(config.trainer)


@pytest.mark.parametrize(
    "files, millions",
    [
        (["swinir"], {"stage1": 15.79}),
        (["stable_diffusion", "latent_branch"], {"unet": 865.91, "branch": 363.15, "autoencoder": 83.65}),
        (["stable_diffusion", "image_controlnet"], {"text_encoder": 354.03}),
    ],
    ids=["swinir", "latent branch", "image controlnet"],
)
def test_full_size_models_have_the_published_number_of_parameters(files, millions, tmp_path):
    """Built without memory, on the meta device."""
    (tmp_path / "all.yaml").write_text(f"include: {[str(ROOT / 'configs/model' / f'{name}.yaml') for name in files]}")
    with torch.device("meta"):
        networks = build_networks(load_config(tmp_path / "all.yaml"))
    for name, expected in millions.items():
        assert sum(p.numel() for p in networks[name].parameters()) / 1e6 == pytest.approx(expected, abs=0.01)


def test_the_embedded_model_has_the_stated_size():
    networks = build_networks(load_config("configs/inference/mini.yaml"))
    millions = {k: sum(p.numel() for p in net.parameters()) / 1e6 for k, net in networks.items()}
    assert 0.9 < millions["stage1"] < 2
    assert 1.5 < millions["autoencoder"] < 4
    assert 8 < millions["unet"] < 15
    files = [*(ROOT / "weights" / "mini").glob("*.safetensors")]
    assert sum(f.stat().st_size for f in files) <= 40e6


def test_the_learning_rate_of_v2_falls_after_30000_steps():
    config = load_config(ROOT / "configs/train/stage2_v2.yaml", ["photos=inputs/demo"])
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=config.lr)
    schedule = instantiate(config.lr_schedule)(optimizer)
    rates = []
    for _ in range(30001):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[0] == rates[29999] == 1e-4
    assert rates[30000] == pytest.approx(1e-5)
