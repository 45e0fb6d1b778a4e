"""Discriminators of the adversarial trainings: real photos have positive logits, generated ones negative."""

from collections.abc import Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm


def leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, 0.2)


class UNetDiscriminator(nn.Module):
    """A logit for every pixel, from a U-Net whose convolutions have spectral norm 1 (Schoenfeld et al. 2020,
    https://arxiv.org/abs/2002.12655; the form of Real-ESRGAN, https://arxiv.org/abs/2107.10833, section 3.3).

    Every pixel is judged with all that surrounds it, so regular patterns of the decoder are seen where they are.

    Args:
        channels: of the input.
        features: width at full resolution.
        levels: how often the size is halved, and the width doubled.
    """

    def __init__(self, channels: int = 3, features: int = 64, levels: int = 3):
        super().__init__()
        widths = [features * 2**i for i in range(levels + 1)]

        def conv(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Module:
            return spectral_norm(nn.Conv2d(inputs, outputs, kernel, stride, padding=1, bias=False))

        self.multiple = 2**levels
        self.conv_in = nn.Conv2d(channels, features, 3, padding=1)
        self.down = nn.ModuleList(conv(w, wider, 4, 2) for w, wider in pairwise(widths))
        self.up = nn.ModuleList(conv(wider, w) for w, wider in pairwise(widths))
        self.last = nn.ModuleList(conv(features, features) for _ in range(2))
        self.conv_out = nn.Conv2d(features, 1, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W), H and W multiples of `multiple` -> logits (B, 1, H, W)."""
        h = leaky(self.conv_in(x))
        skips = []
        for layer in self.down:
            skips.append(h)
            h = leaky(layer(h))
        for layer, skip in zip(reversed(self.up), reversed(skips), strict=True):
            h = F.interpolate(h, scale_factor=2.0, mode="bilinear", align_corners=False)
            h = leaky(layer(h)) + skip
        for layer in self.last:
            h = leaky(layer(h))
        return self.conv_out(h)


class FeatureHeads(nn.Module):
    """Logits from the features of a frozen network, a small head for each map (Sauer et al. 2021, Projected GANs,
    https://arxiv.org/abs/2111.01007, without its random projections).

    Args:
        widths: channels of the feature maps.
        hidden: channels inside a head.
    """

    def __init__(self, widths: Sequence[int], hidden: int = 64):
        super().__init__()
        self.heads = nn.ModuleList(
            nn.Sequential(
                spectral_norm(nn.Conv2d(width, hidden, 1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(hidden, hidden, 3, padding=1)),
                nn.LeakyReLU(0.2),
                spectral_norm(nn.Conv2d(hidden, 1, 3, padding=1)),
            )
            for width in widths
        )

    def forward(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Maps (B, C_i, h_i, w_i) -> logits (B, 1, h_i, w_i); the channels' mean square is brought to 1 first."""
        unit = (F.normalize(f, dim=1, eps=1e-6) * f.shape[1] ** 0.5 for f in features)
        return [head(f) for head, f in zip(self.heads, unit, strict=True)]


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator (Lim and Ye 2017, https://arxiv.org/abs/1705.02894): scalars from logits."""
    return F.relu(1 - real).mean() + F.relu(1 + fake).mean()


def logistic(real: Tensor, fake: Tensor) -> Tensor:
    """Loss of the discriminator (Goodfellow et al. 2014): cross-entropy of its logits."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


# Name -> losses of the discriminator, (real, fake), and of the generator, (fake).
ADVERSARIAL = {
    "hinge": (hinge, lambda fake: -fake.mean()),
    "softplus": (logistic, lambda fake: F.softplus(-fake).mean()),
}


def accuracy(real: Tensor, fake: Tensor) -> Tensor:
    """Share of logits of the right sign; 0.5 is a guess, 1 leaves the generator nothing to learn from."""
    return ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
