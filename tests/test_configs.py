"""Every shipped YAML builds."""

from pathlib import Path

import pytest
import torch

from model.networks import build_networks
from model.restorer import Restorer
from utils.config import check_keys, instantiate, load_config
from utils.training import OPTIONAL, REQUIRED

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.yaml"))


def of(folder: str) -> list[Path]:
    return [p for p in CONFIGS if folder in p.relative_to(ROOT / "configs").parts[0]]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT / "configs"))


@pytest.mark.parametrize("path", of("inference"), ids=name)
def test_presets_build_with_their_weights(path):
    assert isinstance(Restorer.from_config(load_config(path)), Restorer)


@pytest.mark.parametrize("path", of("dataset"), ids=name)
def test_degradations_build(path):
    assert callable(instantiate(load_config(path).degradation))


@pytest.mark.parametrize("path", [p for p in of("train") if p.name != "base.yaml"], ids=name)
def test_trainings_build(path):
    config = load_config(path, ["photos=inputs/demo"])
    check_keys(config, REQUIRED, OPTIONAL)
    config.weights = {}
    networks = build_networks(config)
    extras = {"diffusion": instantiate(config.diffusion)} if "diffusion" in config else {}
    module = instantiate(config.module)(**networks, **extras, seed=0)
    optimizer = module.configure_optimizers()["optimizer"]
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
