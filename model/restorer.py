"""The whole pipeline as one object: degraded pictures in, restored pictures out.

The command line, the pictures in the training logs and the benchmarks all call it.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from diffbir.model.build import build_networks, for_inference, with_additions
from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.condition import Condition
from diffbir.model.networks.layers import pad_to_multiple
from diffbir.model.options import Options
from diffbir.model.presets import load_preset
from diffbir.model.sampling.cache import CachedControlledUNet
from diffbir.model.sampling.denoiser import (
    ControlledUNet,
    Denoiser,
    bind,
    denoiser,
    rising,
    tiled,
    with_cfg,
    with_guidance,
)
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.guidance import (
    Gain,
    Guidance,
    LatentL2Guidance,
    RgbL2Guidance,
    constant,
    during,
    mean_shift,
    region_weight,
)
from diffbir.model.sampling.solvers import SOLVERS, sample, timesteps_for
from diffbir.model.sampling.striped import StripedAutoencoder
from diffbir.model.sampling.tiling import map_in_windows, plans
from diffbir.utils.cli import UserError
from diffbir.utils.color import ALIGNMENTS
from diffbir.utils.config import check_keys, hint, instantiate
from diffbir.utils.device import pick_device, pick_precision
from diffbir.utils.memory import FirstThatFits
from diffbir.utils.pictures import Picture, check_images, open_picture
from diffbir.utils.precision import HALF, PRECISIONS, dtype_of

log = logging.getLogger(__name__)

COMPILED = ("stage1", "unet", "branch")  # not the autoencoder, whose strips have many sizes


@dataclass(frozen=True)
class Result:
    """What comes out; all of the same size, and (B, 3, H, W) float32 RGB in [0, 1] unless asked for as pictures.

    Args:
        image: the restored images.
        stage1: I_reg, what stage 1 made of them (the input itself with stage '2').
        input: the degraded images, brought to the output size.
    """

    image: Any
    stage1: Any
    input: Any


@dataclass(frozen=True)
class Progress:
    """Where a call stands.

    Args:
        picture: index of the picture that is being restored, from 0.
        pictures: how many there are; None if that isn't known beforehand.
        step: sampling steps that are done with it; equal to `steps` in the last report on a picture.
        steps: sampling steps in all; 0 with stage '1'.
    """

    picture: int
    pictures: int | None
    step: int
    steps: int


class Cancelled(Exception):
    """The progress callback returned False."""


OnProgress = Callable[[Progress], bool | None]  # False ends the call


@dataclass(frozen=True)
class OneStep:
    """What solver 'one_step' runs, in place of the networks and the options of the chains.

    Args:
        network: UNet and branch, trained by `model.training.one_step`.
        options: name -> value of the options that it was trained for.
        autoencoder: whose decoder was trained along; None is that of the chains.
    """

    network: ControlledUNet
    options: Mapping[str, Any]
    autoencoder: AutoencoderKL | None = None


class Restorer:
    """Stage 1, encode, sample, decode, align colours.

        restorer = Restorer.from_preset("mini")
        restored = restorer("photo.jpg", upscale=2, seed=1)  # a PIL image
        restored = restorer(array)                           # an array in, an array out; likewise for the other kinds

    Networks may be in any precision; what passes between them is float32. A network in half precision whose result
    isn't finite is computed again, and from then on, in float32.

    Args:
        stage1: degradation removal, (B, 3, H, W) -> (B, 3, H, W), or s times as large if it has a `scale` s, in which
            case it sees images before they are enlarged; None passes the input on.
        autoencoder, unet, text_encoder, diffusion: the latent diffusion model; without it only stage 1 can run.
        branch: what steers the UNet; None is the bare prior.
        one_step: for solver 'one_step'; without `unet`, there is no other.
        defaults: options where a call gives none.
        device: where to compute; where the networks are if None.
        offload: keeps every network in main memory except while it computes, for small GPUs.
    """

    def __init__(
        self,
        stage1: nn.Module | None = None,
        autoencoder: AutoencoderKL | None = None,
        unet: nn.Module | None = None,
        text_encoder: nn.Module | None = None,
        branch: nn.Module | None = None,
        diffusion: Diffusion | None = None,
        one_step: OneStep | None = None,
        defaults: Options | None = None,
        device: str | torch.device | None = None,
        offload: bool = False,
    ):
        self.autoencoder, self.diffusion, self.text_encoder = autoencoder, diffusion, text_encoder
        self.stage1 = nn.Identity() if stage1 is None else stage1
        self.network = None if unet is None else ControlledUNet(unet, branch)
        self.one_step = one_step
        self.defaults = defaults or Options()
        self.multiple = max([1, *(autoencoder.factor * network.unet.factor for network in self.diffusion_networks)])
        self._device, self.offload = device, offload

    @classmethod
    def from_preset(
        cls,
        preset: str | Path = "mini",
        device: str | torch.device = "auto",
        precision: str = "auto",
        task: str | None = None,
        stage1: str | Path | None = None,
        stage: str | None = None,
        offload: bool = False,
        overrides: Iterable[str] = (),
        lora: Sequence[str] = (),
        compiled: Mapping[str, Any] | None = None,
    ) -> "Restorer":
        """Builds from a preset's name or YAML.

        Args:
            device: 'auto' is the best that there is here.
            precision: of the networks: fp32, fp16, bf16; 'auto' is fp16 on CUDA and fp32 elsewhere; 'fastest' also is
                bf16 on a CPU, if that is measured to be faster there.
            preset, task, stage1, overrides, lora: see `model.presets.load_preset`.
            stage, offload, compiled: see `from_config`.

        Raises:
            UserError: an unknown name, a wrong key or value, or weights that are missing or do not fit.
        """
        config = load_preset(preset, task, stage1, overrides, lora)
        device = pick_device(device)
        return cls.from_config(config, device, pick_precision(precision, device), stage, offload, compiled)

    @classmethod
    def from_config(
        cls,
        config: DictConfig,
        device: str | torch.device = "cpu",
        precision: str = "fp32",
        stage: str | None = None,
        offload: bool = False,
        compiled: Mapping[str, Any] | None = None,
    ) -> "Restorer":
        """Builds from a preset (see `model.presets.load_preset`).

        Args:
            precision: key of `PRECISIONS`. With fp16 the autoencoder is float32: its activations exceed fp16's range.
            stage: builds only what this stage needs (see `Options.stage`); the preset's own if None.
            offload: see the class.
            compiled: options of `torch.compile`, for stage 1, UNet and branch: the first picture of a size takes
                minutes, those after it less time.

        Raises:
            UserError: a wrong key or value, or weights that are missing or do not fit.
        """
        optional = ("weights", "lora", "sampling", "one_step", "sweep", "run_dir")
        check_keys(config, ("networks",), (*optional, "diffusion"))
        defaults = Options(**sampling_of(config))
        stage = stage or defaults.stage
        if stage != "1":
            check_keys(config, ("networks", "diffusion"), optional)
        only = {"1": ["stage1"], "2": [name for name in config.networks if name != "stage1"]}.get(stage)
        dtypes = dict.fromkeys(config.networks, PRECISIONS[precision])
        if precision == "fp16":
            dtypes["autoencoder"] = torch.float32
        home = "cpu" if offload else device

        def build(config: DictConfig, only: Sequence[str] | None) -> dict[str, nn.Module]:
            return {
                name: network.to(home, usable(network, dtypes[name]))
                for name, network in build_networks(config, only, dtypes).items()
            }

        networks = build(config, only)
        if stage == "1":
            for_inference(networks["stage1"], device, compiled)
            return cls(**networks, defaults=defaults, device=device, offload=offload)
        one_step, own = None, {}
        if node := config.get("one_step"):
            check_keys(node, (), ("weights", "lora", "sampling"))
            weights, lora = node.get("weights"), node.get("lora")
            own = {"unet": networks["unet"], "branch": networks.get("branch")}
            if not weights and not lora:  # then these are the networks of one step, and there are no chains
                networks = {name: network for name, network in networks.items() if name not in own}
            if weights:
                own |= build(
                    OmegaConf.merge(config, {"weights": None, "lora": None}, {"weights": weights}), list(weights)
                )
            if lora:
                own.setdefault("autoencoder", networks["autoencoder"])
                own = with_additions(own, lora, copied=True)
            network = ControlledUNet(own["unet"], own["branch"])
            one_step = OneStep(network, sampling_of(node, "one_step."), own.get("autoencoder"))
        for name, network in (*networks.items(), *own.items()):
            if network is not None:
                for_inference(network, device, compiled if name in COMPILED else None)
        diffusion = instantiate(config.diffusion, "diffusion")
        return cls(
            **networks, diffusion=diffusion, one_step=one_step, defaults=defaults, device=device, offload=offload
        )

    @property
    def diffusion_networks(self) -> list[ControlledUNet]:
        """Of the chains and of one step, where they are there."""
        return [n for n in (self.network, self.one_step and self.one_step.network) if n is not None]

    @property
    def device(self) -> torch.device:
        if self._device is not None:
            return torch.device(self._device)
        networks = (self.stage1, *self.diffusion_networks)
        return next((p.device for net in networks for p in net.parameters()), torch.device("cpu"))

    def __call__(
        self,
        picture: Picture | Sequence[Picture],
        *,
        progress: OnProgress | None = None,
        stages: bool = False,
        **options: Any,
    ) -> Any:
        """Restores a picture, or every picture of a list: of any kinds and sizes, each as if it were alone.

        Args:
            picture: a path, a PIL image, an array or a tensor; see `utils.pictures.open_picture`.
            progress: called after every sampling step and after every picture; it may return False to cancel.
            stages: returns a `Result` of pictures, with stage 1 and the enlarged input, in place of the picture alone.
            **options: fields of `Options`, such as upscale=4 or seed=1; the defaults are the preset's.

        Returns:
            The same kind of picture, `upscale` times as large (a PIL image for a path); a list for a list.

        Raises:
            UserError: an unknown option or a value out of range; a picture that can't be read or has the wrong form.
            Cancelled: `progress` returned False.
        """
        many = isinstance(picture, (list, tuple))
        results = list(self.stream(picture if many else [picture], progress=progress, stages=stages, **options))
        return results if many else results[0]

    def stream(
        self,
        pictures: Iterable[Picture],
        *,
        progress: OnProgress | None = None,
        stages: bool = False,
        **options: Any,
    ) -> Iterator[Any]:
        """Restores pictures one after the other and yields each as it is done; see `__call__`.

        Nothing is read or computed before it is asked for, so that a folder of any length needs little memory.
        """
        chosen = self.options(**options)  # so that a wrong option is refused now and not with the first picture
        steps = 0 if chosen.stage == "1" else chosen.steps
        number = len(pictures) if isinstance(pictures, Sized) else None

        def report(i: int, step: int) -> None:
            if progress is not None and progress(Progress(i, number, step, steps)) is False:
                raise Cancelled(f"cancelled at picture {i + 1}, step {step} of {steps}")

        def restored() -> Iterator[Any]:
            for i, picture in enumerate(pictures):
                images, back = open_picture(picture)
                # The last step is reported once the picture is whole.
                on_step = lambda k, z_0, i=i: report(i, k + 1) if k + 1 < steps else None  # noqa: E731
                result = self.restore(images, chosen, on_step=on_step)
                report(i, steps)
                if stages:
                    yield Result(back(result.image), back(result.stage1), back(result.input))
                else:
                    yield back(result.image)

        return restored()

    @torch.inference_mode()
    def restore(
        self,
        images: Tensor,
        options: Options | None = None,
        seeds: Sequence[int] | None = None,
        on_step: Callable[[int, Tensor], None] = lambda i, z_0: None,
        on_stage1: Callable[[Tensor], None] = lambda i_reg: None,
    ) -> Result:
        """Restores a batch of equally large images; what an image becomes doesn't depend on the others.

        Args:
            images: (B, 3, H, W) float32 RGB in [0, 1], any size.
            seeds: one for each image; `options.seed` for all if None.
            on_step: called after every sampling step with its index and its estimate of the clean latent.
            on_stage1: called with what stage 1 made of them, before stage 2.

        Raises:
            UserError: stage 2, or a solver, is asked of a pipeline without its networks, images of another form, or too
                few seeds.
        """
        options = options or self.options()
        check_images(images)
        seeds = [options.seed] * len(images) if seeds is None else seeds
        if len(seeds) != len(images):
            raise UserError(f"{len(images)} images need as many seeds, not {len(seeds)}; give one for each")
        if options.stage != "1":
            self.network_for(options.solver)
        images = images.to(self.device)
        size = [max(1, round(n * options.upscale)) for n in images.shape[-2:]]
        lq = resize(images, size)
        i_reg = lq if options.stage == "2" else self.remove_degradation(images, lq, options.tile)
        on_stage1(i_reg)
        restored = i_reg if options.stage == "1" else self.generate(i_reg, options, seeds, on_step)
        return Result(*(x.cpu() for x in (restored, i_reg, lq)))

    def remove_degradation(self, images: Tensor, lq: Tensor, tile: int) -> Tensor:
        """Stage 1: the images before and after they were brought to the output size -> I_reg of the latter's size."""
        scale, multiple = getattr(self.stage1, "scale", 1), getattr(self.stage1, "multiple", 1)
        x = images if scale > 1 else lq
        fit = FirstThatFits(plans(tile, self.device, multiple, pixels=max(1, round(scale))))
        with self.on_device(self.stage1):
            i_reg = fit(lambda windows: finite(self.stage1, lambda x: map_in_windows(self.stage1, x, windows), x))
        return resize(i_reg, lq.shape[-2:]).clamp(0, 1)

    def generate(
        self, i_reg: Tensor, options: Options, seeds: Sequence[int], on_step: Callable[[int, Tensor], None]
    ) -> Tensor:
        """Stage 2: I_reg (B, 3, H, W) -> restored images of the same size, in [0, 1]."""
        size = i_reg.shape[-2:]
        height, width = working_size(size, options)
        i_reg = resize(i_reg, (height, width))
        i_reg = pad_to_multiple(i_reg, self.multiple)

        with self.on_device(self.autoencoder):
            latent = finite(self.autoencoder, StripedAutoencoder(self.autoencoder).encode, i_reg)
        with self.on_device(self.text_encoder):
            text = self.text_encoder([options.prompt] * len(i_reg))
            guided = options.cfg_scale > 1 or options.cfg_rising
            negative = self.text_encoder([options.negative_prompt]) if guided else None
        network = self.network_for(options.solver)
        with self.on_device(network):
            condition = Condition(latent, text, i_reg)
            z_0 = self.sample(condition, negative, options, seeds, on_step)
            if not z_0.isfinite().all() and dtype_of(network) in HALF:
                overflow(network)
                z_0 = self.sample(condition, negative, options, seeds, on_step)
        autoencoder = self.autoencoder
        if options.solver == "one_step" and self.one_step.autoencoder is not None:
            autoencoder = self.one_step.autoencoder
        decode = StripedAutoencoder(autoencoder).decode
        with self.on_device(autoencoder):
            image = finite(autoencoder, decode, z_0)
            if options.residual:  # so that what sampling left alone is stage 1's to the pixel
                image += options.residual * (i_reg - finite(autoencoder, decode, latent))
        image = ALIGNMENTS[options.color](image, i_reg).clamp(0, 1)
        return resize(image[..., :height, :width], size).clamp(0, 1)

    @torch.inference_mode()
    def preview(self, z_0: Tensor, size: Sequence[int], options: Options) -> Tensor:
        """What an estimate of the clean latent, as `on_step` gets it, looks like: (B, 3, *size) in [0, 1]."""
        height, width = working_size(size, options)
        with self.on_device(self.autoencoder):
            image = finite(self.autoencoder, StripedAutoencoder(self.autoencoder).decode, z_0)
        return resize(image[..., :height, :width].clamp(0, 1), size).clamp(0, 1)

    def sample(
        self,
        condition: Condition,
        negative: Tensor | None,
        options: Options,
        seeds: Sequence[int],
        on_step: Callable[[int, Tensor], None],
    ) -> Tensor:
        """Draws clean latents like `condition.latent`."""
        latent = condition.latent
        alpha_bar = self.diffusion.alpha_bar[: options.start_t + 1]
        spacing = None if options.spacing == "auto" else options.spacing
        timesteps = timesteps_for(options.solver, alpha_bar, options.steps, spacing)

        # One generator an image, on the CPU: the same noise whatever the batch, the order or the device.
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def noise() -> Tensor:
            return torch.stack([torch.randn(latent.shape[1:], generator=g) for g in generators]).to(latent)

        def noised(t: float) -> Tensor:
            return self.diffusion.diffuse(latent, torch.full((len(latent),), t), noise())

        if SOLVERS[options.solver].start == "clean":
            z = latent
        else:
            z = noised(timesteps[0]) if options.start == "latent" else noise()
        if options.noise_aug:
            condition = replace(condition, latent=noised(options.noise_aug))
        denoise = bind(self.denoiser(negative, options), condition)
        if options.guidance_scale > 0:
            gain = constant
            if options.guidance_form == "mean":
                gain = mean_shift(alpha_bar, timesteps)
            gain = during(gain, options.guidance_start, options.guidance_stop)
            denoise = with_guidance(denoise, self.guidance(latent, condition.image, gain, options))
        eta = None if options.eta < 0 else options.eta
        return sample(options.solver, denoise, z, alpha_bar, options.steps, noise, on_step, spacing, eta)

    def network_for(self, solver: str) -> ControlledUNet:
        """UNet and branch that a solver runs.

        Raises:
            UserError: they aren't there.
        """
        if not self.diffusion_networks:
            raise UserError("this configuration holds stage 1 alone; use --stage 1, or a preset with a diffusion model")
        if solver == "one_step":
            if self.one_step is None:
                raise UserError(
                    "this configuration has no networks for solver one_step; choose another solver, or preset"
                )
            return self.one_step.network
        if self.network is None:
            raise UserError(f"these networks restore in one step; use solver one_step instead of {solver}")
        return self.network

    def denoiser(self, negative: Tensor | None, options: Options) -> Denoiser:
        """(z_t, t, condition) -> z_0 for one chain."""
        network, before_retry = self.network_for(options.solver), lambda: None
        windows = plans(options.tile, self.device, network.unet.factor, pixels=self.autoencoder.factor)
        if options.branch_every > 1 or options.deep_every > 1:
            network = CachedControlledUNet(network, options.branch_every, options.deep_every)
            before_retry = network.memory.forget
        cfg = rising(options.cfg_scale) if options.cfg_rising else lambda t: options.cfg_scale
        denoise = denoiser(network, self.diffusion, options.strength)
        guided = with_cfg(denoise, negative, lambda t: cfg(t) if t >= options.cfg_stop else 1.0)
        return tiled(guided, windows, before_retry)

    def guidance(self, latent: Tensor, i_reg: Tensor, gain: Gain, options: Options) -> Guidance:
        """(z_0, t) -> corrected z_0."""
        weight = region_weight(i_reg) if options.guidance_region else 1.0
        common = {"scale": options.guidance_scale, "gain": gain, "repeats": options.guidance_repeats}
        if options.guidance_space == "rgb":
            dtype = dtype_of(self.autoencoder)
            return RgbL2Guidance(
                lambda z: self.autoencoder.decode(z.to(dtype)).float(),
                i_reg,
                elements=i_reg.shape[1] * 512**2,
                weight=weight,
                **common,
            )
        if options.guidance_region:
            weight = F.interpolate(weight, latent.shape[-2:], mode="area")
        elements = latent.shape[1] * (512 // self.autoencoder.factor) ** 2
        implicit = options.guidance_form == "implicit"
        return LatentL2Guidance(latent, elements=elements, weight=weight, implicit=implicit, **common)

    @contextmanager
    def on_device(self, module: nn.Module) -> Iterator[None]:
        """Has a network where it computes; with `offload`, only for so long."""
        if not self.offload:
            yield
            return
        try:
            yield module.to(self.device)
        finally:
            module.to("cpu")

    def options(self, **changes: Any) -> Options:
        """The defaults, those of one step where that is the solver, with some values changed.

        Raises:
            UserError: an unknown option, or a value out of range.
        """
        trained = self.one_step.options if self.one_step else {}
        return changed(self.defaults, trained, changes)


def changed(defaults: Options, one_step: Mapping[str, Any], changes: Mapping[str, Any]) -> Options:
    """Options with some values changed, over those of one step where that is the solver.

    Raises:
        UserError: an unknown option, or a value out of range.
    """
    known = list(Options.__dataclass_fields__)
    for name in changes:
        if name not in known:
            raise UserError(f"unknown option '{name}'{hint(name, known)}")
    trained = one_step if changes.get("solver", defaults.solver) == "one_step" else {}
    return replace(defaults, **{**trained, **changes})


def options_of(config: DictConfig, changes: Mapping[str, Any]) -> Options:
    """The options that a restorer of this configuration would have; builds nothing.

    Raises:
        UserError: an unknown option, or a value out of range.
    """
    node = config.get("one_step") or {}
    return changed(Options(**sampling_of(config)), sampling_of(node, "one_step."), changes)


def usable(network: nn.Module, dtype: torch.dtype) -> torch.dtype:
    """The type, unless it is fp16 and a stage 1 of others cannot have that."""
    return torch.float32 if dtype == torch.float16 and not getattr(network, "supports_half", True) else dtype


def working_size(size: Sequence[int], options: Options) -> list[int]:
    """Height and width that stage 2 works at, for results of a height and width."""
    factor = max(1.0, options.min_side / min(size))
    return [round(n * factor) for n in size]


def sampling_of(config: DictConfig, prefix: str = "") -> dict[str, Any]:
    """Options under the key `sampling`.

    Raises:
        UserError: an unknown name.
    """
    sampling = dict(config.get("sampling") or {})
    for name in sampling:
        if name not in Options.__dataclass_fields__:
            raise UserError(f"unknown key '{prefix}sampling.{name}'; known: {', '.join(Options.__dataclass_fields__)}")
    return sampling


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Bicubic, antialiased where it shrinks: (B, C, H, W) in [0, 1] -> (B, C, *size) in [0, 1]."""
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, tuple(size), mode="bicubic", antialias=size[0] < images.shape[-2]).clamp(0, 1)


def finite(module: nn.Module, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """`function` of `module`, computed in the module's precision or, if that overflows, in float32; float32 out."""
    y = function(x.to(dtype_of(module))).float()
    if dtype_of(module) in HALF and not y.isfinite().all():
        overflow(module)
        y = function(x.float())
    return y


def overflow(module: nn.Module) -> None:
    log.warning("%s overflows in %s; it goes on in float32", type(module).__name__, dtype_of(module))
    module.float()
