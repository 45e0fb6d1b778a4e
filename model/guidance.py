"""Latent image guidance: training-free control between realism and fidelity (DiffBIR, section 3.3)."""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class LatentL2Guidance:
    """Pulls the estimated clean latent towards E(I_reg): descends D = ||z_0 - target||^2 / (C h w).

    One explicit step is z_0 - scale * grad D(z_0) = z_0 - k (z_0 - target) with k = 2 scale / (C h w); above k = 1 it
    overshoots. The default is the implicit step, z = z_0 - scale * grad D(z), whose solution (z_0 + k target) / (1 + k)
    agrees with it to first order in k and moves towards the target monotonically for any scale.

    Args:
        target: E(I_reg), scaled, (B, C, h, w).
        scale: s >= 0; 0 is off.
        elements: C h w of the latent of a 512x512 image. Using this in place of the image's own number of elements
            makes a scale mean the same for images of any size.
        implicit: False takes the paper's explicit step.
    """

    target: Tensor
    scale: float
    elements: int
    implicit: bool = True

    def __call__(self, z_0: Tensor, t: int) -> Tensor:
        k = 2 * self.scale / self.elements
        if self.implicit:
            k = k / (1 + k)
        return z_0 - k * (z_0 - self.target)
