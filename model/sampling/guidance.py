"""Latent image guidance: training-free control between realism and fidelity (DiffBIR, section 3.3).

Every guidance corrects the estimated clean latent, `(z_0, t) -> z_0`, so that each solver has it. It descends the
distance D to stage 1's result with the scale s >= 0. D is the squared distance over the number of elements of a
512x512 image, not over the image's own: so a scale means the same for images of any size.

The paper shifts the mean of the DDPM step instead. That mean is c_0 z_0 + c_t z_t (`sampling.solvers.posterior`), so a
shift of the mean by -s grad D is a correction of z_0 with scale s / c_0: `mean_shift` is that factor. c_0 is near 1
in the last steps of a short chain and small in the first of a long one, where the paper's form is therefore stronger.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from diffbir.model.sampling.solvers import posterior

Gain = Callable[[float], float]
Guidance = Callable[[Tensor, float], Tensor]


def constant(t: float) -> float:
    return 1.0


def mean_shift(alpha_bar: NDArray, timesteps: list[float]) -> Gain:
    """Factor on the scale at each timestep that makes a correction of z_0 a shift of the DDPM mean."""
    c_0 = {t: posterior(alpha_bar, t, s)[0] for t, s in pairwise(timesteps)}
    return lambda t: 1 / c_0[t]


def during(gain: Gain, start: float, stop: float) -> Gain:
    """Only at timesteps stop <= t <= start."""
    return lambda t: gain(t) if stop <= t <= start else 0.0


def region_weight(image: Tensor) -> Tensor:
    """Near 1 in flat regions and near 0 where gradients are strong (DiffBIR, region-adaptive guidance).

    One minus the tanh of Sobel magnitudes of luma, summed in blocks of 2x2.

    Args:
        image: (B, 3, H, W) RGB in [0, 1], H and W even.

    Returns:
        (B, 1, H, W) in [0, 1].
    """
    luma = (image * image.new_tensor([0.2989, 0.5870, 0.1140]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    sobel = image.new_tensor([[1, 0, -1], [2, 0, -2], [1, 0, -1]])
    kernels = torch.stack([sobel, sobel.T])[:, None]
    gradient = F.conv2d(F.pad(luma, (1, 1, 1, 1), mode="replicate"), kernels)  # (B, 2, H, W)
    magnitude = gradient.square().sum(1, keepdim=True).sqrt()
    blocks = 4 * F.avg_pool2d(magnitude, 2)
    return 1 - F.interpolate(blocks.tanh(), scale_factor=2.0, mode="nearest")


@dataclass(frozen=True)
class LatentL2Guidance:
    """Pulls the estimated clean latent towards E(I_reg): D = sum w (z_0 - target)^2 / elements.

    One explicit step is z_0 - s grad D(z_0) = z_0 - k (z_0 - target) with k = 2 s w / elements; above k = 1 it
    overshoots. The default is the implicit step, z = z_0 - s grad D(z), whose solution (z_0 + k target) / (1 + k)
    agrees with it to first order in k and moves towards the target monotonically for any scale.

    Args:
        target: E(I_reg), scaled, (B, C, h, w).
        scale: s >= 0; 0 is off.
        elements: C h w of the latent of a 512x512 image.
        weight: w in [0, 1], (B, 1, h, w) or 1; see `region_weight`.
        gain: factor on the scale at a timestep.
        repeats: steps in a row.
        implicit: False takes the paper's explicit step.
    """

    target: Tensor
    scale: float
    elements: int
    weight: Tensor | float = 1.0
    gain: Gain = constant
    repeats: int = 1
    implicit: bool = True

    def __call__(self, z_0: Tensor, t: float) -> Tensor:
        k = 2 * self.scale * self.gain(t) / self.elements * self.weight
        if self.implicit:
            k = k / (1 + k)
        for _ in range(self.repeats):
            z_0 = z_0 - k * (z_0 - self.target)
        return z_0


@dataclass(frozen=True)
class RgbL2Guidance:
    """Pulls what the estimate decodes to towards I_reg: D = sum w (D(z_0) - I_reg)^2 / elements, by autograd.

    A step of size s along -grad D overshoots where the decoder amplifies. On a linear decoder the best step is
    a = |g|^2 elements / (2 |J g|^2); s / (1 + s / a) is s where that is small and never passes it.

    Args:
        decode: scaled latent -> image in [0, 1], differentiable.
        target: I_reg, (B, 3, H, W).
        scale: s >= 0; 0 is off.
        elements: C H W of a 512x512 image.
        weight: w in [0, 1], (B, 1, H, W) or 1.
        gain: factor on the scale at a timestep.
        repeats: steps in a row.
    """

    decode: Callable[[Tensor], Tensor]
    target: Tensor
    scale: float
    elements: int
    weight: Tensor | float = 1.0
    gain: Gain = constant
    repeats: int = 1

    def __call__(self, z_0: Tensor, t: float) -> Tensor:
        scale = self.scale * self.gain(t)
        if scale == 0:
            return z_0
        with torch.inference_mode(False), torch.enable_grad():
            target = self.target.clone()  # what was made in inference mode cannot be differentiated against
            weight = self.weight.clone() if isinstance(self.weight, Tensor) else self.weight
            for _ in range(self.repeats):
                z = z_0.detach().clone().requires_grad_()
                image = self.decode(z)
                (g,) = torch.autograd.grad((weight * (image - target).square()).sum() / self.elements, z)
                with torch.no_grad():
                    squared = g.square().sum(dim=(1, 2, 3), keepdim=True).clamp(min=1e-20)
                    epsilon = 1e-2 * (z.square().mean(dim=(1, 2, 3), keepdim=True) * z[0].numel() / squared).sqrt()
                    Jg = (image - self.decode(z - epsilon * g)) / epsilon
                    curvature = 2 * (weight * Jg.square()).sum(dim=(1, 2, 3), keepdim=True) / self.elements
                    z_0 = z - scale / (1 + scale * curvature / squared) * g
        return z_0
