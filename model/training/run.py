"""What the training scripts share: configuration in, a run folder with checkpoints, weights, logs and pictures out."""

import copy
import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytorch_lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only

from diffbir.dataset.preflight import quick_check
from diffbir.model.build import build_networks, compile_network, weight_files
from diffbir.model.training.base import Trainable
from diffbir.model.training.checkpointing import choose_checkpoint, find_checkpoint
from diffbir.model.training.guards import Stop
from diffbir.model.training.sharding import FSDP
from diffbir.utils.cli import UserError
from diffbir.utils.config import ROOT, check_keys, instantiate
from diffbir.utils.files import no_room
from diffbir.utils.precision import PRECISIONS
from diffbir.utils.versions import versions

log = logging.getLogger(__name__)

REQUIRED = ("networks", "module", "data", "trainer", "run_dir", "seed")
OPTIONAL = (
    *("weights", "diffusion", "recipes", "degradation", "degrade_on_device", "optimizer", "lr_schedule", "lr"),
    *(
        "photos",
        "val_photos",
        "pairs",
        "val_pairs",
        "resume",
        "crop_size",
        "validate_every",
        "checkpoint_every",
        "checkpoint_minutes",
    ),
    *("ema_decay", "keep_weights_every", "best_weights", "frozen_dtype", "compile", "sampling", "one_step"),
)
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "numpy", "opencv-python", "timm")


def train(config: DictConfig) -> L.Trainer:
    """Runs one training to its last step, or from where `resume` says.

    Raises:
        UserError: a bad key, an empty folder, a missing weight file or checkpoint, before any long work; later on, an
            unreadable image, too many losses that aren't finite, a full disk.
        Stop: a signal asked for it; the checkpoint is saved.
    """
    check_keys(config, REQUIRED, OPTIONAL)
    L.seed_everything(config.seed, verbose=False)
    run_dir = Path(config.run_dir)
    trainer = build_trainer(config)
    resume = config.get("resume")
    if resume != "auto":
        find_checkpoint(run_dir, resume)  # a wrong name is said before anything slow

    data = instantiate(config.data, "data")
    module = build_module(config)
    checkpoint = choose_checkpoint(trainer, module, run_dir, resume)

    effective_batch = data.effective_batch(trainer)
    quick_check(data.train, effective_batch)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    facts = {"effective_batch": effective_batch, "trained_parameters": trained, "precision": trainer.precision}
    record_run(config, run_dir, facts)
    log.info("%s: %.2f M trained parameters, effective batch %d", run_dir, trained / 1e6, effective_batch)
    if checkpoint:
        log.info("going on from %s", checkpoint)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except Stop:
        log.info("stopped at step %d; the same command with resume=auto goes on from there", trainer.global_step)
        raise
    except SystemExit as exit:  # what Lightning makes of a second Ctrl-C
        raise KeyboardInterrupt from exit
    except Exception as error:
        reason = no_room(error)
        if reason is None:
            raise
        good = find_checkpoint(run_dir, "auto")
        raise UserError(
            f"{run_dir} cannot be written to ({reason}); make room, then resume=auto goes on "
            + (f"from {good}" if good else "from the start, for there is no checkpoint yet")
        ) from error
    return trainer


def build_trainer(config: DictConfig) -> L.Trainer:
    """As configured, except where a CPU lacks bf16.

    Raises:
        UserError: a wrong key, a sharded strategy whose checkpoints are not whole, or clipping that Lightning refuses.
    """
    node = copy.deepcopy(config.trainer)
    # Steps in our configuration, batches for Lightning.
    node.params.val_check_interval *= node.params.get("accumulate_grad_batches", 1)
    trainer = instantiate(node, "trainer")
    if emulates_bf16(trainer) and not config.get("frozen_dtype"):
        log.warning("this CPU has no instructions for bf16 and would take several times as long: training in float32")
        node.params.precision = "32-true"
        trainer = instantiate(node, "trainer")
    if isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy) and not isinstance(trainer.strategy, FSDP):
        raise UserError(
            "trainer.params.strategy: write {target: model.training.sharding.FSDP} for fully sharded training"
        )
    fused = OmegaConf.select(config, "optimizer.params.fused")
    if fused and trainer.gradient_clip_val and isinstance(trainer.precision_plugin, MixedPrecision):
        raise UserError(
            f"optimizer.params.fused=true excludes trainer.params.gradient_clip_val in {trainer.precision}; drop one"
        )
    return trainer


def emulates_bf16(trainer: L.Trainer) -> bool:
    """Whether it would compute in bf16 on a CPU that cannot."""
    on_cpu = trainer.strategy.root_device.type == "cpu"
    return on_cpu and trainer.precision == "bf16-mixed" and not torch.ops.mkldnn._is_mkldnn_bf16_supported()


def build_module(config: DictConfig) -> Trainable:
    """The networks with their weights, and what trains them."""
    extras = {"diffusion": instantiate(config.diffusion, "diffusion")} if "diffusion" in config else {}
    networks = build_networks(config)
    if "branch" in networks and "branch" not in weight_files(config):
        networks["branch"].init_from(networks["unet"])  # where training begins (DiffBIR, section 3.2)
    module = instantiate(config.module, "module")(**networks, **extras, seed=config.seed)
    module.to(memory_format=torch.channels_last)
    if dtype := config.get("frozen_dtype"):
        if dtype not in PRECISIONS:
            raise UserError(f"frozen_dtype must be one of {', '.join(PRECISIONS)}, not '{dtype}'")
        module.frozen.to(PRECISIONS[dtype])
    if options := config.get("compile"):
        for network in [*module.trained.values(), *module.frozen.values()]:
            compile_network(network, {} if options is True else options)
    return module


@rank_zero_only
def record_run(config: DictConfig, run_dir: Path, facts: dict) -> None:
    """Writes the resolved configuration, and how the run was started, into the run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
    for part in (run_dir / "checkpoints").glob(".*.part"):
        part.unlink()  # what a killed run was writing
    OmegaConf.save(config, run_dir / "config.yaml")
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    run = {
        "command": shlex.join(sys.argv),
        "commit": commit.stdout.strip() or "unknown",
        "python": sys.version.split()[0],
        **versions(PACKAGES),
        **facts,
    }
    OmegaConf.save(OmegaConf.create(run), run_dir / "run.yaml")
