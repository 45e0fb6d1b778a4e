"""Training of stage 2 for one step: from E(I_reg) to the restored latent in a single pass, against a discriminator."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.condition import Condition
from diffbir.model.networks.discriminator import ADVERSARIAL, FeatureHeads, accuracy
from diffbir.model.networks.lora import add_lora, begin_lora
from diffbir.model.options import Options
from diffbir.model.restorer import OneStep, Restorer, Result
from diffbir.model.sampling.denoiser import ControlledUNet
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.guidance import region_weight
from diffbir.model.training.base import Trainable
from diffbir.model.training.stage1 import LOSSES, mae
from diffbir.model.weights.lora_file import read_lora
from diffbir.utils.cli import UserError
from diffbir.utils.metrics import DISTS, LPIPS, VGG16
from diffbir.utils.precision import keeping_precision

STRIDE = 4  # of AlexNet's first convolution


def plain(photo: Tensor) -> Tensor:
    """Where a photo (B, 3, H, W) is plain: 1 in skies and walls, near 0 on any texture; (B, 1, H, W)."""
    with torch.autocast(photo.device.type, enabled=False):  # half precision can't tell grain from its own rounding
        return region_weight(photo.float()) ** 4


def off_grid(*images: Tensor) -> tuple[Tensor, ...]:
    """Images (B, C, H, W) without their first few rows and columns, as many at random as LPIPS has blind spots.

    AlexNet looks at every fourth place. Where the decoder has the same period, it can leave dots where LPIPS never
    looks; from a changing origin there is no such place.
    """
    spare = min(STRIDE, min(images[0].shape[-2:]) - LPIPS.min_side + 1)
    top, left = torch.randint(spare, (2,)).tolist()
    return tuple(image[..., top:, left:] for image in images)


def read_additions(path: str, networks: Mapping[str, nn.Module]) -> dict[str, dict[str, Tensor]]:
    """Network -> what a file adds to it by low rank, and nothing else."""
    additions, replaced = read_lora(path, networks)
    if replaced:
        raise UserError(
            f"module.params.start: {path} also replaces whole weights of {', '.join(replaced)}; merge it first"
        )
    return additions


class OneStepTraining(Trainable):
    """Reconstruction + LPIPS + adversarial loss on pictures that one pass restores.

    E(I_reg) enters at one timestep t, without noise; UNet and branch, which come from diffusion training, give z_0;
    the decoder makes the picture. With `residual` (small models) the picture is I_reg + D(z_0) - D(E(I_reg)): nothing
    that stage 1 knows is lost, and only what to add is learnt. Subtracting what the same decoder makes of E(I_reg), and
    not what it made of it before the training, keeps the guidance exact: at z = E(I_reg) the picture is I_reg.

    Generator and discriminator are two parameter groups of one optimizer, each with its own rates and moments: both
    follow the gradients of the same step, so accumulation, mixed precision, averages and exact resume work as in every
    other training.

    Args:
        branch, unet: trained, whole or by additions of low rank.
        autoencoder: frozen, but for its decoder with `train_decoder`.
        text_encoder: frozen.
        diffusion: schedule and target that UNet and branch were trained with.
        discriminator: picture -> logits, or None for the heads alone.
        stage1: frozen; None takes the degraded image itself.
        t: timestep of the pass, 0 .. T - 1.
        residual: see above.
        train_decoder: whether the decoder learns too.
        lora: trained network -> rank of its additions, e.g. {unet: 256}; one that isn't named is trained whole.
        start: a file of additions, such as an earlier training's lora.safetensors, that those of `lora` begin with; of
            one of a higher rank they take the best approximation.
        reconstruction: 'l1', 'l2' or 'psnr', a loss of stage 1. The last prices fidelity as it is reported.
        reconstruction_weight, lpips_weight, dists_weight: of the distances (the last two are metrics, too: say so
            beside figures).
        plain_weight: of the mean absolute difference from I_reg where the photo is `plain`. Nothing is missing there,
            and what perceptual losses would add to it is seen as scratches.
        dists_images: how many pictures of a batch DISTS looks at, which can take as long as all the rest; None is all.
        teacher_weight: of L1 + LPIPS to what a teacher made of the same input, where the data has it: a target without
            chance, which a small model follows more easily than it invents. It falls to 0 until step `teacher_steps`.
        adversarial: 'softplus' or 'hinge'.
        adversarial_weight: of the generator's adversarial loss, which sets in at step `warm_up` and is in full force
            `ramp` steps later.
        feature_heads: adds heads on the features of VGG16 to the discriminator.
        discriminator_optimizer: what its parameter group has otherwise, e.g. {lr: 1e-4}.
        clip: largest norm of the gradient, of generator and discriminator each; 0 is any.
    """

    def __init__(
        self,
        branch: nn.Module,
        unet: nn.Module,
        autoencoder: AutoencoderKL,
        text_encoder: nn.Module,
        diffusion: Diffusion,
        discriminator: nn.Module | None = None,
        stage1: nn.Module | None = None,
        t: int = 200,
        residual: bool = False,
        train_decoder: bool = False,
        lora: Mapping[str, int] | None = None,
        start: str | None = None,
        reconstruction: str = "l1",
        reconstruction_weight: float = 1.0,
        plain_weight: float = 0.0,
        lpips_weight: float = 1.0,
        dists_weight: float = 0.0,
        dists_images: int | None = None,
        teacher_weight: float = 0.0,
        teacher_steps: int = 0,
        adversarial: str = "softplus",
        adversarial_weight: float = 0.1,
        warm_up: int = 0,
        ramp: int = 0,
        feature_heads: bool = False,
        discriminator_optimizer: Mapping[str, Any] | None = None,
        clip: float = 1.0,
        **kwargs,
    ):
        if reconstruction not in LOSSES:
            raise ValueError(f"reconstruction must be one of {', '.join(LOSSES)}, not '{reconstruction}'")
        if adversarial not in ADVERSARIAL:
            raise ValueError(f"adversarial must be one of {', '.join(ADVERSARIAL)}, not '{adversarial}'")
        trained, frozen = {"branch": branch, "unet": unet}, {"text_encoder": text_encoder}
        (trained if train_decoder else frozen)["autoencoder"] = autoencoder
        frozen["stage1"] = nn.Identity() if stage1 is None else stage1
        super().__init__(trained, frozen, **kwargs)
        if train_decoder:
            autoencoder.encoder.requires_grad_(False)
            autoencoder.quant_conv.requires_grad_(False)
        additions = {} if start is None else read_additions(start, trained)  # by the names before they are adapted
        for name, rank in (lora or {}).items():
            if name not in trained:
                raise ValueError(f"lora knows {', '.join(trained)}, which are trained, not '{name}'")
            parts = [autoencoder.decoder, autoencoder.post_quant_conv] if name == "autoencoder" else [trained[name]]
            for part in parts:
                add_lora(part, rank)
        for name, own in additions.items():
            try:
                begin_lora(trained[name], own)
            except ValueError as error:
                raise UserError(f"module.params.start: {start}, {name}: {error}; see module.params.lora") from error
        self.discriminator = nn.ModuleDict({} if discriminator is None else {"picture": discriminator})
        self.vgg16 = None
        if feature_heads:
            self.vgg16 = VGG16()
            self.discriminator["features"] = FeatureHeads(VGG16.widths)
        self.dists = DISTS() if dists_weight else None
        self.diffusion, self.t, self.residual, self.clip = diffusion, t, residual, clip
        self.reconstruction = LOSSES[reconstruction]
        self.reconstruction_weight, self.plain_weight = reconstruction_weight, plain_weight
        self.lpips_weight = lpips_weight
        self.dists_weight, self.dists_images = dists_weight, dists_images
        self.teacher_weight, self.teacher_steps = teacher_weight, teacher_steps
        self.discriminator_loss, self.generator_loss = ADVERSARIAL[adversarial]
        self.adversarial_weight, self.warm_up, self.ramp = adversarial_weight, warm_up, ramp
        self.discriminator_optimizer = dict(discriminator_optimizer or {})

    def configure_model(self) -> None:
        if self.device_mesh is not None:
            raise UserError(
                "one-step training does not run under model.training.sharding.FSDP, which would have to shard the "
                "discriminator too; use trainer.params.strategy=ddp, with networks.unet.params.checkpointing=true and "
                "module.params.lora to save memory"
            )

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = super().parameter_groups()
        if self.discriminator:
            groups.append({"params": list(self.discriminator.parameters()), **self.discriminator_optimizer})
        return groups

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        if self.clip:
            for group in optimizer.param_groups:
                nn.utils.clip_grad_norm_(group["params"], self.clip)

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """With the vectors of the spectral norms, which are no parameters."""
        own = {f"discriminator.{k}": v for k, v in self.discriminator.state_dict().items()}
        return {**super().state_dict(*args, **kwargs), **own}

    @property
    def restorer(self) -> Restorer:
        networks = {**self.frozen, **self.trained}
        one_step = OneStep(ControlledUNet(networks.pop("unet"), networks.pop("branch")), {})
        options = Options(
            solver="one_step", start_t=self.t, steps=1, residual=float(self.residual), color="none", tile=0
        )
        return Restorer(**networks, diffusion=self.diffusion, one_step=one_step, defaults=options, device=self.device)

    def generate(self, batch: dict) -> tuple[Tensor, Tensor]:
        """Restored pictures, not clamped, and I_reg, (B, 3, H, W) each."""
        networks = {**self.frozen, **self.trained}
        autoencoder = networks["autoencoder"]
        with torch.no_grad():
            i_reg = networks["stage1"](batch["lq"]).float().clamp(0, 1)
            latent = autoencoder.encode(i_reg).float()
            text = networks["text_encoder"](batch["prompt"])
        t = torch.full((len(latent),), self.t, device=latent.device)
        network = ControlledUNet(networks["unet"], networks["branch"])
        z_0 = self.diffusion.to_z_0(latent, t, network(latent, t, Condition(latent, text, i_reg)).float())
        if not self.residual:
            return autoencoder.decode(z_0).float(), i_reg
        with torch.set_grad_enabled("autoencoder" in self.trained):
            reconstructed = autoencoder.decode(latent).float()
        return i_reg + autoencoder.decode(z_0).float() - reconstructed, i_reg

    def logits(self, x: Tensor) -> list[Tensor]:
        """Of every part of the discriminator; each counts as much as the others."""
        parts = []
        if "picture" in self.discriminator:
            parts.append(self.discriminator["picture"](x))
        if self.vgg16 is not None:
            parts += self.discriminator["features"](self.vgg16(x.clamp(0, 1)))
        return [part.float() for part in parts]

    def ramp_up(self) -> float:
        """Share of the adversarial weight that is in force."""
        return min(1.0, max(0.0, (self.trainer.global_step - self.warm_up) / max(self.ramp, 1)))

    def adversary(self, fake: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Losses of the generator and of the discriminator.

        Both see what a file would hold: a photo has no value outside [0, 1], and a discriminator that saw one there
        would reward pale pictures, which never leave the range.
        """
        fake = fake.clamp(0, 1)
        self.discriminator.requires_grad_(False)
        generator = torch.stack([self.generator_loss(f) for f in self.logits(fake)]).mean()
        self.discriminator.requires_grad_(True)
        pairs = list(zip(self.logits(real), self.logits(fake.detach()), strict=True))
        discriminator = torch.stack([self.discriminator_loss(*pair) for pair in pairs]).mean()
        right = torch.stack([accuracy(*pair) for pair in pairs]).mean()
        self.log_dict(
            {"train/adversarial": generator, "train/discriminator": discriminator, "train/accuracy": right.detach()}
        )
        return generator, discriminator

    def training_step(self, batch: dict, _: int) -> Tensor:
        (fake, i_reg), real = self.generate(batch), batch["hq"]
        reconstruction, lpips = self.reconstruction(fake, real).mean(), self.lpips(*off_grid(fake, real)).mean()
        self.log_dict({"train/reconstruction": reconstruction, "train/lpips": lpips})
        loss = self.reconstruction_weight * reconstruction + self.lpips_weight * lpips
        if self.plain_weight:
            added = (plain(real) * (fake - i_reg).abs()).mean()
            self.log("train/plain", added)
            loss = loss + self.plain_weight * added
        if self.dists is not None:
            dists = self.dists(fake[: self.dists_images], real[: self.dists_images]).mean()
            self.log("train/dists", dists)
            loss = loss + self.dists_weight * dists
        if self.teacher_weight:
            if (teacher := batch.get("teacher")) is None:
                raise UserError(
                    "module.params.teacher_weight: the data has no pictures of a teacher; give the `teacher` folder of "
                    "dataset.sources.pairs.PairFolders, or set the weight to 0"
                )
            distance = mae(fake, teacher).mean() + self.lpips(*off_grid(fake, teacher)).mean()
            self.log("train/teacher", distance)
            fading = max(0.0, 1 - self.trainer.global_step / max(self.teacher_steps, 1))
            loss = loss + fading * self.teacher_weight * distance
        if self.discriminator:
            generator, discriminator = self.adversary(fake, real)
            loss = loss + self.ramp_up() * self.adversarial_weight * generator
            self.log("train/loss", loss, prog_bar=True)
            return loss + discriminator
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, _: int) -> None:
        self.log_scores(batch, self.restore(batch).image.to(self.device))

    def restore(self, batch: dict) -> Result:
        """The way inference does; an overflow changes no weights of the training."""
        with keeping_precision(*self.frozen.values(), *self.trained.values()):
            return self.restorer.restore(batch["lq"])

    def images(self, batch: dict) -> dict[str, Tensor]:
        result = self.restore(batch)
        return {"lq": batch["lq"], "stage 1": result.stage1, "one step": result.image, "hq": batch["hq"]}
