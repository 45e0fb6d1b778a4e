"""What all test modules share: threads and fixtures."""

import ctypes
import os
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch

from diffbir.utils.metrics import VGG16_WEIGHTS

GOLDEN = Path(__file__).parent / "golden"

if workers := os.environ.get("PYTEST_XDIST_WORKER_COUNT"):
    # The workers share the cores, and so do the processes that tests start.
    threads = max(1, torch.get_num_threads() // int(workers))
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)

with suppress(AttributeError):  # only glibc has it
    # Memory that a test frees is used again, instead of being given back and fetched anew: a tenth of the time.
    M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
    ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**28)
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**26)

# Some tests fork processes that train. Once anything was compiled, the first backward pass starts autograd's threads
# for other devices, and forked processes then refuse to have one; with the first pass before, there are none.
torch.ones(1, requires_grad=True).backward()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first, so that no process is left with it at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(scope="session")
def models_golden() -> dict[str, torch.Tensor]:
    """Outputs of the published networks, filled and fed by `tests.golden.fill`."""
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "models.npz").items()}


@pytest.fixture(scope="session")
def numerics_golden() -> dict[str, torch.Tensor]:
    """Schedules, trajectories, kernels and colours of the published code."""
    return {k: torch.from_numpy(v) for k, v in np.load(GOLDEN / "numerics.npz").items()}


@pytest.fixture(scope="session")
def vgg16() -> Path:
    """The file of VGG16's weights; `make test` fetches it, where there is a network."""
    if not VGG16_WEIGHTS.is_file():
        pytest.skip(f"needs {VGG16_WEIGHTS}: python scripts/convert_weights.py --vgg16")
    return VGG16_WEIGHTS
