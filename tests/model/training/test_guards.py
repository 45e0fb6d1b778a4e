"""What guards a training, on a network of one layer, by Lightning's own loop."""

import os
import signal

import pytest
import pytorch_lightning as L
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.testing import assert_close
from torch.utils.data import DataLoader

from diffbir.model.training.base import Trainable
from diffbir.model.training.checkpointing import WholeCheckpoints
from diffbir.model.training.guards import FrozenWeights, NonFiniteGuard, Stop, StopOnSignal
from diffbir.model.training.run import build_module
from diffbir.utils.cli import UserError
from diffbir.utils.config import ROOT, load_config
from tests.runs import settings

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class Toy(Trainable):
    """Means of sqrt(w x): x = NaN gives a loss of NaN, x = 0 a loss of 0 whose gradient isn't finite."""

    def __init__(self, careless: bool = False):
        trained, frozen = nn.Linear(1, 1, bias=False), nn.Linear(1, 1)
        nn.init.constant_(trained.weight, 4.0)
        super().__init__({"net": trained}, {"other": frozen}, lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5))
        self.careless = careless
        self.weights: list[float] = []

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        if self.careless:
            self.frozen["other"].bias.data += 1e-4
        return self.trained["net"](batch["x"]).sqrt().mean()

    def on_train_batch_end(self, *_) -> None:
        self.weights.append(self.trained["net"].weight.item())


def fit(module: Toy, values: list[float], *callbacks: L.Callback, **options) -> L.Trainer:
    loader = DataLoader([{"x": torch.tensor([x])} for x in values], batch_size=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = L.Trainer(
        max_epochs=1, callbacks=[*callbacks], enable_checkpointing=False, log_every_n_steps=1, **quiet, **options
    )
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0], ids=["loss", "infinite loss", "gradient"])
def test_a_step_that_is_not_finite_leaves_the_weights_alone(bad, tmp_path):
    """Neither its gradient nor weight decay nor the momentum of the steps before it moves them."""
    module, guard = Toy(), NonFiniteGuard(str(tmp_path))
    trainer = fit(module, [1.0, bad, 2.0], guard)
    first, second, third = module.weights
    assert first < 4.0
    assert second == first
    assert third < second
    (state,) = trainer.optimizers[0].state.values()
    assert state["step"] == 2
    (file,) = tmp_path.iterdir()
    assert file.name == "0000001_rank0.pt"
    (batch,) = torch.load(file, weights_only=True)["batches"]
    assert_close(batch["x"], torch.tensor([[bad]]), equal_nan=True)


@pytest.mark.parametrize("fused", [False, True])
def test_a_loss_that_is_not_finite_in_fp16_leaves_the_weights_alone(fused, tmp_path):
    """With its scaler, whether the optimizer unscales by itself or not; the logged norm is that of the gradient."""
    module = Toy()
    module.optimizer = lambda p: torch.optim.AdamW(p, 0.1, weight_decay=0.5, fused=fused)
    norms = []
    module.log = lambda name, value, **kwargs: norms.append(float(value)) if name == "train/grad_norm" else None
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    precision = MixedPrecision("16-mixed", "cpu", scaler)
    trainer = fit(module, [1.0, float("nan"), 1.0], NonFiniteGuard(str(tmp_path)), plugins=[precision])
    first, second, third = module.weights
    assert first < 4.0 and second == first and third < second
    assert len(list(tmp_path.iterdir())) == 1
    (state,) = trainer.optimizers[0].state.values()
    assert state["step"] == 2
    assert norms[0] == pytest.approx(0.5 / 4.0**0.5, rel=1e-3)  # d sqrt(w) / dw at w = 4


def test_one_bad_batch_spoils_the_step_that_it_is_accumulated_into(tmp_path):
    module = Toy()
    fit(module, [1.0, float("nan"), 1.0, 2.0], NonFiniteGuard(str(tmp_path)), accumulate_grad_batches=2)
    assert module.weights[:3] == [4.0, 4.0, 4.0]
    assert module.weights[3] < 4.0
    (file,) = tmp_path.iterdir()
    assert len(torch.load(file, weights_only=True)["batches"]) == 2


