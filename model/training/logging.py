"""Lightning callbacks of the training scripts."""

import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as L
import torch
from torchvision.utils import make_grid

from diffbir.model.training.base import Trainable
from diffbir.utils.image import to_uint8, write_png
from diffbir.utils.memory import peak_bytes


class ImageGrid(L.Callback):
    """Pictures of the first validation batch, side by side, to TensorBoard and as PNG files; always the same seed."""

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
            if isinstance(logger, L.loggers.TensorBoardLogger):
                title = " | ".join(pictures)
                logger.experiment.add_image(title, np.asarray(grid), trainer.global_step, dataformats="HWC")
        write_png(self.folder / f"{trainer.global_step:07d}.png", grid)


class ProgressBar(L.callbacks.TQDMProgressBar):
    """Lightning's, closed at an error, so that the message gets a line of its own."""

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
    """Logs images per second of all ranks, the share of time spent waiting for batches, and this rank's peak memory.

    Speeds are means over the last steps and leave validation out.

    Args:
        batches: over how many batches.
    """

    def __init__(self, batches: int = 50):
        self.recent: deque[tuple[float, float, int]] = deque(maxlen=batches)  # seconds waited, seconds busy, images
        self.mark: float | None = None  # when the last batch ended
        self.waited, self.began, self.validation = 0.0, 0.0, 0.0

    def on_train_batch_start(self, trainer: L.Trainer, module: Trainable, batch: dict, batch_idx: int) -> None:
        self.began = time.perf_counter()
        self.waited = 0.0 if self.mark is None else self.began - self.mark

    def on_train_batch_end(
        self, trainer: L.Trainer, module: Trainable, outputs: Any, batch: dict, batch_idx: int
    ) -> None:
        self.mark = time.perf_counter()
        images = len(batch["prompt"]) * trainer.world_size
        self.recent.append((self.waited, self.mark - self.began, images))
        waited, busy, images = map(sum, zip(*self.recent, strict=True))
        module.log_dict(
            {
                "system/images_per_s": images / (waited + busy),
                "system/data_wait": waited / (waited + busy),
                "system/memory_gb": peak_bytes(module.device) / 1e9,
            }
        )

    def on_validation_start(self, trainer: L.Trainer, module: Trainable) -> None:
        self.began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, module: Trainable) -> None:
        self.mark = time.perf_counter()
        self.validation = self.mark - self.began
