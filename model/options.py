"""How to restore: the options of a call, which are also the flags of the command line."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from diffbir.model.sampling.solvers import SOLVERS, SPACINGS
from diffbir.utils.choices import ALIGNMENTS, AUTOMATIC
from diffbir.utils.cli import UserError

# Type of an option -> how to say it, and what is taken for it: numpy's numbers too.
KINDS = {
    bool: ("true or false", bool),
    int: ("a whole number", Integral),
    float: ("a number", Real),
    str: ("text", str),
}


def option(
    default: Any, help: str, choices: Sequence | None = None, low: float | None = None, high: float | None = None
):
    return field(default=default, metadata={"help": help, "choices": choices, "low": low, "high": high})


@dataclass(frozen=True)
class Options:
    """How to restore. A preset changes the defaults; each field is also a flag of `inference.py`.

    Raises:
        UserError: a value of another type or out of range, or two that exclude each other, naming the option.
    """

    upscale: float = option(1.0, "output size over input size", low=0.001, high=16)
    stage: str = option(
        "both", "'1' only removes the degradation, '2' only generates (on the input itself)", ("both", "1", "2")
    )
    solver: str = option("ddpm", "sampler", tuple(SOLVERS))
    steps: int = option(50, "sampling steps: more is slower and sharper", low=1, high=1000)
    spacing: str = option("auto", "timesteps of the solver; auto is what suits it", ("auto", *SPACINGS))
    eta: float = option(-1.0, "fresh noise of a stochastic solver, from 0 to 1; -1 is the solver's own", low=-1, high=1)
    start: str = option(
        "noise", "what sampling starts from: noise, or the noised latent of stage 1", ("noise", "latent")
    )
    start_t: int = option(
        999, "timestep to start at; below 999, with --start latent, few steps suffice", low=1, high=999
    )
    noise_aug: int = option(0, "timestep up to which the condition latent is noised", low=0, high=999)
    guidance_scale: float = option(
        0.0, "latent guidance: 0 is most realistic, larger is closer to stage 1 (try 3000 to 100000)", low=0
    )
    guidance_start: int = option(1000, "first timestep (they descend from 999) that is guided", low=0, high=1000)
    guidance_stop: int = option(0, "last timestep that is guided", low=0, high=1000)
    guidance_repeats: int = option(1, "guidance steps in each sampling step", low=1, high=100)
    guidance_region: bool = option(False, "guide flat regions more than detailed ones")
    guidance_form: str = option(
        "implicit",
        "implicit never overshoots; explicit is a plain step; mean is the paper's shift (solver ddpm)",
        ("implicit", "explicit", "mean"),
    )
    guidance_space: str = option("latent", "where the distance to stage 1 is taken", ("latent", "rgb"))
    strength: float = option(1.0, "scale of what the branch adds to the UNet", low=0, high=2)
    cfg_scale: float = option(1.0, "classifier-free guidance by the prompts; 1 is off", low=1)
    cfg_rising: bool = option(False, "let the scale rise along the chain from 1 to 1 + cfg-scale")
    cfg_stop: int = option(0, "last timestep with classifier-free guidance: a larger one is faster", low=0, high=1000)
    branch_every: int = option(1, "evaluate the branch only every so many steps: faster", low=1)
    deep_every: int = option(1, "evaluate the deep blocks of the UNet only every so many steps: faster", low=1)
    prompt: str = option("", "what the image shows (models with text only)")
    negative_prompt: str = option("", "what to keep away from (with --cfg-scale above 1)")
    residual: float = option(
        0.0, "how much of the detail that the autoencoder loses of stage 1 is put back, 0 to 1", low=0, high=1
    )
    color: str = option("wavelet", "colour alignment to stage 1", ALIGNMENTS)
    tile: int = option(
        512,
        "side of the windows that larger images are computed in, pixels, up to half as large again where that is less "
        "work; 0 is never, -1 what fits free memory",
        low=AUTOMATIC,
    )
    min_side: int = option(
        0,
        "shorter images are enlarged to this side for stage 2, pixels: large models need it",
        low=0,
    )
    seed: int = option(0, "noise of every image follows from it, whatever the order", low=0, high=2**64 - 1)

    def __post_init__(self):
        for name, spec in self.__dataclass_fields__.items():
            value, meta = plain(name, type(spec.default), getattr(self, name)), spec.metadata
            object.__setattr__(self, name, value)
            if meta["choices"] and value not in meta["choices"]:
                raise UserError(f"{name} must be one of {', '.join(meta['choices'])}, not '{value}'")
            if meta["low"] is not None and value < meta["low"]:
                raise UserError(f"{name} must be at least {meta['low']}, not {value}")
            if meta["high"] is not None and value > meta["high"]:
                raise UserError(f"{name} must be at most {meta['high']}, not {value}")
        most = self.start_t + (self.spacing != "leading")  # which leaves out the last timestep
        if self.steps > most:
            raise UserError(
                f"steps must be at most {most} with start_t {self.start_t} and spacing {self.spacing}, not {self.steps}"
            )
        if self.start == "noise" and self.start_t < 999 and SOLVERS[self.solver].start == "noise":
            raise UserError("start_t below 999 needs start 'latent': pure noise belongs to the last timestep")
        if self.guidance_form == "mean" and self.solver != "ddpm":
            raise UserError("guidance_form 'mean' shifts the mean of a ddpm step; use solver ddpm, or another form")
        if self.guidance_start < self.guidance_stop:
            raise UserError(
                f"guidance_start must be at least guidance_stop, for timesteps descend: {self.guidance_start} is less "
                f"than {self.guidance_stop}, and nothing would be guided"
            )
        if -1 < self.eta < 0:
            raise UserError(f"eta must be -1 (the solver's own) or lie in 0 .. 1, not {self.eta}")
        if self.eta >= 0 and SOLVERS[self.solver].eta is None:
            raise UserError(f"eta is for stochastic solvers, not for {self.solver}")


def plain(name: str, kind: type, value: Any) -> Any:
    """The value of an option as Python's own bool, int, float or str.

    Raises:
        UserError: it is of another type, or not finite.
    """
    words, accepted = KINDS[kind]
    right = isinstance(value, accepted) and isinstance(value, bool) == (kind is bool)  # True is not 1 here
    if not right or (kind is float and not math.isfinite(value)):
        raise UserError(f"{name} must be {words}, not {value!r}")
    return kind(value)
