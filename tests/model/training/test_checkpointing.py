"""Which checkpoint a run goes on from."""

import multiprocessing
import os
import socket
from pathlib import Path

import pytest
import pytorch_lightning as L
import torch

from diffbir.model.training.checkpointing import Checkpoint, choose_checkpoint, find_checkpoint
from diffbir.utils.cli import UserError
from tests.runs import run


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


def choose(rank: int, port: int, folder: Path, answers: multiprocessing.Queue) -> None:
    os.environ |= {
        **{"TORCHELASTIC_RUN_ID": "test", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GROUP_RANK": "0"},
        **{"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": str(rank), "LOCAL_RANK": str(rank)},
    }
    torch.set_num_threads(1)
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_checkpointing=False)
    try:
        answers.put(choose_checkpoint(trainer, L.LightningModule(), folder, "auto"))
    except UserError as error:
        answers.put(str(error))


def choices(first: Path, second: Path) -> list[Path | str | None]:
    """Of two ranks that see different folders."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    fork = multiprocessing.get_context("fork")
    answers = fork.Queue()
    ranks = [fork.Process(target=choose, args=(rank, port, f, answers)) for rank, f in enumerate((first, second))]
    for process in ranks:
        process.start()
    found = [answers.get(timeout=120) for _ in ranks]
    for process in ranks:
        process.join()
    return found


def test_all_ranks_go_on_from_what_the_first_one_sees(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    good = save(first, 10, 0)
    assert choices(first, second) == [good, good]  # the second doesn't see it yet
    assert choices(second, first) == [None, None]
    good.write_bytes(b"")
    for answer in choices(first, second):  # also of an error, so that none waits for the others
        assert "none of the 1 checkpoints" in answer


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    """A minute passes with every step, and five may pass."""
    saved = []
    monkeypatch.setattr("diffbir.model.training.checkpointing.time.monotonic", lambda: 60.0 * clock())
    steps = {"now": 0}
    clock = lambda: steps["now"]  # noqa: E731
    start, save_checkpoint = Checkpoint.on_train_batch_start, Checkpoint._save_checkpoint

    def on_train_batch_start(self, trainer, *args):
        steps["now"] = trainer.global_step
        start(self, trainer, *args)

    def record(self, trainer, path):
        save_checkpoint(self, trainer, path)
        saved.append(trainer.global_step)

    monkeypatch.setattr(Checkpoint, "on_train_batch_start", on_train_batch_start)
    monkeypatch.setattr(Checkpoint, "_save_checkpoint", record)
    run("stage1", tmp_path, 12, "checkpoint_every=7", "checkpoint_minutes=3")
    assert saved == [3, 6, 7, 10, 12]
