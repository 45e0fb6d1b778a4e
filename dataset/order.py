"""In which order a training goes through its images: any position of any epoch is known without the ones before."""

from collections.abc import Iterator
from functools import lru_cache
from math import isqrt

import numpy as np
from torch.utils.data import Sampler

HALF_ROUNDS = 20  # with fewer, the orders of very few items are measurably not equally likely
WORD = 2**64 - 1


def shuffled(i: int, n: int, seed: int, epoch: int) -> int:
    """Which of `n` items stands at position `i` of an epoch's random order.

    A keyed bijection in constant time and memory: a Feistel network on the smallest grid of about equal sides with at
    least n cells, walked along its cycle until it comes out below n (Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", 2002, methods 2 and 3). It is no cipher: the round function only mixes well.
    """
    columns = isqrt(n - 1) + 1
    rows = -(-n // columns)
    keys = _keys(n, seed, epoch)
    while True:
        row, column = divmod(i, columns)
        for key_row, key_column in keys:
            row = (row + _mix(column ^ key_row)) % rows
            column = (column + _mix(row ^ key_column)) % columns
        i = row * columns + column
        if i < n:
            return i


def _mix(x: int) -> int:
    """The finalizer of SplitMix64."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & WORD
    return x ^ (x >> 31)


@lru_cache(maxsize=4)
def _keys(n: int, seed: int, epoch: int) -> list[list[int]]:
    return np.random.SeedSequence((seed, epoch, n)).generate_state(HALF_ROUNDS, np.uint64).reshape(-1, 2).tolist()


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
