"""The average of the weights and where it is used, on one weight that falls by 1 in every step: w_n = -n."""

from pathlib import Path

import pytest
import pytorch_lightning as L
from safetensors.torch import load_file

from diffbir.model.training.ema import EMA, ExportWeights
from tests.line import Line, fit


class Watched(Line):
    """Notes the weight that validation sees, the one that training goes on with, and the exported file."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder
        self.validated, self.after, self.exported = [], [], []

    def validation_step(self, batch: dict, _: int) -> None:
        self.validated.append(self.weight)

    def on_validation_end(self) -> None:  # called after the callbacks'
        self.after.append(self.weight)
        self.exported.append(load_file(self.folder / "line.safetensors")["weight"].item())


def average(steps: int, decay: float) -> float:
    """a_0 = 0, a_n = d_n a_(n-1) - (1 - d_n) n with d_n = min(decay, (1 + n) / (10 + n)), the products expanded."""
    kept, total = 1.0, 0.0
    for n in range(steps, 0, -1):
        d = min(decay, (1 + n) / (10 + n))
        total, kept = total - kept * (1 - d) * n, kept * d
    return total


def test_with_a_constant_decay_the_average_is_a_geometric_series():
    """sum of (1 - d) d^(n - k) (-k) over k = 1 .. n is -n + d (1 - d^n) / (1 - d)."""
    n, d, ema = 4, 0.1, EMA(0.1)  # below 2 / 11, so that the short averages of the start don't matter
    fit(Line(), [1.0] * n, ema)
    assert ema.average["trained.line.weight"].item() == pytest.approx(-n + d * (1 - d**n) / (1 - d), rel=1e-6)


def test_at_the_start_the_average_is_short():
    """Weights of the past 2/11, then 3/12: -9/11 after one step, then a quarter of that and three quarters of -2."""
    for n, expected in ((1, -9 / 11), (2, -9 / 44 - 6 / 4)):
        ema = EMA(0.999)
        fit(Line(), [1.0] * n, ema)
        assert ema.average["trained.line.weight"].item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("accumulated", [1, 2])
def test_what_is_validated_and_exported_is_the_average_and_training_goes_on_without_it(accumulated, tmp_path):
    module = Watched(tmp_path)
    callbacks: list[L.Callback] = [EMA(0.2), ExportWeights(str(tmp_path))]
    fit(module, [1.0] * 4 * accumulated, *callbacks, accumulate_grad_batches=accumulated, validate_every=2)
    expected = [average(2, 0.2), average(4, 0.2)]
    assert module.validated == pytest.approx(expected, rel=1e-6)
    assert module.exported == pytest.approx(expected, rel=1e-6)
    assert module.after == [-2, -4]


def test_what_is_exported_at_the_end_is_the_average(tmp_path):
    fit(Line(), [1.0] * 3, ExportWeights(str(tmp_path), half=True), EMA(0.2))
    exported = load_file(tmp_path / "line.safetensors")["weight"]
    assert exported.item() == pytest.approx(average(3, 0.2), rel=1e-3)


def test_without_an_average_the_trained_weights_are_exported(tmp_path):
    fit(Line(), [1.0] * 3, ExportWeights(str(tmp_path)))
    assert load_file(tmp_path / "line.safetensors")["weight"].item() == -3