def test_too_many_bad_steps_end_the_run(tmp_path):
    module = Toy()
    with pytest.raises(UserError, match=f"3 steps.*{tmp_path}"):
        fit(module, [1.0, *[float("nan")] * 10], NonFiniteGuard(str(tmp_path), max_skips=2))
    assert len(module.weights) == 4
    assert len(list(tmp_path.iterdir())) == 3


def test_bad_steps_far_apart_do_not_end_the_run(tmp_path):
    bad, good = float("nan"), 1.0
    module = Toy()
    fit(module, [bad, bad, good, bad, bad, good, bad], NonFiniteGuard(str(tmp_path), max_skips=2))
    assert len(module.weights) == 7
    assert len(list(tmp_path.iterdir())) == 5


def test_the_norm_of_the_gradient_is_logged(tmp_path):
    trainer = fit(Toy(), [9.0], NonFiniteGuard(str(tmp_path)))
    assert trainer.callback_metrics["train/grad_norm"] == pytest.approx(9 / (2 * 6))  # d sqrt(9 w) / dw at w = 4


def test_a_frozen_weight_that_moves_is_named():
    with pytest.raises(RuntimeError, match=r"frozen\.other\.bias"):
        fit(Toy(careless=True), [1.0, 2.0], FrozenWeights())
    fit(Toy(), [1.0, 2.0], FrozenWeights())


class Signalled(Toy):
    """Gets a signal in its second batch."""

    def __init__(self, number: int):
        super().__init__()
        self.number = number

    def training_step(self, batch: dict, index: int) -> torch.Tensor:
        if index == 1:
            os.kill(os.getpid(), self.number)
        return super().training_step(batch, index)


@pytest.mark.parametrize("accumulated, finished", [(1, 2), (3, 3)])
@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_ends_the_training_after_the_step_under_way(number, accumulated, finished):
    """The exit status names the signal."""
    module, handlers = Signalled(number), {n: signal.getsignal(n) for n in SIGNALS}
    try:
        with pytest.raises(Stop) as stop:
            fit(module, [1.0] * 9, StopOnSignal(), accumulate_grad_batches=accumulated)
    finally:
        for n, handler in handlers.items():
            signal.signal(n, handler)
    assert stop.value.code == 128 + number
    assert len(module.weights) == finished
    assert module.trainer.global_step == finished // accumulated


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path, checkpoints = tmp_path / "a.ckpt", WholeCheckpoints()
    checkpoints.save_checkpoint({"x": torch.ones(3)}, path)
    with pytest.raises(AttributeError):
        checkpoints.save_checkpoint({"x": torch.zeros(3), "code": lambda: None}, path)  # fails halfway: no pickle
    assert [*tmp_path.iterdir()] == [path]
    assert_close(checkpoints.load_checkpoint(path)["x"], torch.ones(3))


def test_an_overflow_while_sampling_changes_no_weights_of_the_training(tmp_path, caplog):
    """Two frozen networks overflow in half precision; the guard sees nothing, and gradients still pass through them."""
    options = settings("stage2", tmp_path, 1, "frozen_dtype=fp16", "module.params.train_unet=false")
    module = build_module(load_config(ROOT / "configs/train/mini/stage2.yaml", options))
    with torch.no_grad():
        for layer in (module.frozen["autoencoder"].decoder.conv_in, module.frozen["unet"].input_blocks[0][0]):
            layer.weight.normal_(0, 60000)
    guard = FrozenWeights()
    guard.on_fit_start(None, module)
    batch = {
        "lq": torch.rand(1, 3, 32, 32),
        "hq": torch.rand(1, 3, 32, 32),
        "prompt": [""],
        "number": torch.tensor([0]),
    }
    with torch.autocast("cpu", torch.float16):
        module.restore(batch)
    for name in ("AutoencoderKL", "ControlledUNet"):
        assert f"{name} overflows in torch.float16" in caplog.text
    guard.on_validation_end(None, module)
    with torch.autocast("cpu", torch.float16):
        module.losses(batch)[0].mean().backward()
    assert all(p.grad is not None for p in module.trained["branch"].parameters())
