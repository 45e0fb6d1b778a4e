"""Lightning callbacks of the training scripts."""

import math
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as L
import torch
from torchvision.utils import make_grid

from diffbir.model.training.base import Trainable
from diffbir.model.training.flops import count_flops, on_meta, peak
from diffbir.utils.image import to_uint8, write_png
from diffbir.utils.memory import peak_bytes


class ImageGrid(L.Callback):
    """Pictures of the first validation batch, side by side: PNG files, TensorBoard, W&B; always the same seed."""

    def __init__(self, folder: str, count: int = 6):
        self.folder, self.count = Path(folder), count

    @torch.no_grad()
    def on_validation_batch_end(
        self, trainer: L.Trainer, module: Trainable, outputs: Any, batch: dict, batch_idx: int, *_: Any
    ) -> None:
        if batch_idx > 0 or trainer.sanity_checking:
            return
        with torch.random.fork_rng(), trainer.precision_plugin.forward_context():
            torch.manual_seed(0)
            pictures = module.images({k: v[: self.count] for k, v in batch.items()})
        if not trainer.is_global_zero:  # it was needed to compute them, if the networks are sharded
            return
        columns = torch.cat([p.float().clamp(0, 1).cpu() for p in pictures.values()])
        grid = to_uint8(make_grid(columns, nrow=len(batch["hq"][: self.count]), padding=2))
        for logger in trainer.loggers:
            title = " | ".join(pictures)
            if isinstance(logger, L.loggers.TensorBoardLogger):
                logger.experiment.add_image(title, np.asarray(grid), trainer.global_step, dataformats="HWC")
            elif isinstance(logger, L.loggers.WandbLogger):
                logger.log_image(title, [np.asarray(grid)], step=trainer.global_step)
        write_png(self.folder / f"{trainer.global_step:07d}.png", grid)


class ProgressBar(L.callbacks.TQDMProgressBar):
    """Lightning's, closed at an error, so that the message gets a line of its own.

    It counts batches, of which a step may take several, to the end of a training that goes on amid an epoch, too.
    """

    @property
    def total_train_batches(self) -> float:
        """Those that are left of the training, or of the epoch from its start."""
        trainer = self.trainer
        if trainer.max_steps < 0:
            return trainer.num_training_batches
        left = (trainer.max_steps - trainer.global_step) * trainer.accumulate_grad_batches
        return min(trainer.num_training_batches, left)

    def on_train_start(self, trainer: L.Trainer, module: Trainable) -> None:
        super().on_train_start()
        done = trainer.fit_loop.epoch_loop.batch_progress.current.completed
        if done:  # then no epoch starts
            bar, total = self.train_progress_bar, min(trainer.num_training_batches, done + self.total_train_batches)
            bar.total, bar.initial, bar.n = None if math.isinf(total) else total, done, done
            bar.set_description(f"Epoch {trainer.current_epoch}")

    def on_exception(self, trainer: L.Trainer, module: Trainable, exception: BaseException) -> None:
        if self._val_progress_bar is not None:
            self.val_progress_bar.close()
        if self._train_progress_bar is not None:
            self.train_progress_bar.close()


class TimestepLoss(L.Callback):
    """Logs the mean loss in equal ranges of timesteps, `train/loss_t<first>-<last>`, over the steps since the last log.

    Only for trainings whose steps return `losses` (B,) and their timesteps `t` (B,), on rank 0's images.

    Args:
        bins: number of ranges.
    """

    def __init__(self, bins: int = 4):
        self.bins = bins

    def on_train_start(self, trainer: L.Trainer, module: Trainable) -> None:
        self.sums, self.counts = torch.zeros(2, self.bins, device=module.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Trainable, outputs: dict, batch: dict, batch_idx: int
    ) -> None:
        if "t" not in outputs:
            return
        timesteps, losses = module.diffusion.timesteps, outputs["losses"]
        numbers = outputs["t"] * self.bins // timesteps
        self.sums.index_add_(0, numbers, losses)
        self.counts.index_add_(0, numbers, torch.ones_like(losses))
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or trainer.global_step % trainer.log_every_n_steps:
            return
        edges = [timesteps * i // self.bins for i in range(self.bins + 1)]
        values = {
            f"train/loss_t{edges[i]}-{edges[i + 1] - 1}": float(self.sums[i] / self.counts[i])
            for i in self.counts.nonzero().flatten().tolist()
        }
        for logger in trainer.loggers:
            logger.log_metrics(values, step=trainer.global_step - 1)  # Lightning's number of this step
        self.on_train_start(trainer, module)


class Monitor(L.Callback):
    """Logs speed and memory: of all ranks, images per second and TFLOP/s; of this one, the share of time spent waiting
    for batches and the peak memory; the hours that remain, validations included; and the model FLOP utilisation (MFU,
    Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B), the share of the GPUs' peak in bf16.

    Speeds are means over the last steps and leave validation out.

    Args:
        batches: over how many batches.
    """

    def __init__(self, batches: int = 50):
        self.flops: int | None = None  # of a batch
        self.peak: float | None = None
        self.overhead = 0.0  # seconds a step, of validations
        self.recent: deque[tuple[float, float, int]] = deque(maxlen=batches)  # seconds waited, seconds busy, images
        self.mark: float | None = None  # when the last batch ended
        self.waited, self.began, self.validation = 0.0, 0.0, 0.0
        self.twin: Trainable | None = None

    def setup(self, trainer: L.Trainer, module: Trainable, stage: str) -> None:
        self.twin = on_meta(module)

    def on_train_batch_start(self, trainer: L.Trainer, module: Trainable, batch: dict, batch_idx: int) -> None:
        if self.twin is not None:
            self.twin._trainer = trainer
            self.flops, self.peak, self.twin = count_flops(self.twin, batch), peak(module.device), None
        self.began = time.perf_counter()
        self.waited = 0.0 if self.mark is None else self.began - self.mark

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Trainable, outputs: Any, batch: dict, batch_idx: int
    ) -> None:
        self.mark = time.perf_counter()
        images = len(batch["prompt"]) * trainer.world_size
        self.recent.append((self.waited, self.mark - self.began, images))
        waited, busy, images = map(sum, zip(*self.recent, strict=True))
        batch_seconds = (waited + busy) / len(self.recent)
        step = batch_seconds * trainer.accumulate_grad_batches + self.overhead
        values = {
            "system/images_per_s": images / (waited + busy),
            "system/data_wait": waited / (waited + busy),
            "system/memory_gb": peak_bytes(module.device) / 1e9,
            "system/hours_left": step * (trainer.max_steps - trainer.global_step) / 3600,
        }
        if self.flops:
            values["system/tflops"] = self.flops * trainer.world_size / batch_seconds / 1e12
            if self.peak:
                values["system/mfu"] = self.flops / batch_seconds / self.peak
        module.log_dict(values)

    def on_validation_start(self, trainer: L.Trainer, module: Trainable) -> None:
        self.began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: Trainable) -> None:
        self.mark = time.perf_counter()
        self.validation = self.mark - self.began
        self.overhead = self.validation * trainer.accumulate_grad_batches / trainer.val_check_interval
