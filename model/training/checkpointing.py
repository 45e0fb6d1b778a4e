"""Checkpoints of a training: written whole, between steps, and found again."""

import logging
import os
from pathlib import Path
from time import monotonic
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.plugins.environments import LightningEnvironment
from pytorch_lightning.plugins.io import TorchCheckpointIO

from diffbir.model.training.base import Trainable
from diffbir.model.training.guards import Stop
from diffbir.utils.cli import UserError
from diffbir.utils.files import replacing

log = logging.getLogger(__name__)


def choose_checkpoint(trainer: L.Trainer, module: Trainable, run_dir: Path, resume: str | None) -> Path | None:
    """`find_checkpoint` as rank 0 sees the folder: on a shared disk, others may see a file earlier or later.

    Processes that Lightning starts by itself are on one machine and see the same. They are not there yet when the first
    is here, so neither may wait for the other; and in them `creates_processes_externally` is true.
    """
    environment = getattr(trainer.strategy, "cluster_environment", None)
    if trainer.world_size == 1 or environment is None or isinstance(environment, LightningEnvironment):
        return find_checkpoint(run_dir, resume)
    trainer.strategy.connect(module)  # sharded strategies ask for it
    trainer.strategy.setup_environment()
    found: tuple[Path | None, UserError | None] = None, None
    if trainer.is_global_zero:
        try:
            found = find_checkpoint(run_dir, resume), None
        except UserError as error:
            found = None, error
    path, error = trainer.strategy.broadcast(found)
    if error is not None:
        raise error
    return path


def find_checkpoint(run_dir: Path, resume: str | None) -> Path | None:
    """The file that `resume` means: None starts anew, 'auto' is that of the last step in the run folder, None if empty.

    Raises:
        UserError: there is no such file, or none in the folder can be read: weeks of training must not begin anew.
    """
    if resume is None:
        return None
    if resume == "auto":
        found = list((run_dir / "checkpoints").glob("*.ckpt"))
        steps = {path: step for path in found if (step := step_of(path)) is not None}
        if found and not steps:
            raise UserError(
                f"none of the {len(found)} checkpoints in {run_dir / 'checkpoints'} can be read; restore one, or move "
                "the folder away to start anew"
            )
        return max(steps, key=steps.get, default=None)  # not by time: copying and syncing change it
    if not Path(resume).is_file():
        raise UserError(f"no checkpoint {resume}; give a file, or resume=auto for the newest in {run_dir}")
    return Path(resume)


def step_of(checkpoint: Path) -> int | None:
    """The step of a checkpoint that can be read to its end; None, said, if not: a killed job may cut one short."""
    try:
        return torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:  # pickle, zip and torch raise what they like
        log.warning("%s is damaged and passed over: %s", checkpoint, str(error).splitlines()[0][:120])
        return None


class WholeCheckpoints(TorchCheckpointIO):
    """Checkpoints that appear whole or not at all.

    Lightning writes its own to the system's temporary folder, and copies them from there if that is another disk.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with replacing(path) as part, part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())


class Checkpoint(L.callbacks.ModelCheckpoint):
    """`ModelCheckpoint` that saves between steps only: what a step logs is on disk before the checkpoint is.

    It also saves at the end, and where a training of one process stops for bad input. Other errors leave the last
    checkpoint: they may come from halfway through a step, and other ranks would wait forever for this one to save.

    Args:
        minutes: also saves whenever so much time has passed since the last checkpoint, for steps of unknown length
            under a scheduler's limit; None saves by steps alone.
        **kwargs: of `ModelCheckpoint`.
    """

    def __init__(self, minutes: float | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        self.seconds = 60 * minutes if minutes else None
        self.saved_at = monotonic()

    def on_train_batch_end(self, *_: Any) -> None:
        pass

    def on_train_batch_start(self, trainer: L.Trainer, module: Trainable, batch: Any, batch_idx: int) -> None:
        # Not by the method of the base class: at the last batch of an epoch, that one waits for a validation.
        every = self._every_n_train_steps
        due = every > 0 and trainer.global_step % every == 0 and not self._should_skip_saving_checkpoint(trainer)
        if due or (batch_idx % trainer.accumulate_grad_batches == 0 and self.overdue(trainer)):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def overdue(self, trainer: L.Trainer) -> bool:
        """By the clock of rank 0, so that all save at the same step."""
        if self.seconds is None or self._last_global_step_saved == trainer.global_step:
            return False
        return trainer.strategy.broadcast(monotonic() - self.saved_at >= self.seconds)

    def _save_checkpoint(self, trainer: L.Trainer, filepath: str) -> None:
        super()._save_checkpoint(trainer, filepath)
        self.saved_at = monotonic()

    def on_train_end(self, trainer: L.Trainer, module: Trainable) -> None:
        if self._last_global_step_saved != trainer.global_step:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))

    def on_exception(self, trainer: L.Trainer, module: Trainable, exception: BaseException) -> None:
        finished = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        between_steps = finished % trainer.accumulate_grad_batches == 0
        if isinstance(exception, Stop) or (
            isinstance(exception, UserError) and between_steps and trainer.world_size == 1
        ):
            super().on_exception(trainer, module, exception)

    def on_save_checkpoint(self, trainer: L.Trainer, module: Trainable, checkpoint: dict[str, Any]) -> None:
        for logger in trainer.loggers:
            logger.save()
        # The batch that has been fetched and not been trained on is the first that a resumed run fetches.
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        for counts in (progress["total"], progress["current"]):
            counts["ready"] = counts["completed"]
