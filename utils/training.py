"""What the training scripts share: configuration in, a run folder with checkpoints, weights, logs and pictures out."""

import argparse
import copy
import logging
import shlex
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytorch_lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.strategies import FSDPStrategy, ModelParallelStrategy
from pytorch_lightning.utilities import rank_zero_only

from dataset.preflight import quick_check
from model.networks import build_networks
from model.restorer import PRECISIONS
from model.trainable import Trainable
from utils.callbacks import Monitor, peak_bytes
from utils.cli import UserError, entry_point
from utils.config import ROOT, check_keys, instantiate, load_config
from utils.files import no_room
from utils.guards import Stop
from utils.sharding import FSDP

log = logging.getLogger(__name__)

REQUIRED = ("networks", "module", "data", "trainer", "run_dir", "seed")
OPTIONAL = (
    *("weights", "diffusion", "recipes", "degradation", "degrade_on_device", "optimizer", "lr_schedule", "lr"),
    *("photos", "val_photos", "resume", "crop_size", "validate_every", "checkpoint_every", "ema_decay"),
    *("frozen_dtype", "compile"),
)
PACKAGES = ("torch", "torchvision", "pytorch-lightning", "numpy", "opencv-python", "timm")


@entry_point
def main(description: str, default_config: str, argv: list[str] | None = None) -> None:
    """Command line of a training script."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="Overrides: any key of the YAML as key=value, e.g. data.params.batch_size=8 lr=1e-4. "
        "resume=auto goes on from the newest checkpoint of run_dir, resume=FILE from that one.",
    )
    parser.add_argument("--config", default=default_config, help="YAML of the run (default: %(default)s)")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="two batches through training, validation, pictures and a checkpoint; says what the whole run will take",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the YAML, merged last")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.WARNING if rank_zero_only.rank else logging.INFO, format="%(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    for expected in (
        "You're resuming from a checkpoint that ended before",  # the data module goes on where the run stopped
        r"Found \d+ module\(s\) in eval mode",  # the frozen ones
        "It is recommended to use `self.log.*sync_dist",  # every rank validates the whole set
    ):
        warnings.filterwarnings("ignore", expected)
    if args.dry_run:
        dry_run(args.config, args.overrides)
    else:
        config = load_config(args.config, args.overrides)
        trainer = train(config)
        log.info("done after step %d: weights for inference are in %s/weights", trainer.global_step, config.run_dir)


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
    checkpoint = find_checkpoint(run_dir, config.get("resume"))

    data = instantiate(config.data, "data")
    module = build_module(config)
    trainer = build_trainer(config)

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
        raise UserError("trainer.params.strategy: write {target: utils.sharding.FSDP} for fully sharded training")
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
    module = instantiate(config.module, "module")(**build_networks(config), **extras, seed=config.seed)
    module.to(memory_format=torch.channels_last)
    if dtype := config.get("frozen_dtype"):
        if dtype not in PRECISIONS:
            raise UserError(f"frozen_dtype must be one of {', '.join(PRECISIONS)}, not '{dtype}'")
        module.frozen.to(PRECISIONS[dtype])
    if options := config.get("compile"):
        for network in module.trained.values():  # in place, so that no name changes
            network.compile(**({} if options is True else options))
    return module


def dry_run(path: str, overrides: list[str]) -> None:
    """Runs two batches through everything that a training does, and says what the whole of it will take."""
    whole = load_config(path, overrides)
    folder = Path(whole.run_dir) / "dry_run"
    short = {"max_steps": 2, "val_check_interval": 2, "limit_val_batches": 2, "accumulate_grad_batches": 1}
    overrides = [*overrides, *(f"trainer.params.{key}={value}" for key, value in short.items())]
    try:
        trainer = train(load_config(path, [*overrides, f"run_dir={folder}", "resume=null"]))
        (checkpoint,) = (folder / "checkpoints").glob("*.ckpt")
        log.info("%s", estimate(whole, trainer, checkpoint.stat().st_size))
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


def find_checkpoint(run_dir: Path, resume: str | None) -> Path | None:
    """The file that `resume` means: None starts anew, 'auto' is the newest in the run folder (None if empty)."""
    if resume is None:
        return None
    if resume == "auto":
        found = sorted((run_dir / "checkpoints").glob("*.ckpt"), key=lambda p: p.stat().st_mtime, reverse=True)
        return next((path for path in found if is_intact(path)), None)
    if not Path(resume).is_file():
        raise UserError(f"no checkpoint {resume}; give a file, or resume=auto for the newest in {run_dir}")
    return Path(resume)


def is_intact(checkpoint: Path) -> bool:
    """Whether a checkpoint can be read to its end; says so if not (a full disk or a killed job may cut one short)."""
    try:
        torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # pickle, zip and torch raise what they like
        log.warning("%s is damaged and passed over: %s", checkpoint, str(error).splitlines()[0][:120])
        return False
    return True


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
        **{name: version(name) for name in PACKAGES},
        **facts,
    }
    OmegaConf.save(OmegaConf.create(run), run_dir / "run.yaml")
