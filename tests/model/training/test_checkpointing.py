"""Which checkpoint a run goes on from."""

import os
from pathlib import Path

import pytest
import torch

from diffbir.model.training.checkpointing import find_checkpoint
from diffbir.utils.cli import UserError


def save(run_dir: Path, step: int, age: int) -> Path:
    path = run_dir / "checkpoints" / f"{step}.ckpt"
    path.parent.mkdir(exist_ok=True)
    torch.save({"global_step": step, "state_dict": {"w": torch.zeros(1000)}}, path)
    os.utime(path, (1e9 - age, 1e9 - age))
    return path


def test_the_newest_is_that_of_the_last_step_whatever_the_times_of_the_files(tmp_path):
    for step, age in ((900, 1), (1000, 5), (30, 0)):  # neither the order of names nor that of times
        save(tmp_path, step, age)
    assert find_checkpoint(tmp_path, "auto").stem == "1000"


def test_damaged_ones_are_passed_over_and_no_intact_one_is_an_error(tmp_path, caplog):
    assert find_checkpoint(tmp_path, "auto") is None  # nothing to go on from yet
    old, new = save(tmp_path, 10, 1), save(tmp_path, 20, 0)
    new.write_bytes(new.read_bytes()[:-500])
    assert find_checkpoint(tmp_path, "auto") == old
    assert "20.ckpt is damaged and passed over" in caplog.text
    old.write_bytes(b"")
    with pytest.raises(UserError, match=r"none of the 2 checkpoints in .* can be read"):
        find_checkpoint(tmp_path, "auto")
