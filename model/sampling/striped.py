"""The autoencoder over images of any size: strips of rows stream through its layers.

The result is that of the whole image, up to rounding. Colours cannot drift, because every GroupNorm has the statistics
of the whole image, and there are no seams, because convolutions borrow a row from the neighbouring strips. (Windows
with statistics of their own have neither property. Windows that wait for each other at every norm have both, but hold
as much as this does and compute their overlaps again and again.)

Only a norm must have seen everything before it can go on. There, and nowhere else, the activations of a whole image are
held, and they are given up strip by strip as those after the norm emerge: never more than a block's input and its inner
activation. Self-attention sees everything, too, but at the lowest resolution.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import singledispatch

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbir.model.networks.autoencoder import (
    AttnBlock,
    AutoencoderKL,
    Decoder,
    Downsample,
    Encoder,
    Level,
    Mid,
    ResnetBlock,
    normed,
)
from diffbir.model.networks.layers import Conv3x3, Upsample, plus
from diffbir.model.networks.packed import PackedConv2d
from diffbir.utils.memory import FirstThatFits, give_back

Strips = Iterator[Tensor]  # (B, C, rows, W), from top to bottom


@dataclass(frozen=True)
class Stripes:
    """How an image is cut.

    Args:
        pixels: of the image in a strip; no less than a row of the latent.
        home: where activations rest at norms; where they are computed if None.
        whole: pixels of the largest image that is not cut. One piece is a tenth faster, and takes more memory.
    """

    pixels: int
    home: torch.device | None = None
    whole: int = 0


CPU = torch.device("cpu")
TINY = 1e-12
LARGE = 1 << 28  # bytes: activations that are worth a tidy memory
PLANS = (Stripes(512**2, whole=1024**2), Stripes(512**2), Stripes(256**2, CPU), Stripes(128**2, CPU))


class StripedAutoencoder:
    """`encode` and `decode` of an autoencoder; an image no larger than a strip is computed in one piece.

    Args:
        plans: each for when the one before runs out of memory.
    """

    def __init__(self, autoencoder: AutoencoderKL, plans: Sequence[Stripes] = PLANS):
        self.autoencoder, self.fit = autoencoder, FirstThatFits(plans)

    def encode(self, image: Tensor) -> Tensor:
        """E(image): image (B, C, H, W) in [0, 1] -> scaled latent (B, z, H/f, W/f)."""
        model = self.autoencoder

        def run(stripes: Stripes) -> Tensor:
            h, w = (side // model.factor for side in image.shape[-2:])
            rows = model.factor * self.rows(h, w, stripes)
            if image.shape[-2] <= rows:
                return model.encode(image)
            strips = stream(model.encoder, map(model.to_patches, image.split(rows, dim=-2)), stripes.home)
            mean, _ = model.quant_conv(joined(strips)).chunk(2, dim=1)
            return mean * model.scale_factor

        return self.fit(run)

    def decode(self, z: Tensor) -> Tensor:
        """D(z): scaled latent (B, z, h, w) -> image (B, C, h f, w f) around [0, 1], not clamped."""
        model = self.autoencoder

        def run(stripes: Stripes) -> Tensor:
            rows = self.rows(*z.shape[-2:], stripes)
            if z.shape[-2] <= rows:
                return model.decode(z)
            latent = model.post_quant_conv(z / model.scale_factor)
            strips = stream(model.decoder, iter(latent.split(rows, dim=-2)), stripes.home)
            return model.to_image(joined(strips))

        return self.fit(run)

    def rows(self, height: int, width: int, stripes: Stripes) -> int:
        """Of a latent of this size, in a strip."""
        pixels_of_a_row = width * self.autoencoder.factor**2
        if height * pixels_of_a_row <= stripes.whole:
            return height
        return max(1, stripes.pixels // pixels_of_a_row)


def joined(strips: Strips) -> Tensor:
    """All of them in one piece; what they took on their way is free for others."""
    whole = torch.cat(list(strips), dim=-2)
    if whole.device.type == "cpu":
        give_back()
    return whole


@singledispatch
def stream(module: nn.Module, strips: Strips, home: torch.device | None) -> Strips:
    """`module(x)`, where x is given and the result is returned in strips; `home`: see `Stripes`."""
    raise TypeError(f"{type(module).__name__} cannot be computed in strips")


@stream.register
def encoder(module: Encoder, strips: Strips, home: torch.device | None) -> Strips:
    return head(module, chain([module.conv_in, *module.down, module.mid], strips, home), home)


@stream.register
def decoder(module: Decoder, strips: Strips, home: torch.device | None) -> Strips:
    return head(module, chain([module.conv_in, module.mid, *reversed(module.up)], strips, home), home)


@stream.register(Level)
@stream.register(Mid)
@stream.register(nn.ModuleList)
def in_order(module: nn.Module, strips: Strips, home: torch.device | None) -> Strips:
    return chain(module.children(), strips, home)


@stream.register
def identity(module: nn.Identity, strips: Strips, home: torch.device | None) -> Strips:
    return strips


@stream.register
def resnet(block: ResnetBlock, strips: Strips, home: torch.device | None) -> Strips:
    x = hold(block.norm1, strips, home)
    skipped = deque()

    def branch() -> Strips:
        for strip in x:
            skipped.append(block.nin_shortcut(strip).to(home or strip.device))
            yield normed(x.normalise, strip)

    h = hold(block.norm2, convolve(block.conv1, branch()), home)
    for strip in convolve(block.conv2, (normed(h.normalise, strip) for strip in h)):
        yield plus(strip, skipped.popleft().to(strip.device))


@stream.register
def attend(block: AttnBlock, strips: Strips, home: torch.device | None) -> Strips:
    strips = list(strips)
    yield from block(torch.cat(strips, dim=-2)).split([strip.shape[-2] for strip in strips], dim=-2)


@stream.register
def downsample(layer: Downsample, strips: Strips, home: torch.device | None) -> Strips:
    for strip in with_neighbours(strips, above=False):
        yield layer.conv(F.pad(strip, (0, 1, 0, 0)))


@stream.register
def upsample(layer: Upsample, strips: Strips, home: torch.device | None) -> Strips:
    for strip in with_neighbours(strips):
        yield layer.conv(strip, padding=(0, 1))


def chain(modules: Iterable[nn.Module], strips: Strips, home: torch.device | None) -> Strips:
    for module in modules:
        strips = stream(module, strips, home)
    return strips


def head(module: Encoder | Decoder, strips: Strips, home: torch.device | None) -> Strips:
    held = hold(module.norm_out, strips, home)
    yield from convolve(module.conv_out, (normed(held.normalise, strip) for strip in held))


@stream.register(Conv3x3)
@stream.register(PackedConv2d)
def convolve(conv: nn.Module, strips: Strips, home: torch.device | None = None) -> Strips:
    for strip in with_neighbours(strips):
        yield conv(strip, padding=(0, 1))


def with_neighbours(strips: Strips, above: bool = True) -> Strips:
    """Adds the first row of the strip after and, with `above`, the last of the one before; zeros beyond the image."""
    strip = next(strips)
    before = torch.zeros_like(strip[..., :1, :])
    while strip is not None:
        following = next(strips, None)
        after = torch.zeros_like(before) if following is None else following[..., :1, :]
        yield torch.cat([before, strip, after] if above else [strip, after], dim=-2)
        before, strip = strip[..., -1:, :].clone(), following


def hold(norm: nn.Module, strips: Strips, home: torch.device | None) -> "Held | Passing":
    """The activations before a norm, and how to normalise them."""
    return Passing(strips) if isinstance(norm, nn.Identity) else Held(norm, strips, home)


class Passing:
    """Without a norm nothing has to wait."""

    def __init__(self, strips: Strips):
        self.strips = strips

    def __iter__(self) -> Strips:
        return self.strips

    def normalise(self, strip: Tensor) -> Tensor:
        return strip


def variance_and_mean(x: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Of the groups of channels of (B, C, H, W): (B, groups) each.

    As a norm finds them on its way, eight times as fast on a CPU as `torch.var_mean`, for which channels that lie last
    have to be put in order.
    """
    B, C, H, W = x.shape
    # torch 2.6 takes no strip that was cut out of something larger.
    x = x.contiguous(memory_format=torch.channels_last if x.stride(1) == 1 else torch.contiguous_format)
    _, mean, deviation = torch.native_group_norm(x, None, None, B, C, H * W, groups, TINY)  # 1 / sqrt(variance + TINY)
    return (deviation**-2 - TINY).clamp(min=0), mean


