"""Training from latents that were computed before."""

import runpy
from pathlib import Path

import pytest
import torch
from torch.utils.data import default_collate

from diffbir.dataset.latents import CachedLatents, write
from diffbir.model.training.command import main as train
from diffbir.model.training.run import build_module
from diffbir.utils.config import instantiate, load_config
from tests.runs import PHOTOS, ROOT, TINY, state

CONFIG = str(ROOT / "configs/train/mini/stage2.yaml")
DRAWS, BATCH = 34, 1  # more than one file
SETTINGS = [f"photos={PHOTOS}", *TINY, "weights.unet=weights/mini/unet.safetensors", "module.params.steps=2"]
cache_latents = runpy.run_path(str(ROOT / "scripts/cache_latents.py"))["main"]


def cache(folder: Path, *overrides: str, draws: int = DRAWS) -> int:
    options = ["--output", str(folder), "--draws", str(draws), "--batch-size", str(BATCH), "--num-workers", "0"]
    return cache_latents(["--config", CONFIG, *options, *SETTINGS, *overrides])


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("cache") / "latents"
    assert cache(path) == 0
    return path


def test_an_epoch_is_what_the_training_would_have_computed(folder):
    config = load_config(CONFIG, SETTINGS)
    module, pairs, cached = build_module(config).eval(), instantiate(config.data.params.train), CachedLatents(folder)
    assert len(cached) == DRAWS
    epoch = default_collate([cached[n] for n in range(DRAWS)])
    found = module.condition(epoch).latent
    drawn = torch.stack([pairs[n]["lq"] for n in range(DRAWS)])
    expected = module.condition({"lq": drawn, "prompt": [""] * DRAWS}).latent
    # The order differs: each has the nearest other within what float16 rounds, and none is met twice.
    distance = torch.cdist(found.flatten(1), expected.flatten(1), p=torch.inf)
    nearest = distance.argmin(1)
    assert sorted(nearest.tolist()) == list(range(DRAWS))
    assert distance.min(1).values.max() < 2e-3 * expected.abs().max()
    # Of the clean latent, the posterior is kept and drawn from anew.
    clean = module.frozen["autoencoder"].posterior(torch.stack([pairs[n]["hq"] for n in nearest.tolist()]))
    mean, logvar = epoch["posterior"].float().chunk(2, dim=1)
    torch.testing.assert_close(mean, clean.mean, atol=0.02, rtol=2e-3)
    torch.testing.assert_close(logvar, clean.logvar, atol=0.02, rtol=2e-3)
    again = torch.stack([cached[n]["latent"] for n in range(DRAWS, 2 * DRAWS)])
    assert not torch.equal(again, epoch["latent"])  # another order


def test_every_latent_has_its_own_prompt(tmp_path):
    for first, rows in ((0, 3), (3, 2)):
        latent = torch.arange(first, first + rows)[:, None, None, None].expand(rows, 4, 2, 2)
        write(
            tmp_path / f"{first:08d}.safetensors",
            latent.repeat(1, 2, 1, 1),
            latent,
            [f"nr {i}" for i in latent[:, 0, 0, 0]],
        )
    cached = CachedLatents(tmp_path)
    assert [item["prompt"] for item in map(cached.__getitem__, range(10))] == [
        f"nr {int(cached[n]['latent'].mean())}" for n in range(10)
    ]


def test_more_draws_are_added_to_a_finished_cache(folder, tmp_path):
    for draws in (5, DRAWS - 1, 3, DRAWS):
        assert cache(tmp_path, draws=draws) == 0
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_several_processes_share_the_files_and_make_the_same_ones(folder, tmp_path, monkeypatch):
    """One after the other here: the second has only its own left to do, and finds them done if it runs again."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(files) == 2
    for rank, expected in ((1, files[1:]), (0, files)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert cache(tmp_path) == 0
        assert sorted(path.name for path in tmp_path.glob("*.safetensors")) == expected
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in folder.iterdir()}


def test_a_training_fits_them(folder, tmp_path):
    train_node = f"{{target: dataset.latents.CachedLatents, params: {{folder: {folder}}}}}"
    run = [f"run_dir={tmp_path}", "trainer.params.max_steps=2", "validate_every=2", f"data.params.train={train_node}"]
    assert train("", CONFIG, [*SETTINGS, *run]) == 0
    assert all(w.isfinite().all() for w in state(tmp_path, 2)["state_dict"].values())


def test_a_stopped_cache_goes_on_and_another_one_is_refused(folder, tmp_path, capsys):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    sorted(folder.glob("*.safetensors"))[-1].unlink()
    assert cache(folder) == 0
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert cache(folder, "seed=1") == 1
    assert "other networks, photos or settings" in capsys.readouterr().err


@pytest.mark.parametrize("content", [None, b"cut short"])
def test_what_is_no_cache_is_one_sentence(tmp_path, capsys, content):
    if content:
        (tmp_path / "00000000.safetensors").write_bytes(content)
    node = f"{{target: dataset.latents.CachedLatents, params: {{folder: {tmp_path}}}}}"
    assert train("", CONFIG, [*SETTINGS, f"run_dir={tmp_path}", f"data.params.train={node}"]) == 1
    assert "cache_latents.py" in capsys.readouterr().err


def test_a_controlnet_in_image_space_is_refused(folder, tmp_path, capsys):
    config = str(ROOT / "configs/ablation/mini/image_controlnet.yaml")
    node = f"{{target: dataset.latents.CachedLatents, params: {{folder: {folder}}}}}"
    weights = [f"weights.{name}=weights/mini/{name}.safetensors" for name in ("stage1", "autoencoder", "unet")]
    run = [f"run_dir={tmp_path}", "trainer.params.max_steps=1", "validate_every=1", f"data.params.train={node}"]
    assert train("", config, [f"photos={PHOTOS}", *weights, *TINY, *run]) == 1
    assert "ImageControlNet needs images" in capsys.readouterr().err
