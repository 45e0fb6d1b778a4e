"""Denoisers: functions `(z_t, t, condition) -> z_0`, and what wraps them.

A network and a diffusion process make one; `with_cfg` and `tiled` turn one into another; `bind` fixes the condition
and `with_guidance` corrects the estimate, which gives the `(z_t, t) -> z_0` that a solver sees. None alters a model.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from diffbir.model.networks.condition import Condition
from diffbir.model.networks.layers import repeat_to
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.tiling import Windows, in_windows
from diffbir.utils.memory import FirstThatFits
from diffbir.utils.precision import dtype_of

Denoiser = Callable[[Tensor, float, Condition], Tensor]
BoundDenoiser = Callable[[Tensor, float], Tensor]


class ControlledUNet(nn.Module):
    """The UNet with its branch: (z_t, t, condition) -> prediction.

    Args:
        unet: the UNet.
        branch: `LatentBranch` or `ImageControlNet`; None is the bare prior.
    """

    def __init__(self, unet: nn.Module, branch: nn.Module | None = None):
        super().__init__()
        self.unet, self.branch = unet, branch

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition, strength: float = 1.0) -> Tensor:
        """z_t: (B, C, h, w), t: (B,); `strength` scales what the branch adds."""
        control = None
        if self.branch is not None:
            control = [strength * c for c in self.branch(z_t, t, condition)]
        return self.unet(z_t, t, condition.text, control)


def denoiser(network: ControlledUNet, diffusion: Diffusion, strength: float = 1.0) -> Denoiser:
    """Turns a network that predicts eps or v into a denoiser; z_t and z_0 are float32 whatever the network is."""
    dtype = dtype_of(network)

    def denoise(z_t: Tensor, t: float, condition: Condition) -> Tensor:
        steps = torch.full((len(z_t),), t, device=z_t.device)
        output = network(z_t.to(dtype), steps, condition.map(lambda x: x.to(dtype)), strength).float()
        return diffusion.to_z_0(repeat_to(z_t, len(output)), repeat_to(steps, len(output)), output)

    return denoise


def with_cfg(denoise: Denoiser, negative: Tensor | None, scale: Callable[[float], float]) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022) in one call for both texts; scale 1 costs nothing.

    What doesn't depend on the text, up to the first attention to it, is computed once (`TransformerBlock`).

    Args:
        negative: text embedding of the negative prompt, the same for all images, (b, L, D); None is no guidance.
        scale: scale at a timestep.
    """
    if negative is None:
        return denoise

    def guided(z_t: Tensor, t: float, condition: Condition) -> Tensor:
        if scale(t) == 1:
            return denoise(z_t, t, condition)
        texts = torch.cat([condition.text, repeat_to(negative, len(z_t))])
        positive, negative_z_0 = denoise(z_t, t, Condition(condition.latent, texts, condition.image)).chunk(2)
        return negative_z_0 + scale(t) * (positive - negative_z_0)

    return guided


def rising(scale: float) -> Callable[[float], float]:
    """A scale that rises along the chain from 1 to 1 + `scale`, slowly at first."""
    return lambda t: 1 + scale * (1 - math.cos(math.pi * ((1000 - t) / 1000) ** 5)) / 2


def tiled(denoise: Denoiser, plans: Sequence[Windows], before_retry: Callable[[], None] = lambda: None) -> Denoiser:
    """Denoises large latents in overlapping windows.

    Text covers the whole picture and is repeated for every window.

    Args:
        plans: windows over the latent; each for when the one before runs out of memory.
        before_retry: called before a step is done again in other windows.
    """
    fit = FirstThatFits(plans, before_retry)

    def denoise_windows(z_t: Tensor, t: float, condition: Condition) -> Tensor:
        def windows_at(windows: Windows) -> Tensor:
            return in_windows(lambda cut: denoise(cut(z_t), t, condition.map(cut)), *z_t.shape[-2:], windows)

        return fit(windows_at)

    return denoise_windows


def bind(denoise: Denoiser, condition: Condition) -> BoundDenoiser:
    """Fixes the condition."""
    return lambda z_t, t: denoise(z_t, t, condition)


def with_guidance(denoise: BoundDenoiser, guidance: Callable[[Tensor, float], Tensor]) -> BoundDenoiser:
    """Corrects every estimate of the clean latent, whatever the solver."""
    return lambda z_t, t: guidance(denoise(z_t, t), t)
