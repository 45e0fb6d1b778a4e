"""One function of many numbers, in several processes."""

from collections.abc import Callable, Iterator, Sequence
from typing import Generic, TypeVar

from torch.utils.data import DataLoader, Dataset

T = TypeVar("T")


class Calls(Dataset, Generic[T]):
    """Item i is what the function makes of the i-th number."""

    def __init__(self, function: Callable[[int], T], numbers: Sequence[int]):
        self.function, self.numbers = function, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> T:
        return self.function(self.numbers[i])


def computed(function: Callable[[int], T], numbers: Sequence[int], workers: int, block: int = 64) -> Iterator[T]:
    """What the function makes of every number, in their order; nothing of it is kept.

    Args:
        function: its results must be of types that other modules can import, since they come by pickle.
        workers: processes, forked from this one; with 0 or 1 there is only this one.
        block: numbers that go to a process at a time; each is at most two blocks ahead.

    Raises:
        What the function raises; of other processes, an error of the same class (see `utils.cli.sentence`).
    """
    if workers < 2:
        yield from map(function, numbers)
        return
    calls = Calls(function, numbers)
    for results in DataLoader(calls, block, num_workers=workers, collate_fn=list, multiprocessing_context="fork"):
        yield from results
