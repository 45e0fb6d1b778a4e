"""What happens when memory runs out."""

import resource
from pathlib import Path

import pytest
import torch

from diffbir.utils.memory import LIBC, UNKNOWN, FirstThatFits, free_bytes, give_back, is_out_of_memory


def test_sizes_shrink_until_they_fit_and_stay(caplog):
    tried = []

    def function(side: int) -> int:
        tried.append(side)
        if side > 100:
            raise torch.OutOfMemoryError
        return side * 2

    fit = FirstThatFits([512, 256, 128, 64])
    assert fit(function) == fit(function) == 128
    assert tried == [512, 256, 128, 64, 64]
    assert "out of memory with 512; it goes on with 256" in caplog.text


def test_the_last_plan_and_other_errors_raise():
    def fails(error: Exception):
        def function(_):
            raise error

        return function

    with pytest.raises(torch.OutOfMemoryError):
        FirstThatFits([2, 1])(fails(torch.OutOfMemoryError()))
    fit = FirstThatFits([2, 1])
    with pytest.raises(RuntimeError, match="shapes"):
        fit(fails(RuntimeError("shapes differ")))
    assert fit(lambda plan: plan) == 2


def test_a_failed_allocation_of_the_cpu_is_recognised():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(MemoryError())
    assert not is_out_of_memory(RuntimeError("size mismatch"))


def test_free_memory_is_known():
    assert free_bytes(torch.device("cpu")) > 2**26
    assert free_bytes(torch.device("meta")) == UNKNOWN


@pytest.mark.skipif(not hasattr(LIBC, "malloc_trim"), reason="not glibc")
def test_freed_memory_goes_back_to_the_system():
    """Blocks that the C library keeps, because others among them are still in use."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    blocks = [torch.ones(2**14) for _ in range(4096)]  # 256 MB
    full = resident()
    blocks = blocks[::16]
    give_back()
    assert full - resident() > 200e6
    assert all(block.sum() == 2**14 for block in blocks)
