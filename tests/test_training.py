"""Every trainer, briefly, on real photos: it fits, it saves what it trained, it resumes to the same weights."""

import functools
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from diffbir.dataset.degradations.batched import Batched
from diffbir.dataset.degradations.recipes import Recipe
from diffbir.model.training.checkpointing import find_checkpoint
from diffbir.model.training.command import main
from diffbir.model.training.run import train
from diffbir.utils.config import load_config

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
    "one_step": (["branch", "unet"], []),
}


def settings(name: str, run_dir: Path, steps: int, *overrides: str) -> list[str]:
    length = [f"run_dir={run_dir}", f"trainer.params.max_steps={steps}", f"trainer.params.val_check_interval={steps}"]
    return [*SMALL, *length, *TRAININGS[name][1], *overrides]


def run(name: str, run_dir: Path, steps: int, *overrides: str) -> None:
    train(load_config(ROOT / f"configs/train/mini/{name}.yaml", settings(name, run_dir, steps, *overrides)))


@pytest.mark.parametrize("name", TRAININGS)
def test_two_steps_of_every_trainer(name, tmp_path):
    run(name, tmp_path, 2)
    for network in TRAININGS[name][0]:
        weights = load_file(tmp_path / "weights" / f"{network}.safetensors")
        assert all(w.isfinite().all() for w in weights.values())
    (checkpoint,) = (tmp_path / "checkpoints").glob("*.ckpt")
    saved = torch.load(checkpoint, weights_only=True)
    trained = {k.split(".")[1] for k in saved["state_dict"] if k.startswith("trained.")}
    assert trained == set(TRAININGS[name][0])
    assert all(k.startswith(("trained.", "discriminator.")) for k in saved["state_dict"])  # nothing that is frozen
    assert list((tmp_path / "images").glob("*.png"))
    assert list((tmp_path / "logs").glob("events*"))
    facts = OmegaConf.load(tmp_path / "run.yaml")
    assert facts.effective_batch == 2
    assert OmegaConf.load(tmp_path / "config.yaml").trainer.params.max_steps == 2


def test_images_are_degraded_on_the_device_if_that_is_asked_for(tmp_path, monkeypatch):
    degraded = []
    monkeypatch.setattr(Recipe, "__call__", lambda *_: pytest.fail("degraded in the loader"))
    apply = Batched.__call__
    monkeypatch.setattr(Batched, "__call__", lambda self, hq, rngs: degraded.append(len(hq)) or apply(self, hq, rngs))
    run("stage1", tmp_path, 2, "degrade_on_device=true")
    assert degraded == [2, 2, 2]  # two training batches, one for validation


@pytest.mark.parametrize("name", TRAININGS)
def test_a_resumed_run_ends_where_an_uninterrupted_one_does(name, tmp_path):
    """Four steps at once against two, a stop, and two more: the same weights to the last bit."""
    run(name, tmp_path / "whole", 4, "trainer.params.callbacks.0.params.every_n_train_steps=1000")
    run(name, tmp_path / "parts", 4, "trainer.params.callbacks.0.params.save_top_k=-1")
    shutil.rmtree(tmp_path / "parts" / "weights")
    first = tmp_path / "parts" / "checkpoints" / "0000002.ckpt"
    run(name, tmp_path / "resumed", 4, f"resume={first}")
    for network in TRAININGS[name][0]:
        whole = load_file(tmp_path / "whole" / "weights" / f"{network}.safetensors")
        resumed = load_file(tmp_path / "resumed" / "weights" / f"{network}.safetensors")
        assert all(torch.equal(whole[k], resumed[k]) for k in whole)


def test_a_truncated_newest_checkpoint_is_passed_over(tmp_path, caplog):
    """What a full disk or a killed job leaves; two checkpoints are kept so that there is one to fall back to."""
    run("stage1", tmp_path, 6, "lr_schedule=null")
    kept = sorted(p.name for p in (tmp_path / "checkpoints").glob("*.ckpt"))
    assert kept == ["0000004.ckpt", "0000006.ckpt"]
    newest = tmp_path / "checkpoints" / "0000006.ckpt"
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert find_checkpoint(tmp_path, "auto").name == "0000004.ckpt"
    assert "0000006.ckpt is damaged and passed over" in caplog.text
    run("stage1", tmp_path, 8, "lr_schedule=null", "resume=auto")
    assert (tmp_path / "checkpoints" / "0000008.ckpt").exists()


def test_noised_conditions_train_too(tmp_path):
    run("stage2", tmp_path, 2, "module.params.noise_aug=200")
    assert (tmp_path / "weights" / "branch.safetensors").exists()


def test_ctrl_c_leaves_a_checkpoint_that_resumes(tmp_path):
    """A real SIGINT to a real process, then the same command with resume=auto."""
    command = [sys.executable, "train_stage1.py", *settings("stage1", tmp_path, 10000)]
    command.append("trainer.params.callbacks.0.params.every_n_train_steps=5")
    # Python ignores SIGINT where its parent did (a background job of a shell, say).
    restore = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True, preexec_fn=restore)
    try:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "checkpoints").glob("*.ckpt")) and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "resume=auto" in errors
    step = max(int(checkpoint.stem) for checkpoint in (tmp_path / "checkpoints").glob("*.ckpt"))
    assert step >= 5
    run("stage1", tmp_path, step + 2, "resume=auto")
    assert (tmp_path / "checkpoints" / f"{step + 2:07d}.ckpt").exists()


def test_training_changes_the_weights_and_lowers_the_loss(tmp_path):
    """Forty steps on a fixed batch: the loss of stage 1 must fall."""
    from diffbir.model.training.stage1 import Stage1
    from diffbir.utils.config import instantiate

    config = load_config(ROOT / "configs/train/mini/stage1.yaml", settings("stage1", tmp_path, 40))
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
