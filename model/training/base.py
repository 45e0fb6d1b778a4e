"""What every training module shares: which networks are trained, their optimizer, randomness and checkpoint."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytorch_lightning as L
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from diffbir.model.networks.autoencoder import DiagonalGaussian
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.draws import ANEW, Anew, OfImages
from diffbir.model.training.sharding import shard
from diffbir.utils.cli import UserError
from diffbir.utils.metrics import LPIPS, psnr, ssim


class Trainable(L.LightningModule):
    """Base of the training modules; a subclass is only encode, loss, log.

    Args:
        trained: networks to optimize, by the name that their exported weights get.
        frozen: networks that are only used.
        optimizer: groups of parameters -> optimizer.
        lr_schedule: optimizer -> schedule, stepped once per optimizer step; None keeps the rate constant.
        seed: what the noise of every step follows from.
    """

    def __init__(
        self,
        trained: Mapping[str, nn.Module],
        frozen: Mapping[str, nn.Module],
        optimizer: Callable[[list[dict[str, Any]]], Optimizer],
        lr_schedule: Callable[[Optimizer], LRScheduler] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        self.trained, self.frozen = nn.ModuleDict(trained), nn.ModuleDict(frozen)
        self.frozen.requires_grad_(False)
        self.lpips = LPIPS()
        self.optimizer, self.lr_schedule, self.seed = optimizer, lr_schedule, seed
        self.strict_loading = False  # checkpoints leave out what is frozen
        self.since_log: dict[str, list[Tensor]] = {}  # name -> values of the micro-batches since the last log

    def configure_model(self) -> None:
        if self.device_mesh is not None:  # the strategy is `model.training.sharding.FSDP`
            for network in self.trained.values():
                shard(network, self.device_mesh["data_parallel"], self.trainer.strategy.gather)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Groups of parameters for the optimizer; the first is what is averaged and exported."""
        return [{"params": [p for p in self.trained.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer(self.parameter_groups())
        if self.lr_schedule is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.lr_schedule(optimizer), "interval": "step"},
        }

    def train(self, mode: bool = True) -> "Trainable":
        super().train(mode)
        self.frozen.eval()
        return self

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Only what is trained: a stage-2 checkpoint doesn't carry the frozen gigabytes."""
        trained = {name for name, p in self.named_parameters() if p.requires_grad}
        return {k: v for k, v in super().state_dict(*args, **kwargs).items() if k in trained}

    def on_train_start(self) -> None:
        for entry in self.trainer.lr_scheduler_configs:
            planned = getattr(entry.scheduler, "total_steps", None)
            if planned is not None and planned < self.trainer.max_steps:
                raise UserError(
                    f"the checkpoint's learning-rate schedule ends at step {planned}, before trainer.params.max_steps "
                    f"({self.trainer.max_steps}); start a new run from its weights (weights.NETWORK=FILE)"
                )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # Noise follows from the step, not from what happened before: a resumed run draws what it would have drawn.
        accumulated = self.trainer.accumulate_grad_batches
        number = self.trainer.global_step * accumulated + batch_idx % accumulated
        sequence = np.random.SeedSequence((self.seed, number, self.global_rank))
        torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))

    def log(self, name: str, value: Any, **kwargs: Any) -> None:
        """Lightning's, but loggers get `train/...` as the mean over micro-batches and ranks since the last log."""
        if name.startswith("train/"):
            self.since_log.setdefault(name, []).append(torch.as_tensor(value, device=self.device).detach().float())
            kwargs["logger"] = False
        super().log(name, value, **kwargs)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer = self.trainer
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if not stepped or trainer.global_step % trainer.log_every_n_steps or not self.since_log:
            return
        means = torch.stack([torch.stack(values).mean() for values in self.since_log.values()])
        means = dict(zip(self.since_log, trainer.strategy.reduce(means, reduce_op="mean").tolist(), strict=True))
        self.since_log.clear()
        for logger in trainer.loggers:
            logger.log_metrics(means, step=trainer.global_step - 1)  # Lightning's number of this step

    def log_means(self, batch: dict[str, Any], prog_bar: bool = True, **values: Tensor) -> None:
        """Logs validation figures, (B,) each, as `val/NAME`: means over the images of the whole set, on all ranks."""
        counts = batch["counts"]
        images = int(counts.sum())
        # Lightning averages batch sizes over ranks too and drops what is behind the point: it must be a whole number.
        weight = {"batch_size": images * self.trainer.world_size, "sync_dist": True}
        for name, value in values.items():
            mean = value.float()[counts].mean() if images else torch.zeros((), device=self.device)
            self.log(f"val/{name}", mean, prog_bar=prog_bar, **weight)

    def log_scores(self, batch: dict[str, Any], x: Tensor) -> None:
        """Logs validation PSNR, SSIM and LPIPS of x, (B, 3, H, W) in [0, 1], against the batch's `hq`.

        They are those of scripts/evaluate.py by protocol `rgb`, which sees pictures of 8 bits as they lie on disk.
        """
        x, y = (v.float().clamp(0, 1).mul(255).round() / 255 for v in (x, batch["hq"]))
        self.log_means(batch, psnr=psnr(x, y), ssim=ssim(x, y), lpips=self.lpips(x, y))

    def images(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        """Pictures of one validation batch for the logs: title -> (B, 3, H, W) in [0, 1]."""
        raise NotImplementedError


class DenoiserTraining(Trainable):
    """Base of what trains a denoiser: a subclass has `diffusion` and `losses`."""

    diffusion: Diffusion

    def losses(self, batch: dict, draws: Anew = ANEW) -> tuple[Tensor, Tensor]:
        """Per image, and their timesteps: (B,), (B,)."""
        raise NotImplementedError

    @torch.no_grad()
    def clean_latent(self, batch: dict, draws: Anew) -> Tensor:
        """z_0, drawn from the posterior, which the batch has or the autoencoder gives."""
        autoencoder = self.frozen["autoencoder"]
        if "posterior" in batch:
            q = DiagonalGaussian(*batch["posterior"].float().chunk(2, dim=1))
        else:
            q = autoencoder.posterior(batch["hq"])
        return (q.sample(draws.normal) * autoencoder.scale_factor).float()

    def training_step(self, batch: dict, _: int) -> dict[str, Tensor]:
        losses, t = self.losses(batch)
        loss = losses.mean()
        self.log("train/loss", loss, prog_bar=True)
        return {"loss": loss, "losses": losses.detach(), "t": t}

    def fixed_losses(self, batch: dict) -> Tensor:
        """The losses of a validation batch, (B,), at timesteps and noise that belong to its images.

        Drawn anew every time, they would scatter the loss by more than a good training gains between two validations.
        """
        return self.losses(batch, OfImages(batch["number"]))[0]
