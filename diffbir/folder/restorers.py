"""The restorers of a run: one, or with `--task auto` one for each task, which differ in stage 1 alone."""

import copy
from dataclasses import dataclass, field
from typing import Any

from omegaconf import DictConfig

from diffbir.folder.task import DENOISE, SR
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer

AUTO = "auto"


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
    built: dict[str | None, Restorer] = field(default_factory=dict, repr=False)

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
        }

    def build(self) -> Restorer:
        """Some restorer of the run; all share what isn't stage 1."""
        return next(iter(self.built.values())) if self.built else self(SR if self.task == AUTO else None)

    def __call__(self, task: str | None) -> Restorer:
        """The restorer of a task; None is the run's own.

        Raises:
            UserError: it can't be built.
        """
        if task not in self.built:
            whole = next(iter(self.built.values()), None)
            new = Restorer.from_preset(
                self.preset,
                self.device,
                self.precision,
                task=task or self.task,
                stage1=self.stage1,
                stage=self.stage if whole is None else "1",
                offload=self.offload,
                overrides=self.overrides,
                lora=self.lora,
            )
            if whole is not None:
                stage1, new = new.stage1, copy.copy(whole)
                new.stage1 = stage1
            self.built[task] = new
        return self.built[task]
