"""The smallest training, by Lightning's own loop: one weight w, the loss w x, plain gradient descent at rate 1."""

import pytorch_lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from diffbir.model.training.base import Trainable


class Line(Trainable):
    """Begins at w = 0; a step with x subtracts x times the learning rate."""

    def __init__(self, **kwargs):
        line = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(line.weight)
        super().__init__({"line": line}, {}, lambda parameters: torch.optim.SGD(parameters, 1.0), **kwargs)

    @property
    def weight(self) -> float:
        return self.trained["line"].weight.item()

    def training_step(self, batch: dict, _: int) -> Tensor:
        return self.trained["line"](batch["x"]).mean()


def fit(
    module: Trainable, values: list[float], *callbacks: L.Callback, validate_every: int | None = None, **options
) -> L.Trainer:
    """One pass over `values`, a batch each, and `validate_every` so many steps if given."""
    batches = DataLoader([{"x": torch.tensor([x])} for x in values], batch_size=1)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    if validate_every:
        options["val_check_interval"] = validate_every * options.get("accumulate_grad_batches", 1)
    trainer = L.Trainer(
        max_epochs=1,
        callbacks=[*callbacks],
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        **(quiet | {"log_every_n_steps": 1} | options),
    )
    trainer.fit(module, batches, DataLoader([{"x": torch.ones(1)}]) if validate_every else None)
    return trainer
