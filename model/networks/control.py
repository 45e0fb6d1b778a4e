"""What steers the frozen UNet: the latent parallel branch, and the image-space ControlNet of the ablation.

Both copy the UNet's encoder and middle block; every output passes a 1x1 convolution that starts at zero, so that at
initialisation the UNet computes what it computed without them.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from diffbir.model.networks.condition import Condition
from diffbir.model.networks.layers import zero_module
from diffbir.model.networks.unet import UNetEncoder
from diffbir.utils.cli import UserError


class ControlBase(UNetEncoder):
    """A copy of the UNet's encoder whose outputs pass zero convolutions."""

    def __init__(self, **encoder):
        super().__init__(**encoder)
        self.zero_convs = nn.ModuleList(nn.Sequential(zero_module(nn.Conv2d(c, c, 1))) for c in self.skip_channels)
        middle = self.skip_channels[-1]
        self.middle_block_out = nn.Sequential(zero_module(nn.Conv2d(middle, middle, 1)))

    @torch.no_grad()
    def init_from(self, unet: UNetEncoder) -> None:
        """Copies the encoder of a UNet; input channels that the UNet lacks start at zero."""
        source, own = unet.state_dict(), self.state_dict()
        for name, value in own.items():
            if name not in source:
                continue
            if name == "input_blocks.0.0.weight":
                value.zero_()[:, : source[name].shape[1]] = source[name]
            else:
                value.copy_(source[name])

    def controls(self, features: Sequence[Tensor]) -> list[Tensor]:
        convs = [*self.zero_convs, self.middle_block_out]
        return [conv(f) for conv, f in zip(convs, features, strict=True)]


class LatentBranch(ControlBase):
    """The parallel branch of DiffBIR (IRControlNet): sees [z_t, E(I_reg)] (section 3.2).

    Args:
        in_channels: channels of z_t.
        hint_channels: channels of the condition latent; as many as z_t's if None.
        **encoder: see `UNetEncoder`; as the UNet's.
    """

    def __init__(self, in_channels: int = 4, hint_channels: int | None = None, **encoder):
        hint_channels = hint_channels or in_channels
        super().__init__(in_channels=in_channels + hint_channels, **encoder)
        self.hint_channels = hint_channels

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """z_t: (B, C, H, W), t: (B,); needs `condition.latent` -> what the UNet adds to its skips and middle."""
        x = torch.cat([z_t, condition.latent], dim=1)
        return self.controls(self.encode(x, self.embed(t), condition.text))


class ImageControlNet(ControlBase):
    """A plain ControlNet (Zhang et al. 2023, https://arxiv.org/abs/2302.05543): sees I_reg through its own small
    convolutional encoder, trained from scratch. DiffBIR's ablation: it drifts in colour.

    Args:
        image_channels: channels of the condition image.
        image_widths: widths of the small encoder; each after the first halves the size, so the last index is
            log2 of the autoencoder's factor.
        **encoder: see `UNetEncoder`; as the UNet's.
    """

    def __init__(self, image_channels: int = 3, image_widths: Sequence[int] = (16, 32, 96, 256), **encoder):
        super().__init__(**encoder)
        layers: list[nn.Module] = [nn.Conv2d(image_channels, image_widths[0], 3, padding=1), nn.SiLU()]
        for width, wider in itertools.pairwise(image_widths):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.SiLU()]
            layers += [nn.Conv2d(width, wider, 3, padding=1, stride=2), nn.SiLU()]
        layers.append(zero_module(nn.Conv2d(image_widths[-1], self.model_channels, 3, padding=1)))
        self.input_hint_block = nn.Sequential(*layers)

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> list[Tensor]:
        """z_t: (B, C, H, W), t: (B,); needs `condition.image` -> what the UNet adds to its skips and middle."""
        if condition.image is None:
            raise UserError("ImageControlNet needs images, which cached latents leave out; train it on photos")
        hint = self.input_hint_block(condition.image * 2 - 1)
        return self.controls(self.encode(z_t, self.embed(t), condition.text, hint))
