"""Full-reference image metrics: float32 NCHW RGB in [0, 1] in, one value per image (B,) out.

All of them compute in float32, also inside an autocast region: SSIM subtracts near-equal moments and LPIPS divides by
small norms, so half precision would change the numbers.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchmetrics.functional.image import structural_similarity_index_measure
from torchvision.models import alexnet

LPIPS_WEIGHTS = Path(__file__).parents[1] / "weights" / "lpips" / "alex.safetensors"


def psnr(x: Tensor, y: Tensor, crop: int = 0) -> Tensor:
    """Peak signal-to-noise ratio over RGB, in dB, for a data range of 1.

    Args:
        x: Images (B, 3, H, W) in [0, 1].
        y: Reference, same shape.
        crop: Pixels left out at each border.

    Returns:
        (B,); inf where the two images are equal.

    Raises:
        ValueError: The shapes differ, are not (B, 3, H, W), or the crop leaves no pixel.
    """
    _check_pair(x, y, min_side=2 * crop + 1)
    h, w = x.shape[-2:]
    error = (x.float() - y.float())[..., crop : h - crop, crop : w - crop]
    return -10 * error.square().mean(dim=(1, 2, 3)).log10()


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) over RGB: Gaussian window of 11 pixels, sigma 1.5, data range 1.

    The mean is over all pixels, the image being reflected at its borders; implementations that leave out the outer five
    pixels, as scikit-image does, differ in the third decimal.

    Args:
        x: Images (B, 3, H, W) in [0, 1], H and W at least 11.
        y: Reference, same shape.

    Returns:
        (B,); 1 where the two images are equal.

    Raises:
        ValueError: The shapes differ, are not (B, 3, H, W), or a side is below 11.
    """
    _check_pair(x, y, min_side=11)
    with torch.autocast(x.device.type, enabled=False):
        # The window's size follows from sigma: 2 * int(3.5 * sigma + 0.5) + 1 = 11.
        return structural_similarity_index_measure(x.float(), y.float(), sigma=1.5, data_range=1.0, reduction="none")


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
        with torch.autocast(x.device.type, enabled=False):
            pairs = zip(self.lins, self._unit_features(x), self._unit_features(y), strict=True)
            return sum(lin((f_x - f_y).square()).mean(dim=(1, 2, 3)) for lin, f_x, f_y in pairs)

    def _unit_features(self, x: Tensor) -> Iterator[Tensor]:
        """Activations after each ReLU, (B, C, h, w), scaled to unit length over the channels."""
        x = (2 * x.to(self.shift.dtype) - 1 - self.shift) / self.scale
        for layer in self.features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                # Without 1e-10 it is 0 / 0 where all channels are 0, as the last ReLU gives on some flat bright areas.
                yield x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10)


def _check_pair(x: Tensor, y: Tensor, min_side: int) -> None:
    if x.shape != y.shape or x.ndim != 4 or x.shape[1] != 3:
        raise ValueError(f"Expected two (B, 3, H, W) batches of one shape, got {tuple(x.shape)} and {tuple(y.shape)}.")
    if min(x.shape[-2:]) < min_side:
        raise ValueError(f"Images of {x.shape[-2]} x {x.shape[-1]} are too small: each side needs {min_side} pixels.")
