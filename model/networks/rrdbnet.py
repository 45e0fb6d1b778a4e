"""RRDBNet (Wang et al. 2018, ESRGAN, https://arxiv.org/abs/1809.00219), the network of BSRNet and Real-ESRGAN x4plus.

Attribute names are those of the published BSRNet checkpoint.
"""

import torch
from torch import Tensor, nn

from diffbir.model.networks.layers import DoublingConv2d, activated

RESIDUAL_SCALE = 0.2  # keeps a deep chain of residuals stable without normalisation (section 3.1)


class ResidualDenseBlock(nn.Module):
    """Four convolutions that each see everything before them, a fifth that fuses: (B, C, H, W) -> (B, C, H, W)."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        self.conv1 = nn.Conv2d(features, growth, 3, padding=1)
        self.conv2 = nn.Conv2d(features + growth, growth, 3, padding=1)
        self.conv3 = nn.Conv2d(features + 2 * growth, growth, 3, padding=1)
        self.conv4 = nn.Conv2d(features + 3 * growth, growth, 3, padding=1)
        self.conv5 = nn.Conv2d(features + 4 * growth, features, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = x
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            h = torch.cat([h, activated(conv, h, "leaky_relu")], dim=1)
        return x + RESIDUAL_SCALE * self.conv5(h)


class RRDB(nn.Module):
    """Residual in residual: three dense blocks and a scaled skip around them."""

    def __init__(self, features: int, growth: int):
        super().__init__()
        self.RDB1 = ResidualDenseBlock(features, growth)
        self.RDB2 = ResidualDenseBlock(features, growth)
        self.RDB3 = ResidualDenseBlock(features, growth)

    def forward(self, x: Tensor) -> Tensor:
        return x + RESIDUAL_SCALE * self.RDB3(self.RDB2(self.RDB1(x)))


class RRDBNet(nn.Module):
    """Super-resolution by four; the layers are defined in the order in which they run.

    Args:
        in_channels: image channels.
        features: channels of the trunk.
        blocks: RRDBs in the trunk.
        growth: channels that each convolution of a dense block adds.
    """

    scale = 4  # output size over input size

    packs = True  # layers are only called, so that `model.networks.packed` may replace them

    def __init__(self, in_channels: int = 3, features: int = 64, blocks: int = 23, growth: int = 32):
        super().__init__()
        self.conv_first = nn.Conv2d(in_channels, features, 3, padding=1)
        self.RRDB_trunk = nn.Sequential(*(RRDB(features, growth) for _ in range(blocks)))
        self.trunk_conv = nn.Conv2d(features, features, 3, padding=1)
        self.upconv1 = DoublingConv2d(features, features)
        self.upconv2 = DoublingConv2d(features, features)
        self.HRconv = nn.Conv2d(features, features, 3, padding=1)
        self.conv_last = nn.Conv2d(features, in_channels, 3, padding=1)

    def forward(self, image: Tensor) -> Tensor:
        """Restores and enlarges.

        Args:
            image: (B, in_channels, H, W) in [0, 1], any size.

        Returns:
            (B, in_channels, 4 H, 4 W), not clamped.
        """
        h = self.conv_first(image)
        h = h + self.trunk_conv(self.RRDB_trunk(h))
        for upconv in (self.upconv1, self.upconv2):
            h = activated(upconv, h, "leaky_relu")
        return self.conv_last(activated(self.HRconv, h, "leaky_relu"))
