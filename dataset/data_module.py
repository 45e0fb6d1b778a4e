"""The data of one training run: an endless stream of draws for training, a fixed set for validation.

Images are degraded one by one in the loader's processes, or, if a dataset defers it, in batches on the accelerator. Its
items then bring a seed each, which their degradation starts from: it depends neither on the batch nor on the rank.
"""

import logging
import os
import signal
import threading
from collections.abc import Sequence

import cv2
import numpy as np
import pytorch_lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from diffbir.dataset.degradations.batched import Batched
from diffbir.dataset.order import DrawSampler
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.sources.split import hold_out
from diffbir.dataset.streams import StreamedPairs
from diffbir.dataset.transfer import pack, unpack
from diffbir.dataset.validation import Part
from diffbir.utils.cli import UserError

log = logging.getLogger(__name__)


def prepare_loader(_: int) -> None:
    """What every loader process does first."""
    cv2.setNumThreads(0)  # each is one of many; threads of their own would only wait for each other
    outlive_signals()


def outlive_signals() -> None:
    """Lets a loader process live on where a whole group is told to stop: the training still needs its batches.

    SIGTERM from the training itself, which ends its loaders at the end, is obeyed.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def obey() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=obey, daemon=True).start()


class DataModule(L.LightningDataModule):
    """Batches for the trainer.

    Args:
        train: a dataset that takes any draw number n >= 0 as its index (`dataset.pairs.ImagePairs`), or a stream.
        val: a fixed dataset, or None, which ranks share. One without a source takes what `hold_out` keeps of that of
            `train`.
        batch_size: items per device and step; the effective batch is this x devices x accumulated batches.
        val_batch_size: items per validation step.
        num_workers: loader processes.
        prefetch: batches that each of them has ready or in the making, in memory that processes share (/dev/shm).

    Raises:
        UserError: `train` cannot be split.
    """

    def __init__(
        self,
        train: Dataset,
        val: Dataset | Sequence | None = None,
        batch_size: int = 16,
        val_batch_size: int = 8,
        num_workers: int = 1,
        prefetch: int = 2,
    ):
        super().__init__()
        if isinstance(val, ImagePairs) and val.source is None:
            if not isinstance(train, ImagePairs):
                raise UserError(f"{type(train).__name__} cannot be split; give photos to validate on (val_photos=)")
            kept, held = hold_out(train.source)
            train.use(kept)
            val.use(held)
            log.info("val_photos is not given: %d photos are held out of training, by a hash of their names", len(held))
        self.train, self.val = train, val
        self.used: int | None = None  # draws before the start of this process; None: as many ranks as now drew them
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.num_workers, self.prefetch = num_workers, prefetch

    def effective_batch(self, trainer: L.Trainer) -> int:
        """Items per optimizer step: batch size x ranks x accumulated batches."""
        return self.batch_size * trainer.world_size * trainer.accumulate_grad_batches

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        rank, ranks = trainer.global_rank, trainer.world_size
        options = {
            "batch_size": self.batch_size,
            "num_workers": self.num_workers,
            "persistent_workers": self.num_workers > 0,
            "prefetch_factor": self.prefetch if self.num_workers else None,
            "worker_init_fn": prepare_loader,
            "collate_fn": pack,
            "pin_memory": trainer.strategy.root_device.type == "cuda",
        }
        if isinstance(self.train, StreamedPairs):
            used = trainer.global_step * trainer.accumulate_grad_batches
            return DataLoader(self.train.share(rank, ranks, used, self.batch_size), **options)
        step = self.effective_batch(trainer)
        self.began = trainer.global_step
        if self.used is None:
            self.used = self.began * step
        sampler = DrawSampler(self.used + (trainer.max_steps - self.began) * step, self.used, rank, ranks)
        return DataLoader(self.train, sampler=sampler, **options)

    def state_dict(self) -> dict[str, int]:
        """How many draws were used: a run that goes on with other ranks or batches repeats none and leaves none out."""
        if self.used is None:
            return {}
        return {"used": self.used + (self.trainer.global_step - self.began) * self.effective_batch(self.trainer)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.used = state["used"]

    def val_dataloader(self) -> DataLoader | list:
        if self.val is None:
            return []
        part = Part(self.val, self.trainer.global_rank, self.trainer.world_size)
        workers = min(self.num_workers, 1)
        return DataLoader(
            part, self.val_batch_size, num_workers=workers, worker_init_fn=prepare_loader, collate_fn=pack
        )

    def transfer_batch_to_device(self, batch: dict, device: torch.device, dataloader_idx: int) -> dict:
        seeds = batch.pop("seed", None)  # stay here, where NumPy needs them
        batch = unpack(super().transfer_batch_to_device(batch, device, dataloader_idx))
        if seeds is not None:
            dataset = self.train if self.trainer.training else self.val
            rngs = [np.random.default_rng(seed) for seed in seeds.tolist()]
            batch["lq"] = Batched(dataset.degradation)(batch["hq"], rngs)
        return batch
