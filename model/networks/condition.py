"""What a denoiser is conditioned on."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Inputs of the denoiser besides z_t and t; None is absent.

    Args:
        latent: E(I_reg), scaled, (B, C, h, w).
        text: text embedding, (B, L, D).
        image: I_reg in [0, 1], (B, 3, H, W), for an image-space ControlNet.
    """

    latent: Tensor | None = None
    text: Tensor | None = None
    image: Tensor | None = None

    def map(self, f: Callable[[Tensor], Tensor]) -> "Condition":
        """Applies `f` to every tensor that is present."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Condition(**{name: None if value is None else f(value) for name, value in values.items()})
