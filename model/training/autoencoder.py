"""Training of the autoencoder (only needed where no published one is used)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.training.base import Trainable


class AutoencoderTraining(Trainable):
    """L1 at full and at 1/8 size + perceptual_weight x LPIPS + kl_weight x KL per latent element.

    The coarse L1 is about colour: next to fine structure, chroma weighs little in L1 and LPIPS and is learned late.

    With `decoder_only` the encoder stays as it is, so whatever was trained on its latents remains valid.

    Logs `val/latent_scale`, 1 / std of the unscaled latents: the `scale_factor` to write into the model's YAML.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        perceptual_weight: float = 0.25,
        kl_weight: float = 1e-4,
        decoder_only: bool = False,
        **kwargs,
    ):
        super().__init__({"autoencoder": autoencoder}, {}, **kwargs)
        if decoder_only:
            autoencoder.encoder.requires_grad_(False)
            autoencoder.quant_conv.requires_grad_(False)
        self.perceptual_weight, self.kl_weight = perceptual_weight, kl_weight

    def training_step(self, batch: dict, _: int) -> Tensor:
        hq = batch["hq"]
        q = self.trained["autoencoder"].posterior(hq)
        output = self.trained["autoencoder"].reconstruct(q.sample())
        l1 = F.l1_loss(output, hq) + F.l1_loss(F.avg_pool2d(output, 8), F.avg_pool2d(hq, 8))
        lpips = self.lpips(output, hq).mean()
        kl = q.kl().mean() / q.mean[0].numel()
        loss = l1 + self.perceptual_weight * lpips + self.kl_weight * kl
        self.log_dict({"train/l1": l1, "train/lpips": lpips, "train/kl": kl})
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, _: int) -> None:
        q = self.trained["autoencoder"].posterior(batch["hq"])
        self.log_scores(batch, self.trained["autoencoder"].reconstruct(q.mean))
        z = q.mean.float().flatten(1)[batch["counts"]]
        self.moments += torch.stack([z.sum(), z.square().sum(), z.new_tensor(z.numel())]).double()

    def on_validation_epoch_start(self) -> None:
        self.moments = torch.zeros(3, dtype=torch.float64, device=self.device)  # sum, sum of squares, count

    def on_validation_epoch_end(self) -> None:
        z, square, count = self.trainer.strategy.reduce(self.moments, reduce_op="sum")
        scale = (square / count - (z / count).square()).rsqrt()
        self.log("val/latent_scale", scale, prog_bar=True, sync_dist=True)

    def images(self, batch: dict) -> dict[str, Tensor]:
        q = self.trained["autoencoder"].posterior(batch["hq"])
        return {"hq": batch["hq"], "reconstruction": self.trained["autoencoder"].reconstruct(q.mean)}
