"""Runs that are killed, stopped or out of disk space: real processes, and what they leave."""

import os
import resource
import signal
import time
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffbir.model.training.checkpointing import find_checkpoint
from scripts import make_shards
from tests.runs import PHOTOS, N, assert_equal, process, run, state, wait_for


def losses(run_dir: Path) -> list[set[tuple[int, float]]]:
    """(step, loss) of every file of events, the oldest file first."""
    files = sorted((run_dir / "logs").glob("events*"), key=lambda path: path.stat().st_mtime)
    return [{(e.step, e.value) for e in EventAccumulator(str(path)).Reload().Scalars("train/loss")} for path in files]


def assert_same(a: dict, b: dict) -> None:
    """The same weights, optimizer, schedule, EMA and counts in two checkpoints."""
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"):
        assert_equal(a[part], b[part], part)
    assert_equal(a["callbacks"]["EMA"], b["callbacks"]["EMA"], "EMA")


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    assert make_shards.main([PHOTOS, "--output", str(folder), "--per-shard", "4"]) == 0
    return folder


@pytest.mark.parametrize("stage, source", [("stage1", "shards"), ("stage2", "folder")])
def test_a_killed_run_ends_where_an_undisturbed_one_does(stage, source, tmp_path, shards):
    """2N steps against N steps, SIGKILL and N more: weights, EMA, optimizer, schedule and logged losses, to the bit."""
    photos = f"photos={shards if source == 'shards' else PHOTOS}"
    run(stage, tmp_path / "whole", 2 * N, photos)
    killed = tmp_path / "killed"
    with process(stage, killed, 2 * N, photos) as running:
        wait_for(killed, N, running)
        running.kill()
        assert running.wait() == -signal.SIGKILL
    assert find_checkpoint(killed, "auto").stem == f"{N:07d}"
    run(stage, killed, 2 * N, photos, "resume=auto")

    assert_same(state(tmp_path / "whole", 2 * N), state(killed, 2 * N))
    (expected,), (before, after) = losses(tmp_path / "whole"), losses(killed)
    assert len(expected) == 2 * N
    assert {step for step, _ in after} == set(range(N, 2 * N))
    assert before | after == expected


def test_signals_in_mid_step_leave_a_checkpoint_that_goes_on_exactly(tmp_path, capsys):
    """A warning, then SIGTERM, sent to the loader processes as well, as schedulers do, while gradients accumulate.

    What each signal does alone, `tests/model/training/test_guards.py` tells.
    """
    options = ["lr_schedule=null", "trainer.params.accumulate_grad_batches=2", "validate_every=1000000"]
    with process("stage1", tmp_path / "stopped", 100000, *options, start_new_session=True) as running:
        wait_for(tmp_path / "stopped", N, running)
        os.killpg(running.pid, signal.SIGUSR1)
        os.killpg(running.pid, signal.SIGTERM)
        output, _ = running.communicate(timeout=60)
    assert running.returncode - 128 in (signal.SIGUSR1, signal.SIGTERM), output  # handled one by one, in any order
    assert "Traceback" not in output
    step = int(find_checkpoint(tmp_path / "stopped", "auto").stem)
    assert step > N
    assert f"stopped at step {step}" in output
    capsys.readouterr()
    run("stage1", tmp_path / "stopped", step + 1, *options, "resume=auto")
    assert capsys.readouterr().out.split("\r")[-1].startswith("Epoch 0: 100%")
    run("stage1", tmp_path / "whole", step + 1, *options)
    assert capsys.readouterr().out.split("\r")[-1].startswith("Epoch 0: 100%")
    assert_equal(*(state(tmp_path / name, step + 1)["state_dict"] for name in ("whole", "stopped")), "state_dict")


def test_a_signal_in_validation_leaves_the_trained_weights_in_the_checkpoint(tmp_path):
    """Not the averaged ones that validation runs with."""
    options = [
        "lr_schedule=null",
        f"validate_every={N}",
        "checkpoint_every=1000",
        "data.params.val.params.limit=null",
        "data.params.val.params.source=inputs/demo",
        "data.params.val_batch_size=1",
    ]
    with process("stage2", tmp_path / "stopped", 100000, *options, "module.params.steps=50") as running:
        deadline = time.monotonic() + 120
        while not list((tmp_path / "stopped" / "images").glob("*.png")) and time.monotonic() < deadline:
            time.sleep(0.005)  # the first validation batch has been seen, and more are to come
        running.send_signal(signal.SIGTERM)
        output, _ = running.communicate(timeout=60)
    assert running.returncode == 128 + signal.SIGTERM, output
    run("stage2", tmp_path / "whole", N, *options)
    whole, stopped = (state(tmp_path / name, N) for name in ("whole", "stopped"))
    assert_equal(whole["state_dict"], stopped["state_dict"], "state_dict")
    assert_equal(whole["callbacks"]["EMA"], stopped["callbacks"]["EMA"], "EMA")


def test_a_full_disk_is_one_sentence_and_keeps_the_last_good_checkpoint(tmp_path):
    """A limit on the size of files, set from outside after the first checkpoint, fails in the middle of a write."""
    with process("stage1", tmp_path, 100000, "lr_schedule=null", "validate_every=1000000") as running:
        wait_for(tmp_path, N, running)
        resource.prlimit(running.pid, resource.RLIMIT_FSIZE, (100_000, 100_000))
        output, _ = running.communicate(timeout=60)
    assert running.returncode == 1
    assert "Traceback" not in output
    (line,) = (line for line in output.splitlines() if line.startswith("error:"))
    good = find_checkpoint(tmp_path, "auto")
    assert "File too large" in line and str(good) in line
    assert good.stat().st_size > 100_000
    assert all(path.suffix == ".ckpt" and path.stat().st_size > 100_000 for path in good.parent.iterdir())
