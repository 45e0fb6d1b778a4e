"""What trainings log, and options that must not change what they compute."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.runs import as_shipped, assert_equal, run, state


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    (file,) = (run_dir / "logs").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_what_stage_2_logs(tmp_path):
    run("stage2", tmp_path, 4)
    logged = scalars(tmp_path)
    assert {"train/loss", "train/grad_norm", "lr-AdamW"} <= logged.keys()
    assert {"val/loss", "val/psnr", "val/ssim", "val/lpips"} <= logged.keys()
    assert all(value > 0 for _, value in logged["train/grad_norm"])
    assert all(0 <= value < 1 for _, value in logged["system/data_wait"])
    assert all(value > 0 for _, value in logged["system/images_per_s"])
    assert all(0.1 < value < 20 for _, value in logged["system/memory_gb"])
    # Of a batch of two: one image in each of two ranges, or both in one. Either way the mean is the batch's loss.
    ranges = ["0-249", "250-499", "500-749", "750-999"]
    bins = {step: [] for step, _ in logged["train/loss"]}
    for step, value in (point for name in ranges for point in logged.get(f"train/loss_t{name}", [])):
        bins[step].append(value)
    for step, loss in logged["train/loss"]:
        assert sum(bins[step]) / len(bins[step]) == pytest.approx(loss, rel=1e-5)


def test_losses_by_timestep_are_means_since_the_last_log(tmp_path):
    run("stage2", tmp_path / "each", 4)
    run("stage2", tmp_path / "second", 4, "trainer.params.log_every_n_steps=4")
    each, second = (scalars(tmp_path / name) for name in ("each", "second"))
    for name in (tag for tag in second if tag.startswith("train/loss_t")):
        assert [step for step, _ in second[name]] == [3]
        low, high = min(v for _, v in each[name]), max(v for _, v in each[name])
        assert low - 1e-6 <= second[name][0][1] <= high + 1e-6


def test_validation_counts_steps_whatever_is_accumulated(tmp_path):
    run("stage1", tmp_path, 4, "validate_every=2", "trainer.params.accumulate_grad_batches=2")
    assert [path.stem for path in sorted((tmp_path / "images").iterdir())] == ["0000002", "0000004"]


def test_compiling_changes_neither_names_nor_results(tmp_path):
    """With the backend that only traces: it needs no compiler, and computes the same."""
    run("stage1", tmp_path / "plain", 2)
    run("stage1", tmp_path / "compiled", 2, "compile={backend: eager}")
    assert_equal(*(state(tmp_path / name, 2)["state_dict"] for name in ("plain", "compiled")), "state_dict")


def test_frozen_networks_in_half_precision_give_almost_the_same_gradient(tmp_path):
    options = [*as_shipped("stage2"), "module.params.train_unet=false"]
    run("stage2", tmp_path / "full", 1, *options)
    run("stage2", tmp_path / "half", 1, *options, "frozen_dtype=bf16")
    full, half = (state(tmp_path / name, 1) for name in ("full", "half"))
    assert full["state_dict"].keys() == half["state_dict"].keys()
    # After one step the first moment is the gradient, but for a factor.
    moments = [[v["exp_avg"].flatten() for v in s["optimizer_states"][0]["state"].values()] for s in (full, half)]
    full, half = (torch.cat(m) for m in moments)
    assert full.norm() > 0
    assert torch.cosine_similarity(full, half, dim=0) > 0.98


def test_a_cpu_without_bf16_trains_in_float32(tmp_path, monkeypatch):
    run("stage1", tmp_path / "float32", 1, "trainer.params.precision=32-true")
    monkeypatch.setattr("diffbir.model.training.run.emulates_bf16", lambda trainer: True)
    run("stage1", tmp_path / "fallback", 1)
    assert OmegaConf.load(tmp_path / "fallback/run.yaml").precision == "32-true"
    assert_equal(*(state(tmp_path / name, 1)["state_dict"] for name in ("float32", "fallback")), "state_dict")
