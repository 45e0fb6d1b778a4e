"""What memory is free, and what to do when it isn't."""

import ctypes
import logging
import resource
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Generic, TypeVar

import torch

log = logging.getLogger(__name__)

MEMINFO = Path("/proc/meminfo")
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
UNKNOWN = 4 * 2**30  # bytes that are assumed to be free where the system doesn't say

Plan = TypeVar("Plan")
Output = TypeVar("Output")


def free_bytes(device: torch.device) -> int:
    """Bytes that tensors on this device can still take."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and MEMINFO.is_file():
        lines = dict(line.split(":") for line in MEMINFO.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    return UNKNOWN


def is_out_of_memory(error: Exception) -> bool:
    """Only CUDA has an exception of its own for it."""
    words = ("out of memory", "DefaultCPUAllocator")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or any(word in str(error) for word in words)


class FirstThatFits(Generic[Plan]):
    """Computes with the first of several plans that doesn't run out of memory, and stays with it from then on.

    Args:
        plans: from the fastest to the one that needs least memory.
        before_retry: called before the next plan is tried, to drop what the failed one left behind.
    """

    def __init__(self, plans: Iterable[Plan], before_retry: Callable[[], None] = lambda: None):
        self.plans, self.before_retry = list(plans), before_retry

    def __call__(self, function: Callable[[Plan], Output]) -> Output:
        """Raises what `function` raises for another reason, or with the last plan."""
        while True:
            try:
                return function(self.plans[0])
            except (RuntimeError, MemoryError) as error:
                if len(self.plans) == 1 or not is_out_of_memory(error):
                    raise
            # Not in the handler, where the traceback would keep the tensors of the failed attempt alive.
            failed = self.plans.pop(0)
            log.warning("out of memory with %s; it goes on with %s", failed, self.plans[0])
            self.before_retry()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()


def give_back() -> None:
    """Returns to the system what the C library keeps of freed memory: anything below 32 MB, in pieces.

    Worth its milliseconds after many activations of a large picture, between whose remains the next ones don't fit.
    Does nothing where the library isn't glibc.
    """
    if hasattr(LIBC, "malloc_trim"):
        LIBC.malloc_trim(0)


def peak_bytes(device: torch.device) -> int:
    """Most memory that tensors have taken on a GPU, or that this process has taken, so far."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
