"""Reading, computing and writing overlap."""

import threading
import time

import pytest

from diffbir.folder.work import AHEAD, READERS, ahead

PATIENCE = 60  # seconds, on a busy machine


def test_the_next_batches_are_read_while_one_is_computed_but_not_all():
    started = [threading.Event() for _ in range(20)]

    def read(k: int) -> int:
        started[k].set()
        return k * k

    for i, (k, result) in enumerate(ahead(list(range(20)), read)):
        assert (k, result) == (i, i * i)
        for later in range(i + 1, min(20, i + 1 + AHEAD)):
            assert started[later].wait(PATIENCE)
        assert not any(event.is_set() for event in started[i + 1 + AHEAD :])


def test_several_are_read_at_once():
    """Each of the first READERS waits for the others."""
    together = threading.Barrier(READERS, timeout=PATIENCE)
    assert [result for _, result in ahead([0] * READERS, lambda _: together.wait() >= 0)] == [True] * READERS


def test_what_goes_wrong_in_a_thread_is_raised_and_nothing_is_left_running():
    before = threading.active_count()

    def read(k: int) -> int:
        if k == 1:
            raise KeyError(k)
        return k

    with pytest.raises(KeyError):
        list(ahead([0, 1, 2, 3, 4], read))
    deadline = time.monotonic() + PATIENCE
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before
