"""What all trainings share, on one weight: when the learning rate steps, and which noise a step draws."""

import csv

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from diffbir.utils.cli import UserError
from tests.line import Line, fit


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_learning_rate_steps_once_per_optimizer_step(accumulated):
    """Rates 1, 1/2, 1/4, 1/8 within one epoch: the weight falls by their sum."""
    module = Line(lr_schedule=lambda optimizer: LambdaLR(optimizer, lambda n: 0.5**n))
    fit(module, [1.0] * 4 * accumulated, accumulate_grad_batches=accumulated)
    assert module.weight == -(1 + 1 / 2 + 1 / 4 + 1 / 8)


class Noisy(Line):
    """Notes what every batch draws."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.drawn: list[float] = []

    def training_step(self, batch: dict, number: int) -> Tensor:
        self.drawn.append(torch.rand((), dtype=torch.float64).item())
        return super().training_step(batch, number)


def draws(rank: int, seed: int = 0) -> list[float]:
    module, strategy = Noisy(seed=seed), SingleDeviceStrategy(torch.device("cpu"))
    strategy.global_rank = rank  # one process that is told to be one of many
    fit(module, [1.0] * 6, strategy=strategy, accumulate_grad_batches=2)
    return module.drawn


def test_every_batch_of_every_rank_and_seed_draws_its_own_noise():
    of_each = [draws(rank, seed) for rank in (0, 1, 5) for seed in (0, 1)]
    assert len({value for drawn in of_each for value in drawn}) == 6 * 6
    assert draws(5, 1) == of_each[-1]


def test_seeds_of_any_size_differ():
    seeds = [2**63 + 1, 10**12, 4 * 10**9, 4 * 10**9 + 1]
    assert len({draws(0, seed)[0] for seed in seeds}) == len(seeds)


class Logged(Line):
    def training_step(self, batch: dict, number: int) -> Tensor:
        self.log("train/loss", batch["x"].mean())
        return super().training_step(batch, number)


def test_the_logged_loss_is_the_mean_over_micro_batches_and_steps_since_the_last_log(tmp_path):
    values = [1.0, 3.0, 5.0, 8.0, 2.0, 2.0, 0.0, 1.0]
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    fit(Logged(), values, logger=logger, accumulate_grad_batches=2, log_every_n_steps=2)
    with open(logger.experiment.metrics_file_path) as file:
        rows = list(csv.DictReader(file))
    assert [(int(r["step"]), float(r["train/loss"])) for r in rows] == [(1, 17 / 4), (3, 5 / 4)]


def test_a_schedule_that_ends_too_soon_is_one_sentence():
    with pytest.raises(UserError, match=r"ends at step 2, before trainer\.params\.max_steps \(4\)"):
        module = Line(lr_schedule=lambda optimizer: OneCycleLR(optimizer, 1.0, total_steps=2))
        fit(module, [1.0] * 4, max_steps=4)
