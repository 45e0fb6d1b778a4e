"""What all test modules share: threads and fixtures."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = Path(__file__).parent / "golden"

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # The workers share the cores, and so do the processes that tests start.
    threads = max(1, torch.get_num_threads() // int(workers))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def models_golden() -> dict[str, torch.Tensor]:
    """Outputs of the published networks, filled and fed by `tests.golden.fill`."""
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "models.npz").items()}


@pytest.fixture(scope="session")
def numerics_golden() -> dict[str, torch.Tensor]:
    """Schedules, trajectories, kernels and colours of the published code."""
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "numerics.npz").items()}
