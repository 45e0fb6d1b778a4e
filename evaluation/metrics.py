"""The metrics by name: what each computes exactly, and why one cannot be had here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from diffbir.evaluation.faces import Embedder, IdentityDistance
from diffbir.evaluation.protocols import METRICS, MORE, PYIQA, SET_METRICS, Protocol
from diffbir.utils.cli import UserError
from diffbir.utils.color import colour_error
from diffbir.utils.metrics import (
    DISTS,
    DISTS_WEIGHTS,
    LPIPS,
    LPIPS_VGG_WEIGHTS,
    LPIPS_WEIGHTS,
    LPIPSVGG,
    VGG16_WEIGHTS,
    WEIGHTS,
    psnr,
    ssim,
)
from diffbir.utils.naturalness import BRISQUE, BRISQUE_WEIGHTS, NIQE, NIQE_WEIGHTS
from diffbir.utils.versions import versions

INCEPTION_WEIGHTS = WEIGHTS / "pt_inception-2015-12-05-6726825d.pth"
FEW = 1000  # pictures below which FID and KID mean little


@dataclass(frozen=True)
class Metric:
    """One value for each picture.

    Args:
        title: of its column.
        variant: what exactly it is.
        lower: whether a lower value is better.
        reference: whether it compares with a reference.
        score: (result, reference), each (B, 3, H, W) in [0, 1] -> (B,); raises ValueError for pictures too small.
        weights: files that its values depend on.
    """

    title: str
    variant: str
    lower: bool
    reference: bool
    score: Callable[[Tensor, Tensor | None], Tensor]
    weights: tuple[Path, ...] = ()


@dataclass(frozen=True)
class SetMetric:
    """One value for a set of pictures against a set of references.

    Args:
        update: takes in (B, 3, H, W) in [0, 1], and whether they are references.
        compute: the value.
        reset: forgets the results, for those of another method; the references stay.
    """

    title: str
    variant: str
    update: Callable[[Tensor, bool], None]
    compute: Callable[[], float]
    reset: Callable[[], None]
    weights: tuple[Path, ...] = ()
    lower = True


def check(name: str) -> None:
    """Refuses what is no metric.

    Raises:
        UserError: with those that there are.
    """
    names = (*METRICS, *MORE, *SET_METRICS, *PYIQA)
    if name not in names and not name.startswith("pyiqa:"):
        raise UserError(f"there is no metric '{name}'; there are {', '.join(names)} and pyiqa:NAME")


def build(name: str, protocol: Protocol, device: torch.device, embedder: Embedder | None = None) -> Metric:
    """The metric of a name in METRICS, MORE or PYIQA, or of `pyiqa:NAME`.

    Args:
        embedder: of `identity`.

    Raises:
        UserError: its weights or package are missing, and how to get them.
    """
    if name in ("psnr", "ssim"):
        function = partial({"psnr": psnr, "ssim": ssim}[name], crop=protocol.crop, channel=protocol.channel)
        title = name.upper() + ("-Y" if protocol.channel == "y" else "")
        windows = "" if name == "psnr" else ", Gaussian window of 11 (sigma 1.5) inside the picture"
        rounded = " in 8 bits" if (name, protocol.channel) == ("ssim", "y") else ""
        channel = {"rgb": "RGB", "y": "Y of BT.601 (16 to 235)"}[protocol.channel]
        return Metric(title, f"{channel}{rounded}, border crop {protocol.crop}{windows}", False, True, function)
    if name == "ciede2000":
        return Metric("ΔE00", "CIEDE2000, mean over the pixels; sRGB, D65", True, True, colour_error)
    if name == "identity":
        if embedder is None:
            raise UserError("it needs a face embedder: --embedder FILE, TorchScript or ONNX")
        distance = IdentityDistance(embedder).to(device)
        return Metric("identity", f"1 - cosine, {embedder.describe()}", True, True, distance, (embedder.path,))
    if name in PYIQA or name.startswith("pyiqa:"):
        return _pyiqa(name.removeprefix("pyiqa:"), device)
    title, network, reference, weights = _OWN[name]
    module: nn.Module = network().to(device if device.type != "mps" or reference else "cpu")
    score = module if reference else lambda x, _: module(x)
    return Metric(title, module.variant, True, reference, score, weights)


# Name -> title, class, whether it needs a reference, files.
_OWN = {
    "lpips": ("LPIPS", LPIPS, True, (LPIPS_WEIGHTS,)),
    "lpips-vgg": ("LPIPS-VGG", LPIPSVGG, True, (LPIPS_VGG_WEIGHTS, VGG16_WEIGHTS)),
    "dists": ("DISTS", DISTS, True, (DISTS_WEIGHTS, VGG16_WEIGHTS)),
    "niqe": ("NIQE", NIQE, False, (NIQE_WEIGHTS,)),
    "brisque": ("BRISQUE", BRISQUE, False, (BRISQUE_WEIGHTS,)),
}


def _pyiqa(name: str, device: torch.device) -> Metric:
    try:
        import pyiqa
    except ImportError as error:
        raise UserError("it needs the package pyiqa, whose licence is non-commercial: pip install pyiqa") from error
    try:
        metric = pyiqa.create_metric(name, device=device)
    except Exception as error:  # an unknown name, or one of many ways in which a download fails
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"pyiqa cannot make it ({reason}); its weights come from the Hugging Face hub") from error
    reference = metric.metric_mode == "FR"

    def score(x: Tensor, y: Tensor | None) -> Tensor:
        return (metric(x, y) if reference else metric(x)).flatten()

    variant = f"pyiqa {versions(['pyiqa'])['pyiqa']}, {name}"
    return Metric(name.upper(), variant, bool(metric.lower_better), reference, score)


def build_set(name: str, count: int, device: torch.device, network: nn.Module | None = None) -> SetMetric:
    """FID or KID over `count` pictures, of results and of references each.

    Args:
        network: (B, 3, H, W) uint8 -> features (B, N); InceptionV3 if None.

    Raises:
        UserError: the package or the weights are missing, and how to get them; too few pictures.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import KernelInceptionDistance

    if count < 2:
        raise UserError("it needs two pictures at least")
    inception = network or _inception()
    size = min(FEW, count)
    common = {"feature": inception, "normalize": True, "reset_real_features": False}
    if name == "fid":
        metric = FrechetInceptionDistance(**common).to(device)
        variant = "FID"
    else:
        metric = KernelInceptionDistance(**common, subsets=100, subset_size=size).to(device)
        variant = f"KID x 1000, mean of 100 subsets of {size}"

    def update(x: Tensor, real: bool) -> None:
        metric.update((x * 255).round().byte(), real=real)

    def compute() -> float:
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the subsets
            value = metric.compute()
        return float(value) if name == "fid" else 1000 * float(value[0])

    features = "given features" if network else "InceptionV3 of torch-fidelity (TensorFlow's of 2015), 2048 features"
    weights = () if network else (INCEPTION_WEIGHTS,)
    return SetMetric(name.upper(), f"{variant}, {features}", update, compute, metric.reset, weights)


def _inception() -> nn.Module:
    if not INCEPTION_WEIGHTS.is_file():
        raise UserError(f"weights not found: {INCEPTION_WEIGHTS}; scripts/download_weights.py {INCEPTION_WEIGHTS.name}")
    try:
        import torch_fidelity  # noqa: F401, what torchmetrics' network is built from
    except ImportError as error:
        raise UserError("it needs the package torch-fidelity: pip install '.[evaluation]'") from error
    from torchmetrics.image.fid import NoTrainInceptionV3

    return NoTrainInceptionV3("inception-v3-compat", ["2048"], str(INCEPTION_WEIGHTS))
