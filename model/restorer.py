"""The whole pipeline as one object: degraded images in, restored images out.

The command line, the pictures in the training logs and the benchmarks all call it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn

from model.autoencoder import AutoencoderKL
from model.condition import Condition
from model.denoiser import ControlledUNet, bind, denoiser, tiled, with_cfg, with_guidance
from model.diffusion import Diffusion
from model.guidance import LatentL2Guidance
from model.layers import pad_to_multiple
from model.networks import build_networks
from model.solvers import SOLVERS, sample
from utils.cli import UserError
from utils.color import ALIGNMENTS
from utils.config import check_keys, instantiate


def option(
    default: Any, help: str, choices: Sequence | None = None, low: float | None = None, high: float | None = None
):
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Options:
    """How to restore. A preset changes the defaults; each field is also a flag of `inference.py`.

    Raises:
        UserError: a value out of range, naming the option.
    """

    upscale: float = option(1.0, "output size over input size", low=0.1, high=16)
    stage: str = option(
        "both", "'1' only removes the degradation, '2' only generates (on the input itself)", ("both", "1", "2")
    )
    solver: str = option("ddpm", "sampler", tuple(SOLVERS))
    steps: int = option(50, "sampling steps: more is slower and sharper", low=1, high=1000)
    guidance_scale: float = option(
        0.0, "latent guidance: 0 is most realistic, larger is closer to stage 1 (try 3000 to 100000)", low=0
    )
    strength: float = option(1.0, "scale of what the branch adds to the UNet", low=0, high=2)
    cfg_scale: float = option(1.0, "classifier-free guidance by the prompts; 1 is off", low=1)
    prompt: str = option("", "what the image shows (models with text only)")
    negative_prompt: str = option("", "what to keep away from (with --cfg-scale above 1)")
    color: str = option("wavelet", "colour alignment to stage 1", tuple(ALIGNMENTS))
    tile: int = option(512, "side of the windows that larger images are sampled in, pixels; 0 is never", low=0)
    seed: int = option(0, "noise of every image follows from it, whatever the order", low=0)

    def __post_init__(self):
        for name, spec in self.__dataclass_fields__.items():
            value, meta = getattr(self, name), spec.metadata
            if meta["choices"] and value not in meta["choices"]:
                raise UserError(f"{name} must be one of {', '.join(meta['choices'])}, not '{value}'")
            if meta["low"] is not None and value < meta["low"]:
                raise UserError(f"{name} must be at least {meta['low']}, not {value}")
            if meta["high"] is not None and value > meta["high"]:
                raise UserError(f"{name} must be at most {meta['high']}, not {value}")


@dataclass(frozen=True)
class Result:
    """What comes out; all (B, 3, H, W) float32 RGB in [0, 1] of the same size.

    Args:
        image: the restored images.
        stage1: I_reg, what stage 1 made of them (the input itself with stage '2').
        input: the degraded images, brought to the output size.
    """

    image: Tensor
    stage1: Tensor
    input: Tensor


class Restorer:
    """Stage 1, encode, sample, decode, align colours.

    Args:
        autoencoder, unet, diffusion, text_encoder: the latent diffusion model.
        stage1: degradation removal, (B, 3, H, W) -> (B, 3, H, W); None passes the input on.
        branch: what steers the UNet; None is the bare prior.
        defaults: options where a call gives none.
    """

    def __init__(
        self,
        autoencoder: AutoencoderKL,
        unet: nn.Module,
        diffusion: Diffusion,
        text_encoder: nn.Module,
        stage1: nn.Module | None = None,
        branch: nn.Module | None = None,
        defaults: Options | None = None,
    ):
        self.autoencoder, self.diffusion, self.text_encoder = autoencoder, diffusion, text_encoder
        self.stage1 = nn.Identity() if stage1 is None else stage1
        self.network = ControlledUNet(unet, branch)
        self.defaults = defaults or Options()
        self.multiple = autoencoder.factor * unet.factor

    @classmethod
    def from_config(cls, config: DictConfig, device: str | torch.device = "cpu") -> "Restorer":
        """Builds from a preset (configs/inference/): `networks`, `weights`, `diffusion` and, optional, `sampling`.

        Raises:
            UserError: a wrong key or value, or weights that are missing or do not fit.
        """
        check_keys(config, ("networks", "weights", "diffusion"), ("sampling",))
        sampling = dict(config.get("sampling") or {})
        for name in sampling:
            if name not in Options.__dataclass_fields__:
                raise UserError(f"unknown key 'sampling.{name}'; known: {', '.join(Options.__dataclass_fields__)}")
        networks = {name: net.requires_grad_(False).eval().to(device) for name, net in build_networks(config).items()}
        return cls(**networks, diffusion=instantiate(config.diffusion, "diffusion"), defaults=Options(**sampling))

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def __call__(
        self,
        images: Tensor,
        options: Options | None = None,
        seeds: Sequence[int] | None = None,
        on_step: Callable[[int, Tensor], None] = lambda i, z_0: None,
    ) -> Result:
        """Restores a batch of equally large images; what an image becomes doesn't depend on the others.

        Args:
            images: (B, 3, H, W) float32 RGB in [0, 1], any size.
            seeds: one for each image; `options.seed` for all if None.
            on_step: called after every sampling step with its index and its estimate of the clean latent.
        """
        options = options or self.defaults
        seeds = [options.seed] * len(images) if seeds is None else seeds
        lq = images.to(self.device)
        if options.upscale != 1:
            height, width = (max(1, round(n * options.upscale)) for n in lq.shape[-2:])
            lq = F.interpolate(lq, (height, width), mode="bicubic", antialias=options.upscale < 1).clamp(0, 1)
        height, width = lq.shape[-2:]

        padded = pad_to_multiple(lq, self.multiple)
        i_reg = padded if options.stage == "2" else self.stage1(padded).float().clamp(0, 1)
        restored = i_reg if options.stage == "1" else self.generate(i_reg, options, seeds, on_step)
        return Result(*(x[..., :height, :width].cpu() for x in (restored, i_reg, padded)))

    def generate(
        self, i_reg: Tensor, options: Options, seeds: Sequence[int], on_step: Callable[[int, Tensor], None]
    ) -> Tensor:
        """Stage 2: I_reg (B, 3, H, W), sides multiples of `multiple` -> restored image of the same size, in [0, 1]."""
        latent = self.autoencoder.encode(i_reg).float()
        condition = Condition(latent, self.text_encoder([options.prompt] * len(i_reg)), i_reg)
        negative = self.text_encoder([options.negative_prompt] * len(i_reg)) if options.cfg_scale > 1 else None

        denoise = denoiser(self.network, self.diffusion, options.strength)
        denoise = with_cfg(denoise, negative, options.cfg_scale)
        if options.tile:
            tile = max(1, options.tile // self.multiple) * self.network.unet.factor
            denoise = tiled(denoise, tile, overlap=tile // 4)
        denoise = bind(denoise, condition)
        if options.guidance_scale > 0:
            elements = latent.shape[1] * (512 // self.autoencoder.factor) ** 2
            denoise = with_guidance(denoise, LatentL2Guidance(latent, options.guidance_scale, elements))

        # One generator an image, on the CPU: the same noise whatever the batch, the order or the device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise() -> Tensor:
            return torch.stack([torch.randn(latent.shape[1:], generator=g) for g in generators]).to(latent)

        z_0 = sample(options.solver, denoise, noise(), self.diffusion.alpha_bar, options.steps, noise, on_step)
        image = self.autoencoder.decode(z_0).float()
        return ALIGNMENTS[options.color](image, i_reg).clamp(0, 1)

    def options(self, **changes: Any) -> Options:
        """The defaults with some values changed."""
        return replace(self.defaults, **changes)
