"""The order of a training, and what it costs."""

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from scipy import stats

from diffbir.dataset.order import DrawSampler, shuffled

# A right implementation fails a statistical test below with this probability, over all seeds; the seeds are fixed.
ERROR = 1e-4


def order(n: int, seed: int = 0, epoch: int = 0) -> list[int]:
    return [shuffled(i, n, seed, epoch) for i in range(n)]


@pytest.mark.parametrize("n", [*range(1, 40), 99, 100, 101, 1000, 4097])
def test_every_item_has_one_place(n):
    assert sorted(order(n)) == list(range(n))


@pytest.mark.parametrize("n", [3, 4, 5, 6])
@pytest.mark.parametrize("of", ["seeds", "epochs"])
def test_all_orders_are_equally_likely(n, of):
    """Chi-square test over the n! orders."""
    draws = 2000 + 10 * math.factorial(n)
    counts = Counter(tuple(order(n, *((k, 0) if of == "seeds" else (0, k)))) for k in range(draws))
    assert stats.chisquare([counts[each] for each in permutations(range(n))]).pvalue > ERROR


def test_a_long_order_looks_random():
    """Of 20,000 items: neighbours are as far apart as by chance, and the first quarter has of every tenth as many."""
    n = 20_000
    found = np.array(order(n, seed=5))
    steps = np.abs(np.diff(found)) / n  # of two uniform numbers: mean 1/3, variance 1/18
    assert abs(steps.mean() - 1 / 3) < 4 * math.sqrt(1 / 18 / n)
    assert stats.chisquare(np.bincount(found[: n // 4] * 10 // n)).pvalue > ERROR
    assert abs(stats.spearmanr(found, order(n, seed=6)).statistic) < 4 / math.sqrt(n)
    assert abs(stats.spearmanr(found, order(n, seed=5, epoch=1)).statistic) < 4 / math.sqrt(n)


def test_a_place_is_known_without_the_others():
    """Of more items than there is memory for."""
    n = 10**15
    places = [shuffled(i, n, 1, 2) for i in range(1000)]
    assert len(set(places)) == 1000
    assert stats.kstest(np.array(places) / n, "uniform").pvalue > ERROR


# Draws over ranks and resumed runs


@pytest.mark.parametrize("start", [0, 8, 24])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_draws_of_a_run_without_gap_or_overlap(ranks, start):
    shares = [list(DrawSampler(24, start, rank, ranks)) for rank in range(ranks)]
    assert sorted(n for share in shares for n in share) == list(range(start, 24))
    assert len({len(share) for share in shares}) == 1


def test_ranks_advance_together():
    """The k-th draws of all ranks are one stretch of the stream: a step consumes what a resumed run starts after."""
    shares = [list(DrawSampler(24, 0, rank, 4)) for rank in range(4)]
    for step in range(6):
        assert sorted(share[step] for share in shares) == list(range(4 * step, 4 * step + 4))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_resumed_run_goes_on_where_it_stopped(ranks):
    for rank in range(ranks):
        run = list(DrawSampler(24, 0, rank, ranks))
        resumed = list(DrawSampler(24, 12, rank, ranks))
        assert run[12 // ranks :] == resumed


def test_the_length_is_that_of_the_whole_run_also_when_it_is_resumed():
    """The trainer counts batches from the beginning of the run."""
    assert len(DrawSampler(24, 0, 1, 4)) == len(list(DrawSampler(24, 0, 1, 4))) == 6
    assert len(DrawSampler(24, 12, 1, 4)) == 6
