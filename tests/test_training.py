"""Every trainer, briefly, on real photos: it fits, it saves what it trained, it resumes to the same weights."""

import functools
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from diffbir.dataset.degradations.batched import Batched
from diffbir.dataset.degradations.recipes import Recipe
from diffbir.model.training.checkpointing import find_checkpoint
from diffbir.model.training.command import main
from diffbir.model.training.run import build_module, train
from diffbir.model.weights.checkpoint import save_weights
from diffbir.utils.config import load_config
from tests.runs import STAGES

ROOT = Path(__file__).parents[1]
SMALL = [
    "photos=inputs/demo",
    "val_photos=inputs/demo",
    "data.params.batch_size=2",
    "data.params.num_workers=0",
    "data.params.train.params.crop_size=32",
    "data.params.val.params.crop_size=32",
    "data.params.val.params.limit=2",
    "trainer.params.callbacks.0.params.every_n_train_steps=2",
]
TRAININGS = {
    "stage1": (["stage1"], []),
    "autoencoder": (["autoencoder"], []),
    "prior": (["unet"], []),
    "stage2": (["branch", "unet"], ["weights.unet=weights/mini/unet.safetensors"]),
    "one_step": (["autoencoder", "branch", "unet"], ["module.params.dists_weight=0.0"]),  # which needs VGG16
}


def settings(name: str, run_dir: Path, steps: int, *overrides: str) -> list[str]:
    length = [f"run_dir={run_dir}", f"trainer.params.max_steps={steps}", f"trainer.params.val_check_interval={steps}"]
    return [*SMALL, *length, *TRAININGS[name][1], *overrides]


def run(name: str, run_dir: Path, steps: int, *overrides: str) -> None:
    train(load_config(ROOT / f"configs/train/mini/{name}.yaml", settings(name, run_dir, steps, *overrides)))


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a run of two steps, made once for every trainer."""

    @functools.cache
    def folder(name: str) -> Path:
        run_dir = tmp_path_factory.mktemp(name)
        run(name, run_dir, 2, "lr_schedule=null")
        return run_dir

    return folder


@pytest.mark.parametrize("name", TRAININGS)
def test_two_steps_of_every_trainer(name, trained):
    run_dir = trained(name)
    for network in TRAININGS[name][0]:
        weights = load_file(run_dir / "weights" / f"{network}.safetensors")
        assert all(w.isfinite().all() for w in weights.values())
    (checkpoint,) = (run_dir / "checkpoints").glob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    trained = {k.split(".")[1] for k in saved["state_dict"] if k.startswith("trained.")}
    assert trained == set(TRAININGS[name][0])
    assert all(k.startswith(("trained.", "discriminator.")) for k in saved["state_dict"])  # nothing that is frozen
    assert list((run_dir / "images").glob("*.png"))
    assert list((run_dir / "logs").glob("events*"))
    facts = OmegaConf.load(run_dir / "run.yaml")
    assert facts.effective_batch == 2
    assert OmegaConf.load(run_dir / "config.yaml").trainer.params.max_steps == 2


def test_images_are_degraded_on_the_device_if_that_is_asked_for(tmp_path, monkeypatch):
    degraded = []
    monkeypatch.setattr(Recipe, "__call__", lambda *_: pytest.fail("degraded in the loader"))
    apply = Batched.__call__
    monkeypatch.setattr(Batched, "__call__", lambda self, hq, rngs: degraded.append(len(hq)) or apply(self, hq, rngs))
    run("stage1", tmp_path, 2, "degrade_on_device=true")
    assert degraded == [2, 2, 2]  # two training batches, one for validation


@pytest.mark.parametrize("name", ["autoencoder", "prior"])  # others: test_resume.py, test_one_step.py
def test_a_finished_run_made_longer_ends_where_a_long_one_does(name, trained, tmp_path):
    """Two steps and two more against four without a stop: the same weights to the last bit."""
    shutil.copytree(trained(name), tmp_path / "longer")
    run(name, tmp_path / "longer", 4, "lr_schedule=null", "resume=auto")
    run(name, tmp_path / "whole", 4, "lr_schedule=null", "trainer.params.callbacks.0.params.every_n_train_steps=1000")
    for network in TRAININGS[name][0]:
        whole, longer = (load_file(tmp_path / d / "weights" / f"{network}.safetensors") for d in ("whole", "longer"))
        assert all(torch.equal(whole[k], longer[k]) for k in whole)


def test_a_truncated_newest_checkpoint_is_passed_over(tmp_path, caplog):
    """What a full disk or a killed job leaves; two checkpoints are kept so that there is one to fall back to."""
    options = ["lr_schedule=null", *STAGES["stage1"]]
    run("stage1", tmp_path, 6, *options)
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("*.ckpt"))
    assert kept == ["0000004.ckpt", "0000006.ckpt"]
    newest = tmp_path / "checkpoints" / "0000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert find_checkpoint(tmp_path, "auto").name == "0000004.ckpt"
    assert "0000006.ckpt is damaged and passed over" in caplog.text
    run("stage1", tmp_path, 8, *options, "resume=auto")
    assert (tmp_path / "checkpoints" / "0000008.ckpt").exists()


def test_training_changes_the_weights_and_lowers_the_loss(tmp_path):
    """Forty steps on a fixed batch: the loss of stage 1 must fall."""
    from diffbir.model.training.stage1 import Stage1
    from diffbir.utils.config import instantiate

    config = load_config(ROOT / "configs/train/mini/stage1.yaml", settings("stage1", tmp_path, 40, *STAGES["stage1"]))
    torch.manual_seed(0)
    data = instantiate(config.data)
    batch = {k: torch.stack([data.train[i][k] for i in range(4)]) for k in ("lq", "hq")}
    module = Stage1(instantiate(config.networks)["stage1"], optimizer=lambda p: torch.optim.AdamW(p, 5e-4))
    module.log = lambda *_, **__: None
    optimizer, losses = module.configure_optimizers(), []
    for _ in range(40):
        loss = module.training_step(batch, 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["trainer.params.max_stepz=1"], "unknown key 'trainer.params.max_stepz'"),
        (["photos={tmp}/empty"], "no images in"),
        (["resume={tmp}/none.ckpt"], "no checkpoint"),
        (["weights.autoencoder={tmp}/none.safetensors"], "weights not found"),
        (["optimizer.params.fused=true", "frozen_dtype=bf16"], "excludes trainer.params.gradient_clip_val"),
    ],
)
def test_bad_input_is_one_sentence_before_any_work(overrides, words, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    overrides = [o.format(tmp=tmp_path) for o in overrides]
    status = main("", str(ROOT / "configs/train/mini/stage2.yaml"), settings("stage2", tmp_path / "run", 1, *overrides))
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert status == 1
    assert words in line
    assert not (tmp_path / "run").exists()


def test_the_branch_starts_from_the_unet_unless_a_file_is_given(tmp_path):
    options = settings("stage2", tmp_path, 1, *STAGES["stage2"])
    path = ROOT / "configs/train/mini/stage2.yaml"
    fresh = build_module(load_config(path, options))
    unet, branch = (dict(fresh.trained[name].named_parameters()) for name in ("unet", "branch"))
    assert torch.equal(branch["time_embed.0.weight"], unet["time_embed.0.weight"])
    own = {name: torch.full_like(p, 0.5) for name, p in fresh.trained["branch"].state_dict().items()}
    save_weights(own, tmp_path / "branch.safetensors")
    given = build_module(load_config(path, [*options, f"weights.branch={tmp_path}/branch.safetensors"]))
    assert all((p == 0.5).all() for p in given.trained["branch"].parameters())
