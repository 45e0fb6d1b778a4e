"""Full-reference image metrics: float32 NCHW RGB in [0, 1] in, one value per image (B,) out.

All of them compute in float32, also inside an autocast region: SSIM subtracts near-equal moments and LPIPS divides by
small norms, so half precision would change the numbers.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import alexnet, vgg16

from diffbir.utils.cli import UserError
from diffbir.utils.color import luma
from diffbir.utils.precision import full_precision

WEIGHTS = Path(__file__).parents[1] / "weights"
LPIPS_WEIGHTS = WEIGHTS / "lpips" / "alex.safetensors"
LPIPS_VGG_WEIGHTS = WEIGHTS / "lpips" / "vgg.safetensors"
DISTS_WEIGHTS = WEIGHTS / "dists" / "dists.safetensors"
VGG16_WEIGHTS = WEIGHTS / "vgg16.safetensors"


def psnr(x: Tensor, y: Tensor, crop: int = 0, channel: str = "rgb") -> Tensor:
    """Peak signal-to-noise ratio, in dB, for a data range of 1.

    Args:
        x: Images (B, 3, H, W) in [0, 1].
        y: Reference, same shape.
        crop: Pixels left out at each border.
        channel: 'rgb', the error over all three, or 'y', that of `utils.color.luma`.

    Returns:
        (B,); inf where the two images are equal.

    Raises:
        ValueError: The shapes differ, are not (B, 3, H, W), or the crop leaves no pixel.
    """
    _check_pair(x, y, min_side=2 * crop + 1)
    x, y = (_prepared(v, crop, channel) for v in (x, y))
    return -10 * (x - y).square().mean(dim=(1, 2, 3)).log10()


def ssim(x: Tensor, y: Tensor, crop: int = 0, channel: str = "rgb") -> Tensor:
    """Structural similarity (Wang et al. 2004): Gaussian window of 11 pixels, sigma 1.5, data range 1.

    The mean is over the windows that lie inside the image, as the authors do, and scikit-image, BasicSR and pyiqa; the
    latter sets windows with a negative covariance to 0, which makes no difference to three digits on restored photos.

    Args:
        x: Images (B, 3, H, W) in [0, 1], H and W at least 11 after the crop.
        y: Reference, same shape.
        crop: Pixels left out at each border.
        channel: 'rgb', the mean over all three, or 'y', that of `utils.color.luma` in 8 bits, as MATLAB and pyiqa do.

    Returns:
        (B,); 1 where the two images are equal.

    Raises:
        ValueError: The shapes differ, are not (B, 3, H, W), or a side is below 11 after the crop.
    """
    _check_pair(x, y, min_side=2 * crop + 11)
    with full_precision(x):
        x, y = (_prepared(v, crop, channel) for v in (x, y))
        if channel == "y":
            x, y = (v.mul(255).round().div(255) for v in (x, y))
        # The window's size follows from sigma: 2 * int(3.5 * sigma + 0.5) + 1 = 11.
        settings = {"sigma": 1.5, "data_range": 1.0, "reduction": "none", "return_full_image": True}
        _, values = structural_similarity_index_measure(x, y, **settings)
        return values[..., 5:-5, 5:-5].mean(dim=(1, 2, 3))  # the outer ones are those of a reflected image


def _prepared(x: Tensor, crop: int, channel: str) -> Tensor:
    """(B, 3, H, W) -> (B, C, H - 2 crop, W - 2 crop), float32."""
    if channel not in ("rgb", "y"):
        raise ValueError(f"channel is rgb or y, not {channel!r}")
    h, w = x.shape[-2:]
    x = x.float()[..., crop : h - crop, crop : w - crop]
    return luma(x) if channel == "y" else x


class LPIPS(nn.Module):
    """Learned perceptual distance (Zhang et al. 2018), version 0.1 with AlexNet.

    Frozen, yet differentiable with respect to both images, so it also serves as a training loss. Written here because
    the public packages download the backbone when constructed. A module that holds one must keep its parameters out of
    its own `state_dict`: they come from `weights` and don't belong in checkpoints.

    Args:
        weights: safetensors file with the five convolutions and the five heads.

    Raises:
        FileNotFoundError: `weights` does not exist.
    """

    variant = "LPIPS v0.1, AlexNet"
    min_side = 31  # below it, the second max-pool of AlexNet has less than one 3 x 3 window

    def __init__(self, weights: str | Path = LPIPS_WEIGHTS) -> None:
        super().__init__()
        if not Path(weights).is_file():
            raise FileNotFoundError(
                f"LPIPS weights {weights} not found: restore them as weights/lpips/README.md describes."
            )
        # Built on meta: no 61 M parameters to initialise, and the global random state stays as it was.
        with torch.device("meta"):
            self.features = alexnet(weights=None).features[:12]  # up to the fifth ReLU
            self.lins = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False) for c in (64, 192, 384, 256, 256))
        self.load_state_dict(load_file(weights), assign=True)
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each image to its reference, >= 0 and 0 for equal images.

        Args:
            x: Images (B, 3, H, W) in [0, 1], H and W at least 31.
            y: Reference, same shape.

        Returns:
            (B,).

        Raises:
            ValueError: The shapes differ, are not (B, 3, H, W), or a side is below 31.
        """
        _check_pair(x, y, self.min_side)
        with full_precision(x):
            pairs = zip(self.lins, self._unit_features(x), self._unit_features(y), strict=True)
            return sum(lin((f_x - f_y).square()).mean(dim=(1, 2, 3)) for lin, f_x, f_y in pairs)

    def _unit_features(self, x: Tensor) -> Iterator[Tensor]:
        """The five maps, (B, C, h, w), scaled to unit length over the channels."""
        for f in self.maps(x):
            # Without 1e-10 it is 0 / 0 where all channels are 0, as the last ReLU gives on some flat bright areas.
            yield f / (torch.linalg.vector_norm(f, dim=1, keepdim=True) + 1e-10)

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        """Activations after each ReLU, (B, C, h, w)."""
        x = (2 * x.to(self.shift.dtype) - 1 - self.shift) / self.scale
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                yield x


