"""The KL autoencoder of latent diffusion (Rombach et al. 2022, https://arxiv.org/abs/2112.10752).

Attribute names are those of the published Stable Diffusion checkpoints.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbir.model.networks.attention import attention
from diffbir.model.networks.layers import Conv3x3, Upsample, plus, silu


@dataclass(frozen=True)
class DiagonalGaussian:
    """q(z | x) with independent components.

    Args:
        mean: (B, C, h, w).
        logvar: (B, C, h, w), in [-30, 20].
    """

    mean: Tensor
    logvar: Tensor

    def sample(self, normal: Callable[[Tensor], Tensor] = torch.randn_like) -> Tensor:
        """A draw; `normal` gives N(0, I) of a tensor's shape."""
        return self.mean + torch.exp(0.5 * self.logvar) * normal(self.mean)

    def kl(self) -> Tensor:
        """KL divergence from N(0, I), summed over components: (B,)."""
        return 0.5 * (self.mean**2 + self.logvar.exp() - 1 - self.logvar).sum(dim=(1, 2, 3))


def norm(channels: int, groups: int) -> nn.GroupNorm | nn.Identity:
    return nn.GroupNorm(groups, channels, eps=1e-6) if groups else nn.Identity()


def normed(norm: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The norm of x, then SiLU; x itself stays as it is, for the skip."""
    h = norm(x)
    return silu(h, own=h is not x)


class ResnetBlock(nn.Module):
    """Two convolutions with a skip: (B, in, H, W) -> (B, out, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, groups: int):
        super().__init__()
        self.norm1 = norm(in_channels, groups)
        self.conv1 = Conv3x3(in_channels, out_channels)
        self.norm2 = norm(out_channels, groups)
        self.conv2 = Conv3x3(out_channels, out_channels)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.nin_shortcut = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(normed(self.norm1, x))
        h = normed(self.norm2, h)  # on a line of its own, after which the input of the norm is free
        h = self.conv2(h)
        return plus(h, self.nin_shortcut(x))


class AttnBlock(nn.Module):
    """Single-head self-attention over all positions, with a skip."""

    def __init__(self, channels: int, groups: int):
        super().__init__()
        self.norm = norm(channels, groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (layer(h).flatten(2).transpose(1, 2) for layer in (self.q, self.k, self.v))  # (B, HW, C)
        h = attention(q, k, v, heads=1).transpose(1, 2).reshape(x.shape)
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """Halves the size; padded at the right and bottom only, as published."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Level(nn.Module):
    """The blocks of one resolution and, except at the last, a change of resolution."""

    def __init__(
        self, block: Sequence[nn.Module], downsample: nn.Module | None = None, upsample: nn.Module | None = None
    ):
        super().__init__()
        self.block = nn.ModuleList(block)
        if downsample is not None:
            self.downsample = downsample
        if upsample is not None:
            self.upsample = upsample

    def __iter__(self) -> Iterator[nn.Module]:
        """The layers one by one: a level that was called would keep its input, the largest there is, to its end."""
        for module in self.children():
            yield from module if isinstance(module, nn.ModuleList) else [module]


class Mid(nn.Module):
    def __init__(self, channels: int, groups: int, with_attention: bool):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups) if with_attention else nn.Identity()
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Image (B, in, H, W) -> moments (B, 2 z, H/f, W/f)."""

    def __init__(self, in_channels: int, widths: Sequence[int], blocks: int, z: int, groups: int, mid_attention: bool):
        super().__init__()
        self.conv_in = Conv3x3(in_channels, widths[0])
        self.down = nn.ModuleList()
        channels = widths[0]
        for i, width in enumerate(widths):
            block = [ResnetBlock(channels if j == 0 else width, width, groups) for j in range(blocks)]
            self.down.append(Level(block, downsample=Downsample(width) if i < len(widths) - 1 else None))
            channels = width
        self.mid = Mid(channels, groups, mid_attention)
        self.norm_out = norm(channels, groups)
        self.conv_out = Conv3x3(channels, 2 * z)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for layer in level:
                h = layer(h)
        return self.conv_out(normed(self.norm_out, self.mid(h)))


class Decoder(nn.Module):
    """Latent (B, z, h, w) -> image (B, out, h * f, w * f)."""

    def __init__(self, out_channels: int, widths: Sequence[int], blocks: int, z: int, groups: int, mid_attention: bool):
        super().__init__()
        channels = widths[-1]
        self.conv_in = Conv3x3(z, channels)
        self.mid = Mid(channels, groups, mid_attention)
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            block = [ResnetBlock(channels if j == 0 else width, width, groups) for j in range(blocks + 1)]
            levels.insert(0, Level(block, upsample=Upsample(width) if i > 0 else None))
            channels = width
        self.up = nn.ModuleList(levels)  # published order: up.0 is the finest, run last
        self.norm_out = norm(channels, groups)
        self.conv_out = Conv3x3(channels, out_channels)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            for layer in level:
                h = layer(h)
        return self.conv_out(normed(self.norm_out, h))


@dataclass(frozen=True)
class Shape:
    """Size of an encoder or a decoder, as described at `AutoencoderKL`."""

    patch: int
    channels: int
    channel_mult: Sequence[int]
    num_res_blocks: int
    mid_attention: bool
    norm_groups: int

    @property
    def factor(self) -> int:
        return self.patch * 2 ** (len(self.channel_mult) - 1)

    def args(self, image_channels: int, z_channels: int) -> tuple:
        """What `Encoder` and `Decoder` are given."""
        widths = [self.channels * m for m in self.channel_mult]
        channels = image_channels * self.patch**2
        return channels, widths, self.num_res_blocks, z_channels, self.norm_groups, self.mid_attention


class AutoencoderKL(nn.Module):
    """Maps images in [0, 1] to scaled latents and back; [-1, 1] is used only inside.

    Args:
        in_channels: image channels.
        patch: the networks see patches of patch x patch pixels as one position, which spares the levels that cost most
            and bring least; 1, every pixel, is what Stable Diffusion has.
        channels: width at the finest level.
        channel_mult: width of each level over `channels`; the factor f is patch * 2 ** (levels - 1).
        num_res_blocks: residual blocks per level in the encoder (one more in the decoder).
        z_channels: channels of the latent.
        scale_factor: latents are multiplied by it, so that their standard deviation is about 1.
        mid_attention: self-attention over all positions at the lowest resolution.
        norm_groups: groups of every GroupNorm; 0 leaves the norms out, with which a small network learns several times
            faster, but only at moderate learning rates.
        decoder: what the decoder has otherwise, by the names above: a decoder of patches costs less than half.

    Raises:
        ValueError: the decoder's factor is another.
    """

    packs = True  # layers are only called, so that `model.networks.packed` may replace them
    entry_points = ("posterior", "reconstruct")  # what calls the layers, instead of `forward`

    def __init__(
        self,
        in_channels: int = 3,
        patch: int = 1,
        channels: int = 128,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        z_channels: int = 4,
        scale_factor: float = 0.18215,
        mid_attention: bool = True,
        norm_groups: int = 32,
        decoder: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        self.z_channels, self.scale_factor = z_channels, scale_factor
        shape = Shape(patch, channels, channel_mult, num_res_blocks, mid_attention, norm_groups)
        its = replace(shape, **(decoder or {}))
        if shape.factor != its.factor:
            raise ValueError(f"the encoder's factor is {shape.factor}, the decoder's {its.factor}")
        self.patch, self.decoder_patch, self.factor = shape.patch, its.patch, shape.factor
        self.encoder = Encoder(*shape.args(in_channels, z_channels))
        self.decoder = Decoder(*its.args(in_channels, z_channels))
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1)
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1)
        # A new posterior starts almost deterministic; with unit noise, weak signals such as colour are learned late.
        nn.init.constant_(self.quant_conv.bias[z_channels:], -6.0)

    def posterior(self, image: Tensor) -> DiagonalGaussian:
        """q(z | image), before scaling; image (B, C, H, W) in [0, 1], H and W multiples of `factor`."""
        mean, logvar = self.quant_conv(self.encoder(self.to_patches(image))).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar.clamp(-30, 20))

    def reconstruct(self, z: Tensor) -> Tensor:
        """Unscaled latent (B, z, h, w) -> image (B, C, h f, w f) around [0, 1], not clamped."""
        return self.to_image(self.decoder(self.post_quant_conv(z)))

    def to_patches(self, image: Tensor) -> Tensor:
        """What the encoder sees: (B, C, H, W) in [0, 1] -> (B, C patch^2, H/patch, W/patch) in [-1, 1]."""
        return F.pixel_unshuffle(image * 2 - 1, self.patch)

    def to_image(self, patches: Tensor) -> Tensor:
        """What the decoder gives, (B, C patch^2, H/patch, W/patch) around [-1, 1], -> (B, C, H, W) around [0, 1]."""
        return (F.pixel_shuffle(patches, self.decoder_patch) + 1) / 2

    def encode(self, image: Tensor) -> Tensor:
        """E(image): image (B, C, H, W) in [0, 1] -> scaled latent (B, z, H/f, W/f), the posterior's mode."""
        return self.posterior(image).mean * self.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """D(z): scaled latent (B, z, h, w) -> image (B, C, h f, w f) around [0, 1], not clamped."""
        return self.reconstruct(z / self.scale_factor)
