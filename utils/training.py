"""What the training scripts share: configuration in, a run folder with checkpoints, weights, logs and pictures out."""

import argparse
import logging
import shlex
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytorch_lightning as L
import torch
from omegaconf import DictConfig, OmegaConf

from dataset.preflight import quick_check
from dataset.sources import ImagePairs
from model.networks import build_networks
from utils.cli import UserError, entry_point
from utils.config import ROOT, check_keys, instantiate, load_config

log = logging.getLogger(__name__)

REQUIRED = ("networks", "module", "data", "trainer", "run_dir", "seed")
OPTIONAL = (
    *("weights", "diffusion", "recipes", "degradation", "optimizer", "lr_schedule", "lr"),
    *("photos", "val_photos", "resume", "crop_size", "validate_every", "checkpoint_every", "ema_decay"),
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
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the YAML, merged last")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("pytorch_lightning").setLevel(logging.WARNING)
    train(load_config(args.config, args.overrides))


def train(config: DictConfig) -> None:
    """Runs one training to its last step, or from where `resume` says.

    Raises:
        UserError: a bad key, an empty folder, a missing weight file or checkpoint; before any long work.
    """
    check_keys(config, REQUIRED, OPTIONAL)
    L.seed_everything(config.seed, verbose=False)
    run_dir = Path(config.run_dir)
    checkpoint = find_checkpoint(run_dir, config.get("resume"))

    data = instantiate(config.data, "data")
    extras = {"diffusion": instantiate(config.diffusion, "diffusion")} if "diffusion" in config else {}
    module = instantiate(config.module, "module")(**build_networks(config), **extras, seed=config.seed)
    module.to(memory_format=torch.channels_last)
    trainer = instantiate(config.trainer, "trainer")

    effective_batch = data.effective_batch(trainer)
    if isinstance(data.train, ImagePairs):  # of a stream nothing is known beforehand
        quick_check(data.train, effective_batch)
    trained = sum(p.numel() for p in module.parameters() if p.requires_grad)
    record_run(config, run_dir, {"effective_batch": effective_batch, "trained_parameters": trained})
    log.info("%s: %.2f M trained parameters, effective batch %d", run_dir, trained / 1e6, effective_batch)
    if checkpoint:
        log.info("going on from %s", checkpoint)
    try:
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    except SystemExit as exit:  # what Lightning makes of Ctrl-C, once the checkpoint is saved
        log.info("stopped at step %d; the same command with resume=auto goes on from there", trainer.global_step)
        raise KeyboardInterrupt from exit
    trainer.save_checkpoint(run_dir / "checkpoints" / f"{trainer.global_step:07d}.ckpt")
    log.info("done after step %d: weights for inference are in %s", trainer.global_step, run_dir / "weights")


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


def record_run(config: DictConfig, run_dir: Path, facts: dict) -> None:
    """Writes the resolved configuration, and how the run was started, into the run folder."""
    run_dir.mkdir(parents=True, exist_ok=True)
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
