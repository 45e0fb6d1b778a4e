"""What all trainings share, on one weight: when the learning rate steps, and which noise a step draws."""

import pytest
import torch
from pytorch_lightning.strategies import SingleDeviceStrategy
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

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
