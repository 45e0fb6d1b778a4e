"""Where a diffusion loss takes its randomness from: anew, or, so that losses compare, from the numbers of images."""

from collections.abc import Sequence

import torch
from torch import Tensor

GOLDEN = (5**0.5 - 1) / 2


class Anew:
    """Torch's own, on the device of what they are for."""

    def normal(self, x: Tensor) -> Tensor:
        """N(0, I) of the shape of x, (B, ...)."""
        return torch.randn_like(x)

    def below(self, n: int, x: Tensor) -> Tensor:
        """Whole numbers in 0 .. n - 1, uniform, one for each image of x, (B, ...): (B,)."""
        return torch.randint(n, (len(x),), device=x.device)

    timesteps = below


class OfImages(Anew):
    """Those that belong to images: the same in every batch, in any company and on any device.

    Args:
        numbers: of the images of a batch, from 0 on without gaps over a whole set.
    """

    def __init__(self, numbers: Sequence[int]):
        self.numbers = torch.as_tensor(numbers)
        self.generators = [torch.Generator().manual_seed(number) for number in self.numbers.tolist()]

    def normal(self, x: Tensor) -> Tensor:
        return torch.stack([torch.randn(x.shape[1:], generator=g) for g in self.generators]).to(x)

    def below(self, n: int, x: Tensor) -> Tensor:
        return torch.cat([torch.randint(n, (1,), generator=g) for g in self.generators]).to(x.device)

    def timesteps(self, n: int, x: Tensor) -> Tensor:
        """As `below`, but however many images a set has, they cover 0 .. n - 1 evenly.

        The additive sequence of the golden ratio: a mean over it has far less scatter than one over random timesteps.
        """
        return ((self.numbers.double() + 0.5) * GOLDEN % 1 * n).long().to(x.device)


ANEW = Anew()
