"""Training of stage 2, generation: the branch that steers a frozen latent diffusion model."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.condition import Condition
from diffbir.model.options import Options
from diffbir.model.restorer import Restorer, Result
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.draws import ANEW, Anew
from diffbir.model.training.base import DenoiserTraining
from diffbir.utils.precision import keeping_precision


class Stage2(DenoiserTraining):
    """The diffusion loss on latents of clean images, conditioned on E(I_reg) (DiffBIR, equation 4).

    Autoencoder, text encoder, stage 1 and UNet stay frozen. Batches
    hold images, or latents that were computed before (`dataset.latents`).

    Args:
        branch: trained, `LatentBranch` or `ImageControlNet`.
        unet: frozen, unless `train_unet`.
        autoencoder: frozen.
        text_encoder: frozen.
        diffusion: schedule and target.
        stage1: frozen; None conditions on the degraded image itself (ablation).
        train_unet: trains the UNet along with the branch, for priors too weak to be steered from outside; 'decoder'
            trains only its up path and output (ablation; ControlNet calls it unlocked).
        noise_aug: conditions are noised to a timestep drawn from 0 .. noise_aug - 1 (v2.1); 0 leaves them clean.
        solver, steps: how the logged samples are made.
    """

    def __init__(
        self,
        branch: nn.Module,
        unet: nn.Module,
        autoencoder: AutoencoderKL,
        text_encoder: nn.Module,
        diffusion: Diffusion,
        stage1: nn.Module | None = None,
        train_unet: bool | str = False,
        noise_aug: int = 0,
        solver: str = "ddim",
        steps: int = 10,
        **kwargs,
    ):
        if train_unet not in (True, False, "decoder"):
            raise ValueError(f"train_unet must be true, false or decoder, not '{train_unet}'")
        trained, frozen = {"branch": branch}, {"autoencoder": autoencoder, "text_encoder": text_encoder}
        (trained if train_unet else frozen)["unet"] = unet
        frozen["stage1"] = nn.Identity() if stage1 is None else stage1
        super().__init__(trained, frozen, **kwargs)
        if train_unet == "decoder":
            unet.requires_grad_(False)
            for part in (unet.output_blocks, unet.out):
                part.requires_grad_(True)
        self.diffusion, self.solver, self.steps, self.noise_aug = diffusion, solver, steps, noise_aug

    @property
    def restorer(self) -> Restorer:
        networks = {**self.frozen, **self.trained}
        options = Options(solver=self.solver, steps=self.steps)
        return Restorer(**networks, diffusion=self.diffusion, defaults=options, device=self.device)

    @torch.no_grad()
    def condition(self, batch: dict) -> Condition:
        """Stage 1 and its latent; everything here is frozen."""
        text = self.frozen["text_encoder"](batch["prompt"])
        if "latent" in batch:
            return Condition(batch["latent"].float(), text)
        i_reg = self.frozen["stage1"](batch["lq"]).float().clamp(0, 1)
        return Condition(self.frozen["autoencoder"].encode(i_reg).float(), text, i_reg)

    def losses(self, batch: dict, draws: Anew = ANEW) -> tuple[Tensor, Tensor]:
        condition, z_0 = self.condition(batch), self.clean_latent(batch, draws)
        if self.noise_aug:
            t_aug = draws.below(self.noise_aug, z_0)
            noised = self.diffusion.diffuse(condition.latent, t_aug, draws.normal(z_0))
            condition = replace(condition, latent=noised)
        network = self.restorer.network
        return self.diffusion.training_loss(lambda z_t, t: network(z_t, t, condition), z_0, draws)

    def validation_step(self, batch: dict, _: int) -> None:
        self.log_means(batch, loss=self.fixed_losses(batch))
        self.log_scores(batch, self.restore(batch).image.to(self.device))

    def restore(self, batch: dict) -> Result:
        """Samples the way inference does, with noise that belongs to each image; an overflow changes no weights of the
        training."""
        with keeping_precision(*self.frozen.values(), *self.trained.values()):
            return self.restorer.restore(batch["lq"], seeds=batch["number"].tolist())

    def images(self, batch: dict) -> dict[str, Tensor]:
        result = self.restore(batch)
        return {"lq": batch["lq"], "stage 1": result.stage1, "sample": result.image, "hq": batch["hq"]}
