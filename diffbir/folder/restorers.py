"""The restorers of a run: one, or with `--task auto` one for each task, which differ in stage 1 alone."""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from diffbir.faces.detect import Detector
from diffbir.faces.restorer import FaceRestorer
from diffbir.folder.task import DENOISE, SR
from diffbir.model.presets import load_preset, tasks_of
from diffbir.model.restorer import Restorer

AUTO, FACE = "auto", "face"
PARTNERS = {"v1_general": "v1_face"}  # preset -> the one that was trained for faces beside it


@dataclass(frozen=True)
class Faces:
    """How `--faces` finds and restores them; see `FaceRestorer`.

    Args:
        preset: of the faces; None is the partner of the preset in use, or that itself, with its task face if it has
            one.
        options: what the command line changes, also for a preset of their own.
        threshold, detector: see `Detector`.
    """

    preset: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    threshold: float = 0.9
    only_center: bool = False
    detector: str | None = None

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "preset": self.preset,
            "threshold": self.threshold,
            "only_center": self.only_center,
            "detector": self.detector,
        }


@dataclass
class Restorers:
    """Which restorer a process builds, when it is first asked for; see `Restorer.from_preset`."""

    preset: str
    task: str | None
    stage1: str | None
    stage: str | None
    precision: str
    offload: bool
    overrides: tuple[str, ...]
    lora: tuple[str, ...] = ()
    device: str = "auto"
    faces: Faces | None = None
    compiled: bool = False
    built: dict[str | None, Restorer] = field(default_factory=dict, repr=False)
    with_faces: dict[str | None, FaceRestorer] = field(default_factory=dict, repr=False)

    def config(self) -> DictConfig:
        """Raises:
        UserError: the preset is wrong, or lacks a task.
        """
        tasks = (DENOISE, SR) if self.task == AUTO else (self.task,)
        return [load_preset(self.preset, task, self.stage1, self.overrides, self.lora) for task in tasks][-1]

    def facts(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "preset": self.preset,
            "task": self.task,
            "stage1": self.stage1,
            "lora": list(self.lora) or None,
            "precision": self.precision,
            "overrides": list(self.overrides),
            "faces": self.faces and self.faces.facts(),
        }

    def build(self) -> Restorer | FaceRestorer:
        """Some restorer of the run; all share what isn't stage 1."""
        ready = self.with_faces if self.faces else self.built
        return next(iter(ready.values())) if ready else self(SR if self.task == AUTO else None)

    def __call__(self, task: str | None) -> Restorer | FaceRestorer:
        """The restorer of a task; None is the run's own.

        Raises:
            UserError: it can't be built.
        """
        if self.faces is None:
            return self.whole(task)
        if task not in self.with_faces:
            first = next(iter(self.with_faces.values()), None)
            new = self.first_with_faces(self.whole(task)) if first is None else copy.copy(first)
            new.background = self.whole(task)
            self.with_faces[task] = new
        return self.with_faces[task]

    def first_with_faces(self, background: Restorer) -> FaceRestorer:
        """What finds and restores faces, beside a restorer of the background."""
        restorer, options = background, None
        if preset := self.faces.preset or PARTNERS.get(self.preset):
            restorer = Restorer.from_preset(preset, self.device, self.precision, stage=self.stage, **self.machine())
            options = self.faces.options
        elif self.stage1 is None and self.stage != "2" and self.task != FACE and FACE in tasks_of(self.preset):
            restorer = self.whole(FACE)
        detector = Detector(self.faces.detector, background.device, self.faces.threshold)
        return FaceRestorer(background, restorer, detector, options, self.faces.only_center)

    def machine(self) -> dict[str, Any]:
        return {"offload": self.offload, "compiled": {} if self.compiled else None}

    def whole(self, task: str | None) -> Restorer:
        """The restorer of a task without regard to faces."""
        if task not in self.built:
            whole = next(iter(self.built.values()), None)
            new = Restorer.from_preset(
                self.preset,
                self.device,
                self.precision,
                task=task or self.task,
                stage1=self.stage1,
                stage=self.stage if whole is None else "1",
                **self.machine(),
                overrides=self.overrides,
                lora=self.lora,
            )
            if whole is not None:
                stage1, new = new.stage1, copy.copy(whole)
                new.stage1 = stage1
            self.built[task] = new
        return self.built[task]