class VGG16(nn.Module):
    """The convolutions of VGG16, trained on ImageNet (Simonyan and Zisserman 2015): frozen, differentiable.

    Args:
        weights: safetensors file with the keys of torchvision's `vgg16().features`.
        pool: what halves the size between the stages; None is max-pooling, as trained.

    Raises:
        UserError: `weights` does not exist.
    """

    widths = (64, 128, 256, 512, 512)

    def __init__(self, weights: str | Path | None = None, pool: nn.Module | None = None) -> None:
        super().__init__()
        weights = Path(weights or VGG16_WEIGHTS)
        if not weights.is_file():
            raise UserError(f"weights not found: {weights}; make them with: python scripts/convert_weights.py --vgg16")
        with torch.device("meta"):
            features = vgg16(weights=None).features[:30]  # up to the last ReLU
        state = {name: value.float() for name, value in load_file(weights).items()}
        features.load_state_dict(state, assign=True)
        pool = pool or nn.MaxPool2d(2)
        layers = [pool if isinstance(layer, nn.MaxPool2d) else layer for layer in features]
        ends = [i for i, layer in enumerate(layers) if layer is pool] + [len(layers)]
        self.stages = nn.ModuleList(nn.Sequential(*layers[a:b]) for a, b in zip([0, *ends], ends, strict=False))
        for layer in self.modules():
            if isinstance(layer, nn.ReLU):
                layer.inplace = False  # the maps before them are needed for gradients
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [0, 1] -> the last map of each of the five stages, (B, C_i, H / 2^i, W / 2^i)."""
        x, maps = (x - self.mean) / self.std, []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return maps


class LPIPSVGG(LPIPS):
    """Learned perceptual distance (Zhang et al. 2018), version 0.1 with VGG16.

    Args:
        weights: safetensors file with the five heads.
        vgg16: see `VGG16`, whose normalisation is that of LPIPS.

    Raises:
        UserError: `vgg16` does not exist.
    """

    variant = "LPIPS v0.1, VGG16"
    min_side = 16

    def __init__(self, weights: str | Path = LPIPS_VGG_WEIGHTS, vgg16: str | Path | None = None) -> None:
        nn.Module.__init__(self)
        self.features = VGG16(vgg16)
        self.lins = nn.ModuleList(nn.Conv2d(c, 1, 1, bias=False, device="meta") for c in VGG16.widths)
        self.lins.load_state_dict(load_file(weights), assign=True)
        self.requires_grad_(False).eval()

    def maps(self, x: Tensor) -> Iterator[Tensor]:
        yield from self.features(x.float())


class L2Pool(nn.Module):
    """Halves the size without aliasing: the root of the blurred squares (Henaff and Simoncelli 2016)."""

    def __init__(self) -> None:
        super().__init__()
        window = torch.hann_window(5, periodic=False)[1:-1]
        self.register_buffer("kernel", torch.outer(window, window) / window.sum() ** 2, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        channels = x.shape[1]
        kernel = self.kernel.to(x.dtype).expand(channels, 1, 3, 3)
        return (F.conv2d(x.square(), kernel, stride=2, padding=1, groups=channels) + 1e-12).sqrt()


class DISTS(nn.Module):
    """Deep image structure and texture similarity (Ding et al. 2020, https://arxiv.org/abs/2004.07728, equation 8).

    Frozen, differentiable with respect to both images. Under autocast the features are computed in its precision (as a
    loss they are most of the work), the statistics in float32 all the same.

    Args:
        weights: safetensors file with `alpha` and `beta`, (1475,): of the image's and the five stages' channels.
        vgg16: see `VGG16`.
    """

    variant = "DISTS, VGG16"
    min_side = 16

    def __init__(self, weights: str | Path = DISTS_WEIGHTS, vgg16: str | Path | None = None) -> None:
        super().__init__()
        self.features = VGG16(vgg16, L2Pool())
        for name, value in load_file(weights).items():
            self.register_buffer(name, value.float(), persistent=False)
        self.requires_grad_(False).eval()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Distance of each image to its reference, 0 for equal images: (B,).

        Args:
            x: Images (B, 3, H, W) in [0, 1], H and W at least 16.
            y: Reference, same shape.

        Raises:
            ValueError: The shapes differ, are not (B, 3, H, W), or a side is below 16.
        """
        _check_pair(x, y, self.min_side)
        x, y = x.float(), y.float()
        maps = list(zip([x, *self.features(x)], [y, *self.features(y)], strict=True))
        with full_precision(x):
            pairs = (self.similarities(a.float(), b.float()) for a, b in maps)
            texture, structure = map(torch.cat, zip(*pairs, strict=True))
            total = self.alpha.sum() + self.beta.sum()
            return 1 - (self.alpha @ texture + self.beta @ structure) / total

    @staticmethod
    def similarities(x: Tensor, y: Tensor, c: float = 1e-6) -> tuple[Tensor, Tensor]:
        """Of means (texture) and of correlations (structure) of every channel: (C, B) each."""
        mean_x, mean_y = x.mean(dim=(2, 3)), y.mean(dim=(2, 3))
        var_x, var_y = (v.var(dim=(2, 3), correction=0) for v in (x, y))
        covariance = (x * y).mean(dim=(2, 3)) - mean_x * mean_y
        texture = (2 * mean_x * mean_y + c) / (mean_x**2 + mean_y**2 + c)
        return texture.T, ((2 * covariance + c) / (var_x + var_y + c)).T


def _check_pair(x: Tensor, y: Tensor, min_side: int) -> None:
    if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"Expected two (B, 3, H, W) batches of one shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    if min(x.shape[-2:]) < min_side:
        raise ValueError(f"Images of {x.shape[-2]} x {x.shape[-1]} are too small: each side needs {min_side} pixels.")
