"""Where in a file a network is: under the prefix that most of its keys have in common there."""

import logging
import re
from collections import defaultdict
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from diffbir.model.weights.weight_file import INSIDE, CheckpointError, splits

Shapes = Mapping[str, tuple[int, ...] | None]
log = logging.getLogger(__name__)

# Role of a network -> prefix of its keys in a file that holds a whole model (Stable Diffusion, DiffBIR v1).
ROLES = {
    "unet": "model.diffusion_model.",
    "autoencoder": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
    "branch": "control_model.",
    "stage1": "preprocess_model.",
}
EMA = re.compile(r"(?<![a-z])(?<!non_)ema(?![a-z])")
SIDE = ("loss.", "model_ema.")  # what trainings keep beside a network: of the autoencoder's loss, and an average


@dataclass(frozen=True)
class Place:
    """A prefix in a file, and what is looked for there: key -> name in the file."""

    prefix: str = ""
    found: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.prefix.rstrip(". :") or "the top level"


def places(names: Iterable[str], keys: Container[str], spell: Callable[[str], str] = str) -> list[Place]:
    """Every prefix under which some of the keys are.

    Args:
        spell: how a name without its prefix is spelled among the keys.
    """
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for name in names:
        for prefix, rest in splits(name):
            key = spell(rest)
            if key in keys:
                found[prefix].setdefault(key, name)
    return [Place(prefix, keys) for prefix, keys in found.items()]


def best(path: Path, candidates: Iterable[Place], stored: Shapes, wanted: Shapes, role: str | None = None) -> Place:
    """The place with most keys of a network; of equal ones, its averaged weights (EMA); an empty one if there is none.

    Args:
        path: the file, for messages.
        stored: name in the file -> its shape.
        wanted: key that is looked for -> its shape; None where it isn't known.
        role: key of `ROLES`, by whose prefix equal places are told apart.

    Raises:
        CheckpointError: several places are equal, so that the file's networks cannot be told apart.
    """

    def fit(place: Place) -> tuple[int, ...]:
        same = sum(stored[name] == wanted[key] for key, name in place.found.items())
        named = role in ROLES and f".{place.prefix.replace(INSIDE, '.')}".endswith((f".{ROLES[role]}", f".{role}."))
        return len(place.found), same, named, bool(EMA.search(place.prefix.lower()))

    ordered = sorted(candidates, key=lambda place: (*fit(place), -len(place.prefix)), reverse=True)
    if not ordered:
        return Place()
    first, *others = ordered
    used = set(first.found.values())
    copies = [p for p in others if fit(p)[:2] == fit(first)[:2] and used.isdisjoint(p.found.values())]
    equal = [p for p in copies if fit(p) == fit(first)]
    if equal and len(first.found) == len(wanted):
        raise CheckpointError(
            f"{path} holds the network several times ({', '.join(map(str, [first, *equal][:4]))}); save the one that "
            "is wanted in a file of its own"
        )
    if copies and EMA.search(first.prefix.lower()):
        log.warning("%s: '%s' is taken, and not '%s'", path, first, copies[0])
    return first


def beside(name: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor, by its name at the place of a network, is something else that a training keeps with it."""
    return INSIDE in name or name.startswith(SIDE) or ("." not in name and not shape)


def shared(names: Iterable[str]) -> str:
    """The prefix that all names have in common."""
    first, *others = names or [""]
    return [prefix for prefix, _ in splits(first) if all(name.startswith(prefix) for name in others)][-1]
