"""Training of an unconditional latent UNet: the prior where there is no Stable Diffusion to start from."""

import torch
from torch import Tensor, nn

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.condition import Condition
from diffbir.model.sampling.denoiser import ControlledUNet, bind, denoiser
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.draws import ANEW, Anew
from diffbir.model.sampling.solvers import sample
from diffbir.model.training.base import DenoiserTraining


class PriorTraining(DenoiserTraining):
    """The diffusion loss on latents of clean images, text empty.

    Args:
        unet: trained.
        autoencoder: frozen.
        text_encoder: frozen.
        diffusion: schedule and target.
        steps: DDIM steps of the logged samples.
    """

    def __init__(
        self,
        unet: nn.Module,
        autoencoder: AutoencoderKL,
        text_encoder: nn.Module,
        diffusion: Diffusion,
        steps: int = 20,
        **kwargs,
    ):
        super().__init__({"unet": unet}, {"autoencoder": autoencoder, "text_encoder": text_encoder}, **kwargs)
        self.diffusion, self.steps = diffusion, steps

    def losses(self, batch: dict, draws: Anew = ANEW) -> tuple[Tensor, Tensor]:
        with torch.no_grad():
            z_0 = self.clean_latent(batch, draws)
            text = self.frozen["text_encoder"](batch["prompt"])
        return self.diffusion.training_loss(lambda z_t, t: self.trained["unet"](z_t, t, text), z_0, draws)

    def validation_step(self, batch: dict, _: int) -> None:
        self.log_means(batch, loss=self.fixed_losses(batch))

    def images(self, batch: dict) -> dict[str, Tensor]:
        autoencoder = self.frozen["autoencoder"]
        z_T = torch.randn_like(autoencoder.encode(batch["hq"]).float())
        condition = Condition(text=self.frozen["text_encoder"](batch["prompt"]))
        denoise = bind(denoiser(ControlledUNet(self.trained["unet"]), self.diffusion), condition)
        z = sample("ddim", denoise, z_T, self.diffusion.alpha_bar, self.steps, lambda: torch.randn_like(z_T))
        return {"sample": autoencoder.decode(z), "hq": batch["hq"]}
