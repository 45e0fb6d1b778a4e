"""What a visitor asks for, and how the command line says the same."""

import shlex
from dataclasses import dataclass
from typing import Any

from diffbir.utils.cli import UserError
from diffbir.web.models import Offer

OWN = "standard"  # the preset's own
MIDDLE = 7000.0  # guidance scale halfway between faithful and realistic: a chain's usual 3000 is then at 70


@dataclass(frozen=True)
class Wish:
    """How to restore a picture.

    Args:
        offer: the model.
        task: one of the offer's, or `OWN`.
        realism: from 0, faithful to stage 1, to 100, realistic; see `guidance_scale`.
        solver: of `Options`, or `OWN`.
        steps: sampling steps; 0 is the preset's own number.
        faces: whether faces are restored apart.

    Raises:
        UserError: the model doesn't know the task, or the place on the slider doesn't exist.
    """

    offer: Offer
    task: str = OWN
    realism: float = 100
    upscale: float = 1
    seed: int = 0
    solver: str = OWN
    steps: int = 0
    faces: bool = False

    def __post_init__(self):
        if self.task not in (OWN, *self.offer.tasks):
            known = f"it knows {', '.join(self.offer.tasks)}" if self.offer.tasks else "it has one for everything"
            raise UserError(f"preset {self.offer.name} has no task '{self.task}'; {known}")
        if not 0 <= self.realism <= 100:
            raise UserError(f"realism lies between 0 (faithful) and 100 (realistic), not at {self.realism}")

    @property
    def chosen_task(self) -> str | None:
        """As `--task` takes it."""
        return None if self.task == OWN else self.task

    def options(self) -> dict[str, Any]:
        """What differs from the preset: name -> value of `Options`."""
        changes = {"upscale": self.upscale, "seed": self.seed, "guidance_scale": guidance_scale(self.realism)}
        if self.solver != OWN:
            changes["solver"] = self.solver
        if self.steps:
            changes["steps"] = self.steps
        return changes

    def command(self, name: str) -> str:
        """The command line that makes the same result from a file of this name."""
        flags: dict[str, Any] = {"input": name, "output": "RESTORED", "preset": self.offer.preset}
        flags |= {"task": self.task} if self.chosen_task else {}
        words = [f"--{flag.replace('_', '-')} {shlex.quote(plain(value))}" for flag, value in flags.items()]
        words += [f"--{flag.replace('_', '-')} {plain(value)}" for flag, value in self.options().items()]
        return " ".join(["diffbir", *words, *(["--faces"] if self.faces else [])])


def guidance_scale(realism: float) -> float:
    """The guidance scale at a place of the slider: MIDDLE (100 - r) / r, which is 0 at 100 and grows without end.

    A step with guidance s takes (1 - w) of the model's estimate and w of stage 1, w = s / (s + const): so w is nearly
    even along the slider. The last place is where the one before it would be.
    """
    return float(round(MIDDLE * (100 - realism) / max(realism, 1)))


def realism(guidance_scale: float) -> int:
    """The place on the slider that is next to a guidance scale."""
    return round(100 * MIDDLE / (MIDDLE + guidance_scale))


def plain(value: Any) -> str:
    """A number as people write it."""
    return f"{value:.10g}" if isinstance(value, float) else str(value)
