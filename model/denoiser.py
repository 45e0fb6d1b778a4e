"""Denoisers: functions `(z_t, t, condition) -> z_0`, and what wraps them.

A network and a diffusion process make one; `with_cfg` and `tiled` turn one into another; `bind` fixes the condition
and `with_guidance` corrects the estimate, which gives the `(z_t, t) -> z_0` that a solver sees. None alters a model.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from model.condition import Condition
from model.diffusion import Diffusion

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
    dtype = next(network.parameters()).dtype

    def denoise(z_t: Tensor, t: float, condition: Condition) -> Tensor:
        steps = torch.full((len(z_t),), t, device=z_t.device)
        output = network(z_t.to(dtype), steps, condition.map(lambda x: x.to(dtype)), strength)
        return diffusion.to_z_0(z_t, steps, output.float())

    return denoise


def with_cfg(denoise: Denoiser, negative: Tensor | None, scale: float) -> Denoiser:
    """Classifier-free guidance (Ho and Salimans 2022) in one batched call; scale 1 is no guidance and costs nothing.

    Args:
        negative: text embedding of the negative prompt, (B, L, D).
    """
    if scale == 1:
        return denoise

    def guided(z_t: Tensor, t: float, condition: Condition) -> Tensor:
        unconditional = Condition(condition.latent, negative, condition.image)
        both = denoise(torch.cat([z_t, z_t]), t, Condition.cat(condition, unconditional))
        positive, negative_z_0 = both.chunk(2)
        return negative_z_0 + scale * (positive - negative_z_0)

    return guided


def tiled(denoise: Denoiser, tile: int, overlap: int) -> Denoiser:
    """Denoises latents larger than `tile` in overlapping windows that are averaged with smooth weights.

    Args:
        tile: side of a window in the latent, a multiple of the network's factor.
        overlap: latent pixels that neighbouring windows share, less than `tile`.
    """

    def denoise_tiles(z_t: Tensor, t: float, condition: Condition) -> Tensor:
        height, width = z_t.shape[-2:]
        if height <= tile and width <= tile:
            return denoise(z_t, t, condition)
        total, weights = torch.zeros_like(z_t), torch.zeros_like(z_t[:1, :1])
        for top in window_starts(height, tile, overlap):
            for left in window_starts(width, tile, overlap):

                def cut(x: Tensor, top: int = top, left: int = left) -> Tensor:
                    if x.ndim < 4:
                        return x  # text covers the whole picture
                    f = x.shape[-2] // height  # the condition image is larger than the latent
                    return x[..., top * f : (top + tile) * f, left * f : (left + tile) * f]

                window = cut(z_t)
                weight = tent(window.shape[-2]).outer(tent(window.shape[-1])).to(z_t)
                rows, columns = slice(top, top + tile), slice(left, left + tile)
                total[..., rows, columns] += weight * denoise(window, t, condition.map(cut))
                weights[..., rows, columns] += weight
        return total / weights

    return denoise_tiles


def window_starts(length: int, tile: int, overlap: int) -> Iterator[int]:
    """Evenly spread starts of the fewest windows that cover `length` and overlap by at least `overlap`."""
    if length <= tile:
        return iter([0])
    count = -(-(length - overlap) // (tile - overlap))
    return iter([round(i * (length - tile) / (count - 1)) for i in range(count)])


def tent(n: int) -> Tensor:
    """Symmetric weights that rise linearly towards the middle and are never zero: (n,)."""
    i = torch.arange(n) + 0.5
    return torch.minimum(i, n - i) / n


def bind(denoise: Denoiser, condition: Condition) -> BoundDenoiser:
    """Fixes the condition."""
    return lambda z_t, t: denoise(z_t, t, condition)


def with_guidance(denoise: BoundDenoiser, guidance: Callable[[Tensor, float], Tensor]) -> BoundDenoiser:
    """Corrects every estimate of the clean latent, whatever the solver."""
    return lambda z_t, t: guidance(denoise(z_t, t), t)
