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
from tests.forks import CONTEXT
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
    answers = CONTEXT.Queue()
    ranks = [CONTEXT.Process(target=choose, args=(rank, port, f, answers)) for rank, f in enumerate((first, second))]
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
    monkeypatch.setattr("diffbir.model.training.checkpointing.monotonic", lambda: 60.0 * clock())
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


class OneWeight(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def training_step(self, batch: torch.Tensor, _: int) -> torch.Tensor:
        return (self.weight - batch).square().mean()

    def validation_step(self, batch: torch.Tensor, _: int) -> None:
        pass

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("validate", [1, None])
def test_every_step_that_is_due_is_saved_also_at_the_end_of_an_epoch_and_beside_validations(
    tmp_path, every, accumulate, validate
):
    """Seven steps in epochs of four batches; each file holds the weight after its step."""
    saving = Checkpoint(
        dirpath=tmp_path, filename="{step}", every_n_train_steps=every, save_top_k=-1, monitor="step", mode="max"
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=7,
        accumulate_grad_batches=accumulate,
        val_check_interval=validate,
        check_val_every_n_epoch=None if validate else 1,
        limit_val_batches=1 if validate else 0,
        callbacks=[saving],
        logger=False,
        **dict.fromkeys(("enable_progress_bar", "enable_model_summary"), False),
    )
    data = torch.utils.data.DataLoader(torch.ones(4, 1))
    trainer.fit(OneWeight(), data, data)
    expected = {step for step in range(1, 7) if step % every == 0} | {7}
    saved = {int(path.stem.partition("=")[2]): torch.load(path, weights_only=True) for path in tmp_path.iterdir()}
    assert saved.keys() == expected
    for step, checkpoint in saved.items():
        assert checkpoint["global_step"] == step
        assert checkpoint["state_dict"]["weight"].item() == pytest.approx(1 - 0.8**step, rel=1e-5)
