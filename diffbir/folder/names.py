"""The name of every result; no two inputs share one."""

import os
from collections import Counter
from collections.abc import Callable, Iterable

from diffbir.folder.inputs import Source


def result_names(
    sources: Iterable[Source],
    ending: Callable[[Source], str],
    owner: Callable[[str, Source], bool | None] = lambda name, source: None,
) -> list[str]:
    """Relative path of each result: the input's, with another ending.

    Inputs that differ only in suffix, or in case (which some file systems ignore), keep their suffix in the name; if
    that is taken too, they are numbered. A name that a result had in an earlier run stays its own.

    Args:
        ending: what replaces the suffix of an input, such as `.png` or `_restored.jpg`.
        owner: whether a result of that name in the output folder was made from this source; None if there is none.
    """
    sources = list(sources)
    short = [os.path.splitext(s.name)[0] + ending(s) for s in sources]
    long = [s.name + ending(s) for s in sources]
    names: dict[int, str] = {}
    taken: set[str] = set()

    def take(i: int, name: str) -> bool:
        if name.casefold() in taken:
            return False
        names[i] = name
        taken.add(name.casefold())
        return True

    for i, source in enumerate(sources):
        for name in (short[i], long[i]):
            if owner(name, source) and take(i, name):
                break
    count = Counter(short[i].casefold() for i in range(len(sources)) if i not in names)
    for i, source in enumerate(sources):
        if i not in names and count[short[i].casefold()] == 1 and owner(short[i], source) is not False:
            take(i, short[i])
    for i, source in enumerate(sources):
        number = 1
        while i not in names:
            name = long[i] if number == 1 else f"{source.name}_{number}{ending(source)}"
            if owner(name, source) is not False:
                take(i, name)
            number += 1
    return [names[i] for i in range(len(sources))]