class Held:
    """The activations before a GroupNorm, with the statistics of all of them; iterating gives them up one by one."""

    def __init__(self, norm: nn.GroupNorm, strips: Strips, home: torch.device | None):
        self.strips, moments = deque(), []
        for strip in strips:
            moments.append((strip.shape[-2], *variance_and_mean(strip.float(), norm.num_groups)))
            self.device, self.home = strip.device, home or strip.device
            self.strips.append(strip.to(self.home))
        if self.home.type == "cpu" and sum(strip.nbytes for strip in self.strips) > LARGE:
            give_back()
        rows, variances, means = zip(*moments, strict=True)
        share = torch.tensor(rows, device=self.device) / sum(rows)  # (strips,)
        means = torch.stack(means, dim=-1)  # (B, groups, strips)
        mean = (means * share).sum(-1, keepdim=True)
        variance = ((torch.stack(variances, dim=-1) + (means - mean) ** 2) * share).sum(-1, keepdim=True)
        # Of every channel, (B, C, 1, 1):
        scale = norm.weight.view(norm.num_groups, -1) / (variance + norm.eps).sqrt()
        shift = norm.bias.view(norm.num_groups, -1) - mean * scale
        self.scale, self.shift = scale.flatten(1)[..., None, None], shift.flatten(1)[..., None, None]

    def __iter__(self) -> Strips:
        while self.strips:
            yield self.strips.popleft().to(self.device)

    def normalise(self, strip: Tensor) -> Tensor:
        return torch.addcmul(self.shift, strip.float(), self.scale).to(strip.dtype)
