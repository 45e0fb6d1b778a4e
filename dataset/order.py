"""In which order a training goes through its images."""

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler


@lru_cache(maxsize=4)
def permutation(n: int, seed: int, epoch: int) -> NDArray:
    return np.random.default_rng((seed, epoch, n)).permutation(n)


class DrawSampler(Sampler[int]):
    """The draws `start + rank, start + rank + ranks, ...` of a stream that `total` draws are taken from.

    Args:
        total: draws of the whole run, over all ranks.
        start: draws already used, over all ranks (a resumed run goes on where it stopped).
    """

    def __init__(self, total: int, start: int = 0, rank: int = 0, ranks: int = 1):
        self.total, self.start, self.rank, self.ranks = total, start, rank, ranks

    def __len__(self) -> int:
        # Of the whole run also when resumed: Lightning counts batches from the run's beginning.
        return self.total // self.ranks

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.start + self.rank, self.total, self.ranks))
