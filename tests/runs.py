"""Trainings of tiny networks, in this process or another, and what they leave."""

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffbir.model.training.run import train
from diffbir.utils.config import load_config, read_config

ROOT = Path(__file__).parents[1]
N = 3
PHOTOS = str(ROOT / "inputs/demo")
TINY = [
    f"val_photos={PHOTOS}",
    "data.params.batch_size=2",
    "data.params.num_workers=1",
    "data.params.train.params.crop_size=32",
    "data.params.val.params.crop_size=32",
    "data.params.val.params.limit=2",
    "trainer.params.log_every_n_steps=1",
]
STAGES = {
    "stage1": ["networks.stage1.params.depths=[2]", "networks.stage1.params.num_heads=[2]"],
    "stage2": [
        "weights.stage1=null",
        "weights.autoencoder=null",
        "weights.unet=null",
        "networks.stage1.params.depths=[2]",
        "networks.stage1.params.num_heads=[2]",
        "networks.autoencoder.params.channels=8",
        "networks.unet.params.model_channels=16",
        "networks.unet.params.head_channels=16",
        "module.params.steps=2",
    ],
}


def as_shipped(stage: str) -> list[str]:
    """Makes the networks whole again, with the embedded model's weights."""
    config = read_config(ROOT / f"configs/train/mini/{stage}.yaml")
    sizes = [o.partition("=")[0] for o in STAGES[stage] if o.startswith("networks.")]
    trained = {"stage1": ["stage1"], "stage2": ["stage1", "autoencoder", "unet"]}[stage]
    weights = [f"weights.{name}={ROOT}/weights/mini/{name}.safetensors" for name in trained]
    return [*(f"{key}={OmegaConf.select(config, key)}" for key in sizes), *weights]


def settings(stage: str, run_dir: Path, steps: int, *overrides: str) -> list[str]:
    values = {
        "photos": PHOTOS,
        "run_dir": run_dir,
        "trainer.params.max_steps": steps,
        "checkpoint_every": N,
        "validate_every": steps,
    }
    return [*(f"{k}={v}" for k, v in values.items()), *TINY, *STAGES[stage], *overrides]


def run(stage: str, *args, **kwargs) -> None:
    train(load_config(ROOT / f"configs/train/mini/{stage}.yaml", settings(stage, *args, **kwargs)))


@contextmanager
def process(stage: str, *args, **kwargs) -> Iterator[subprocess.Popen]:
    command = [sys.executable, f"train_{stage}.py", *settings(stage, *args)]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, **kwargs}
    running = subprocess.Popen(command, **options)
    try:
        yield running
    finally:
        running.kill()
        running.wait()


def wait_for(run_dir: Path, step: int, running: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not (run_dir / "checkpoints" / f"{step:07d}.ckpt").exists():
        assert running.poll() is None, running.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.005)


def state(run_dir: Path, step: int) -> dict:
    return torch.load(run_dir / "checkpoints" / f"{step:07d}.ckpt", weights_only=True)


def scalars(run_dir: Path) -> dict[str, list[tuple[int, float]]]:
    """Tag -> (step, value)s of what was logged."""
    (file,) = (run_dir / "logs").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def assert_equal(a: object, b: object, name: str) -> None:
    assert type(a) is type(b), name
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), name
    elif isinstance(a, dict | list):
        pairs = [*(a.items() if isinstance(a, dict) else enumerate(a))]
        assert len(a) == len(b), name
        for key, value in pairs:
            assert_equal(value, b[key], f"{name}.{key}")
    else:
        assert a == b, name
