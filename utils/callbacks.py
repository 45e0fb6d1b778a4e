"""Lightning callbacks of the training scripts."""

import resource
import time
from collections import deque
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as L
import torch
from torch import Tensor
from torchvision.utils import make_grid

from model.trainable import Trainable
from utils.checkpoint import save_weights
from utils.image import to_uint8, write_png
from utils.sharding import sharded_like, whole


class EMA(L.Callback):
    """Exponential moving average of the trained weights; validation, pictures and exported weights use it.

    Args:
        decay: weight of the past at each optimizer step; shorter at the start, min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, decay: float = 0.999):
        self.decay, self.steps = decay, 0
        self.average: dict[str, Tensor] = {}
        self.raw: dict[str, Tensor] | None = None  # the trained weights while the average stands in for them

    def on_fit_start(self, trainer: L.Trainer, module: Trainable) -> None:
        own = module.state_dict()
        loaded, self.average = self.average, {k: v.clone() for k, v in own.items()}
        for k, v in loaded.items():
            self.average[k].copy_(sharded_like(v, self.average[k]))

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: Trainable, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return  # gradients are still accumulating
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        for k, v in module.state_dict().items():
            self.average[k].lerp_(v, 1 - decay)

    def on_validation_start(self, trainer: L.Trainer, module: Trainable) -> None:
        self.raw = {k: v.clone() for k, v in module.state_dict().items()}
        module.load_state_dict(self.average, strict=False)

    def on_validation_end(self, trainer: L.Trainer, module: Trainable) -> None:
        module.load_state_dict(self.raw, strict=False)
        self.raw = None

    def on_exception(self, trainer: L.Trainer, module: Trainable, exception: BaseException) -> None:
        if self.raw is not None:  # stopped during validation: the checkpoint must hold the trained weights
            self.on_validation_end(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "average": whole(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.average = state["steps"], state["average"]


class ExportWeights(L.Callback):
    """Writes `<folder>/<network>.safetensors` for inference at every validation and the end; averaged if EMA is on."""

    def __init__(self, folder: str, half: bool = False):
        self.folder, self.dtype = Path(folder), torch.float16 if half else None

    def export(self, trainer: L.Trainer, module: Trainable) -> None:
        state = module.state_dict()
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                state.update(callback.average)
        for name, network in module.trained.items():
            prefix = f"trained.{name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if own:  # a partly trained network is written whole
                own = whole({**network.state_dict(), **own})
                if trainer.is_global_zero:
                    save_weights(own, self.folder / f"{name}.safetensors", self.dtype)

    def on_validation_end(self, trainer: L.Trainer, module: Trainable) -> None:
        if not trainer.sanity_checking:
            self.export(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: Trainable) -> None:
        self.export(trainer, module)


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


def peak_bytes(device: torch.device) -> int:
    """Most memory that tensors have taken on a GPU, or that this process has taken, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
