"""The average of the trained weights, and the files for inference."""

import shutil
from pathlib import Path
from typing import Any

import pytorch_lightning as L
import torch
from torch import Tensor

from diffbir.model.networks.lora import factors, merged
from diffbir.model.training.base import Trainable
from diffbir.model.training.sharding import local, sharded_like, whole
from diffbir.model.weights.checkpoint import save_weights
from diffbir.utils.cli import UserError
from diffbir.utils.files import replacing


def trained(module: Trainable) -> dict[str, Tensor]:
    """What is averaged: the trained networks, without a discriminator."""
    return {k: v for k, v in module.state_dict().items() if k.startswith("trained.")}


class EMA(L.Callback):
    """Exponential moving average of the trained weights; validation, pictures and exported weights use it.

    Args:
        decay: weight of the past at each optimizer step; shorter at the start, min(decay, (1 + n) / (10 + n)).
    """

    def __init__(self, decay: float = 0.999):
        self.decay, self.steps = decay, 0
        self.average: dict[str, Tensor] = {}
        self.pairs: tuple[list[Tensor], list[Tensor]] = [], []  # the average and the weights that it follows
        self.raw: dict[str, Tensor] | None = None  # the trained weights while the average stands in for them

    def on_fit_start(self, trainer: L.Trainer, module: Trainable) -> None:
        loaded, self.average = self.average, {k: v.clone() for k, v in trained(module).items()}
        for k, v in loaded.items():
            self.average[k].copy_(sharded_like(v, self.average[k]))
        parameters = dict(module.named_parameters())
        self.pairs = [local(v) for v in self.average.values()], [local(parameters[k].detach()) for k in self.average]

    @torch.no_grad()
    def on_train_batch_end(self, trainer: L.Trainer, module: Trainable, *_: Any) -> None:
        if trainer.global_step == self.steps:
            return  # gradients are still accumulating
        self.steps = trainer.global_step
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(*self.pairs, 1 - decay)  # a few kernels, not one for each of a thousand tensors

    def on_validation_start(self, trainer: L.Trainer, module: Trainable) -> None:
        self.raw = {k: v.clone() for k, v in trained(module).items()}
        module.load_state_dict(self.average, strict=False)

    def on_validation_end(self, trainer: L.Trainer, module: Trainable) -> None:
        module.load_state_dict(self.raw, strict=False)
        self.raw = None

    def on_exception(self, trainer: L.Trainer, module: Trainable, exception: BaseException) -> None:
        if self.raw is not None:  # stopped during validation: the checkpoint must hold the trained weights
            self.on_validation_end(trainer, module)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self.steps, "average": whole(self.average)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.steps, self.average = state["steps"], state["average"]


class ExportWeights(L.Callback):
    """Writes `<folder>/<network>.safetensors` for inference at every validation and the end; averaged if EMA is on.

    Additions of low rank are merged into what is written so; `<folder>/lora.safetensors` holds them alone, those of
    every network that has some under its name, for a preset's `one_step.lora`.

    Args:
        folder: where the newest go.
        half: in fp16.
        keep_every: what is written at these steps also stays in `<folder>/<step>/`; a multiple of `validate_every`.
        best: a validation score, such as 'val/lpips'; what has the best so far also stays in `<folder>/best/`.
        best_mode: 'min' or 'max': which scores are better.
    """

    def __init__(
        self,
        folder: str,
        half: bool = False,
        keep_every: int | None = None,
        best: str | None = None,
        best_mode: str = "min",
    ):
        if best_mode not in ("min", "max"):
            raise ValueError(f"best_mode must be 'min' or 'max', not '{best_mode}'")
        self.folder, self.dtype = Path(folder), torch.float16 if half else None
        self.keep_every, self.best, self.sign = keep_every, best, 1 if best_mode == "max" else -1
        self.best_score: float | None = None

    def export(self, trainer: L.Trainer, module: Trainable) -> None:
        state = trained(module)
        for callback in trainer.callbacks:
            if isinstance(callback, EMA):
                state.update(callback.average)
        additions = {}
        for name, network in module.trained.items():
            prefix = f"trained.{name}."
            own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
            if own:  # a partly trained network is written whole
                own = whole({**network.state_dict(), **own})
                additions |= {f"{name}.{key}": value for key, value in factors(own, network).items()}
                if trainer.is_global_zero:
                    save_weights(merged(own), self.folder / f"{name}.safetensors", self.dtype)
        if additions and trainer.is_global_zero:
            save_weights(additions, self.folder / "lora.safetensors", self.dtype)

    def on_validation_end(self, trainer: L.Trainer, module: Trainable) -> None:
        if trainer.sanity_checking:
            return
        self.export(trainer, module)
        if self.keep_every and trainer.global_step % self.keep_every == 0:
            self.keep(trainer, f"{trainer.global_step:07d}")
        if self.best is None:
            return
        if self.best not in trainer.callback_metrics:
            known = ", ".join(sorted(name for name in trainer.callback_metrics if name.startswith("val/")))
            raise UserError(f"ExportWeights: best is '{self.best}', which no validation logs; there are {known}")
        score = float(trainer.callback_metrics[self.best])
        if self.best_score is None or self.sign * score > self.sign * self.best_score:
            self.best_score = score
            self.keep(trainer, "best")

    def keep(self, trainer: L.Trainer, name: str) -> None:
        """Copies what has just been written into a folder of its own."""
        if not trainer.is_global_zero:
            return
        with replacing(self.folder / name) as part:
            part.mkdir()
            for file in self.folder.glob("*.safetensors"):
                shutil.copy2(file, part)
            shutil.rmtree(self.folder / name, ignore_errors=True)

    def state_dict(self) -> dict[str, Any]:
        return {"best_score": self.best_score}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best_score = state["best_score"]

    def on_train_end(self, trainer: L.Trainer, module: Trainable) -> None:
        self.export(trainer, module)
