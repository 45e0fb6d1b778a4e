"""What a training leaves out, to be validated on."""

from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray

from diffbir.dataset.sources.files import Sample, Source
from diffbir.utils.cli import UserError


class Held:
    """The pictures of a source with some numbers.

    Args:
        numbers: of the pictures, in the order that they shall have.
    """

    def __init__(self, source: Source, numbers: NDArray[np.int64]):
        self.source, self.numbers, self.paired = source, numbers, source.paired

    def __len__(self) -> int:
        return len(self.numbers)

    def number(self, i: int) -> int:
        return int(self.numbers[i])

    def name(self, i: int) -> str:
        return self.source.name(self.number(i))

    def key(self, i: int) -> str:
        return self.source.key(self.number(i))

    def read(self, i: int, rng: np.random.Generator) -> Sample:
        return self.source.read(self.number(i), rng)


class Rest(Held):
    """The other pictures, in their order; of millions, without a list of them."""

    def __init__(self, source: Source, without: NDArray[np.int64]):
        super().__init__(source, np.sort(without))
        self.before = self.numbers - np.arange(len(without))  # how many remain before each that is missing

    def __len__(self) -> int:
        return len(self.source) - len(self.numbers)

    def number(self, i: int) -> int:
        return i + int(np.searchsorted(self.before, i, side="right"))


def hold_out(source: Source) -> tuple[Rest, Held]:
    """Splits a source by a hash of the pictures' names: into what is trained on, and what is kept for validation.

    Kept are the lowest hashes: of a hundred pictures one, but at least 32, unless that is more than one in ten, and at
    most 1000. The hash is of the name within the source, so the split is the same wherever that lies, on all ranks and
    in every run, and hardly changes as pictures are added.

    Raises:
        UserError: it has a single picture.
    """
    n = len(source)
    if n < 2:
        raise UserError(f"{source.name(0)} is the only picture; give others to validate on (val_photos=)")
    count = max(1, min(n // 10, max(32, min(n // 100, 1000))))
    hashes = (
        int.from_bytes(blake2b(source.key(i).encode(errors="surrogateescape"), digest_size=8).digest(), "big")
        for i in range(n)
    )
    numbers = np.sort(np.argsort(np.fromiter(hashes, np.uint64, n), kind="stable")[:count])
    return Rest(source, numbers), Held(source, numbers)
