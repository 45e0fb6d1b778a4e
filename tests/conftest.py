"""Fixtures that several test modules share."""

from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture(scope="session")
def models_golden() -> dict[str, torch.Tensor]:
    """Outputs of the published networks, filled and fed by `tests.golden.fill`."""
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "models.npz").items()}


@pytest.fixture(scope="session")
def numerics_golden() -> dict[str, torch.Tensor]:
    """Schedules, trajectories, kernels and colours of the published code."""
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "numerics.npz").items()}
