"""Which result belongs to which reference, by name."""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from diffbir.utils.cli import UserError

# What datasets and programs add to a name: 0801x4, Canon_001_LR4, Canon_001_HR, photo_SRx4, photo_out.
SUFFIX = re.compile(r"(?:[_-]?x\d+|[_-](?:lr\d*|hr\d*|sr\d*|gt|lq|hq|out|restored))+$", re.IGNORECASE)


@dataclass(frozen=True)
class Pairing:
    """Pairs, and what has no partner.

    Args:
        pairs: name -> result and reference.
        lone_results, lone_references: names of files.
    """

    pairs: dict[str, tuple[Path, Path]]
    lone_results: tuple[str, ...] = ()
    lone_references: tuple[str, ...] = ()


def pair(results: dict[str, Path], references: dict[str, Path]) -> Pairing:
    """Equal names first, whatever their file types; then names that are equal without suffixes such as _x4 and _LR4.

    Args:
        results, references: relative name -> file.

    Raises:
        UserError: two files claim the same partner, or there is no pair at all.
    """
    pairs: dict[str, tuple[Path, Path]] = {}
    lone, wanted = dict(results), dict(references)
    for shorten in (_stem, _base, lambda name: _base(Path(name).name)):
        left, right = _by(shorten, lone), _by(shorten, wanted)
        for key in left.keys() & right.keys():
            if len(left[key]) > 1 or len(right[key]) > 1:
                several = left[key] if len(left[key]) > 1 else right[key]
                raise UserError(
                    f"{' and '.join(several)} have the same name without type and suffix, so that it is unclear which "
                    "of them belongs to its partner; rename or move one"
                )
            result, reference = left[key][0], right[key][0]
            pairs[reference] = lone.pop(result), wanted.pop(reference)
    if not pairs:
        raise UserError(
            f"no result has the name of a reference: there are {', '.join(sorted(lone)[:3])} and "
            f"{', '.join(sorted(wanted)[:3])}; names may differ by type and by suffixes such as _x4 only"
        )
    return Pairing(dict(sorted(pairs.items())), tuple(sorted(lone)), tuple(sorted(wanted)))


def _stem(name: str) -> str:
    return Path(name).with_suffix("").as_posix()


def _base(name: str) -> str:
    """Without type and suffixes; what is nothing but a suffix stays."""
    path = Path(_stem(name))
    return path.with_name(SUFFIX.sub("", path.name) or path.name).as_posix()


def _by(key, names) -> dict[str, list[str]]:
    grouped = defaultdict(list)
    for name in names:
        grouped[key(name)].append(name)
    return grouped
