"""Lightning plugins and callbacks that keep a long training safe: its checkpoints, its end, its weights."""

import logging
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as L
import torch
from pytorch_lightning.plugins.precision.amp import _optimizer_handles_unscaling
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from diffbir.model.training.base import Trainable
from diffbir.model.training.sharding import local, whole
from diffbir.utils.cli import UserError

log = logging.getLogger(__name__)


class Stop(SystemExit):
    """Raised between two steps, on all ranks at the same one, to end a training that can be resumed."""


class StopOnSignal(L.Callback):
    """Ctrl-C, SIGTERM or SIGUSR1 (SLURM's warning) ends the training after the step under way, with a checkpoint.

    The exit status is 128 + the signal's number. It is enough that one rank gets the signal. A second Ctrl-C ends the
    process at once.
    """

    def __init__(self):
        self.received = 0

    def on_train_start(self, trainer: L.Trainer, module: Trainable) -> None:
        # In place of Lightning's handlers, which save and talk to other ranks from the middle of a step.
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self.receive)

    def receive(self, number: int, _: FrameType | None) -> None:
        self.received = number
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def on_train_batch_start(self, trainer: L.Trainer, module: Trainable, batch: Any, batch_idx: int) -> None:
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.stop(trainer)

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.stop(trainer)

    def stop(self, trainer: L.Trainer) -> None:
        received = torch.tensor(self.received, device=trainer.strategy.root_device)
        number = int(trainer.strategy.reduce(received, reduce_op="max"))
        if number:
            raise Stop(128 + number)


class NonFiniteGuard(L.Callback):
    """Skips every step whose loss or gradient isn't finite on some rank, and logs the norm of the gradient.

    A skipped step counts as a step, but leaves the weights and the optimizer's state as they are.

    Args:
        folder: where the batches of skipped steps are saved.
        max_skips: how many steps in a row may be skipped; one more ends the run.
    """

    def __init__(self, folder: str, max_skips: int = 3):
        self.folder, self.max_skips, self.skipped = Path(folder), max_skips, 0
        self.batches: list[Any] = []  # of the step under way, and their losses
        self.losses: list[Tensor] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Trainable, batch: Any, batch_idx: int) -> None:
        if self.skipped > self.max_skips:
            raise UserError(
                f"the loss or its gradient was not finite in {self.skipped} steps in a row; their batches are in "
                f"{self.folder}: look at them, lower lr, or raise max_skips of NonFiniteGuard"
            )
        if batch_idx % trainer.accumulate_grad_batches == 0:
            self.batches, self.losses = [], []
        self.batches.append(batch)

    def on_before_backward(self, trainer: L.Trainer, module: Trainable, loss: Tensor) -> None:
        self.losses.append(loss.detach())

    def on_before_optimizer_step(self, trainer: L.Trainer, module: Trainable, optimizer: Optimizer) -> None:
        grads = [p.grad for p in module.parameters() if p.grad is not None]
        norm = whole(get_total_norm(grads))
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        scaled = scaler is not None and _optimizer_handles_unscaling(optimizer)
        module.log("train/grad_norm", norm / scaler.get_scale() if scaled else norm)
        finite = torch.stack(self.losses).isfinite().all()
        if scaler is None:  # fp16 overflows at times, and its scaler skips
            finite &= norm.isfinite()
        if trainer.strategy.reduce_boolean_decision(not finite, all=False):
            if scaled:  # the scaler has yet to look at the gradients, and must see some
                for grad in grads:
                    grad.fill_(torch.nan)
            else:
                optimizer.zero_grad()  # parameters without a gradient are left alone, by weight decay too
            self.skipped += 1
            self.save(trainer)
        else:
            self.skipped = 0

    def save(self, trainer: L.Trainer) -> None:
        path = self.folder / f"{trainer.global_step:07d}_rank{trainer.global_rank}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({"losses": self.losses, "batches": self.batches}, path)
        log.warning("step %d is skipped: loss or gradient not finite; its batch is in %s", trainer.global_step, path)


class FrozenWeights(L.Callback):
    """Checks at every validation and at the end that frozen parameters are what they were at the start."""

    def on_fit_start(self, trainer: L.Trainer, module: Trainable) -> None:
        self.start = checksums({name: p for name, p in module.named_parameters() if not p.requires_grad})

    def on_validation_end(self, trainer: L.Trainer, module: Trainable) -> None:
        parameters = dict(module.named_parameters())
        now = checksums({name: parameters[name] for name in self.start})
        changed = [name for name, value in self.start.items() if now[name] != value]
        if changed:
            raise RuntimeError(f"{len(changed)} frozen parameters have changed, the first of them {changed[0]}")

    on_train_end = on_validation_end


def checksums(tensors: dict[str, Tensor]) -> dict[str, int]:
    """Sum of each tensor's bits, read as whole numbers; of this rank's share of it, if it is sharded."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    shares = [local(t.detach()).contiguous() for t in tensors.values()]
    sums = [t.view(integers[t.element_size()]).sum(dtype=torch.int64) for t in shares]
    return dict(zip(tensors, torch.stack(sums).tolist() if sums else [], strict=True))
