"""Two batches through everything that a training does, and what the whole of it will take."""

import logging
import shutil
from pathlib import Path

import pytorch_lightning as L
import torch
from omegaconf import DictConfig
from pytorch_lightning.utilities import rank_zero_only

from diffbir.model.training.logging import Monitor
from diffbir.model.training.run import train
from diffbir.utils.config import load_config
from diffbir.utils.memory import peak_bytes

log = logging.getLogger(__name__)


def dry_run(path: str, overrides: list[str]) -> None:
    """Runs two batches through everything that a training does, and says what the whole of it will take."""
    whole = load_config(path, overrides)
    folder = Path(whole.run_dir) / "dry_run"
    short = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 2, "accumulate_grad_batches": 1}
    overrides = [*overrides, *(f"trainer.params.{key}={value}" for key, value in short.items())]
    try:
        trainer = train(load_config(path, [*overrides, f"run_dir={folder}", "resume=null"]))
        if rank_zero_only.rank == 0:
            (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
            log.info("%s", estimate(whole, trainer, checkpoint.stat().st_size))
        trainer.strategy.barrier()  # others may still be reading what is removed below
    finally:
        if rank_zero_only.rank == 0:
            shutil.rmtree(folder, ignore_errors=True)


def estimate(config: DictConfig, trainer: L.Trainer, checkpoint: int) -> str:
    """Time and memory of a whole run, from the second step and the validation of a dry one.

    Args:
        config: the whole run's.
        checkpoint: bytes of one.
    """
    (monitor,) = (callback for callback in trainer.callbacks if isinstance(callback, Monitor))
    waited, busy, _ = monitor.recent[-1]
    params = config.trainer.params
    step = (waited + busy) * params.get("accumulate_grad_batches", 1)
    loader = trainer.datamodule.val_dataloader()
    validation = monitor.validation * len(loader) / min(2, len(loader)) if loader else 0.0
    validations = params.max_steps // params.val_check_interval
    hours = (step * params.max_steps + validation * validations) / 3600
    device = trainer.strategy.root_device
    memory = f"{peak_bytes(device) / 1e9:.2f} GB"
    if device.type == "cuda":
        memory += f" of {torch.cuda.mem_get_info(device)[1] / 1e9:.1f} GB"
    return (
        f"dry run of training, validation, pictures and checkpoint: everything ran\n"
        f"  a step: {step:.2f} s, {waited / (waited + busy):.0%} of it waiting for data\n"
        f"  a validation: {validation:.1f} s\n"
        f"  the whole run: {hours:.1f} hours for {params.max_steps} steps and {validations} validations\n"
        f"  peak memory: {memory} on {device}\n"
        f"  a checkpoint: {checkpoint / 1e9:.2f} GB"
    )
