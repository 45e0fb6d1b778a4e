"""Training pairs per second on one core: our second-order degradation against a straightforward one, side by side.

The straightforward one is how such recipes are usually written in NumPy and OpenCV: float64 kernels padded to the
largest size, `cv2.filter2D`, float64 noise from `np.random`, a new array for every operation. Both read the same JPEG
photos, crop, mirror, degrade and make tensors, with the parameters of configs/dataset/realesrgan.yaml, in turn, so that
whatever else runs on the machine slows down both; CPU time is counted. That both draw from one distribution is tested
by Kolmogorov and Smirnov on statistics of the pairs.

Example:
    python benchmarks/data.py --input photos
"""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from scipy import stats
from scipy.special import j1
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments, machine
from diffbir.dataset.degradations.blur import RandomBlur, RandomSinc
from diffbir.dataset.degradations.noise import RandomNoise
from diffbir.dataset.degradations.recipes import SecondOrder
from diffbir.dataset.degradations.resize import OPENCV
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.sources.files import Files
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import instantiate, load_config

PACKAGES = ("numpy", "opencv-python", "torch", "pillow")
STATISTICS = {
    "mean": lambda hq, lq: lq.mean(),
    "deviation": lambda hq, lq: lq.std(),
    "high frequencies": lambda hq, lq: (lq.diff(dim=-1).square().mean() + lq.diff(dim=-2).square().mean()).sqrt(),
    "PSNR": lambda hq, lq: -10 * (lq - hq).square().mean().log10(),
}


# The straightforward implementation; images are (H, W, 3) float32 BGR in [0, 1]


def plain_pair(path: Path, size: int, recipe: SecondOrder) -> dict[str, torch.Tensor]:
    image = cv2.imread(str(path), cv2.IMREAD_COLOR).astype(np.float32) / 255
    top, left = (np.random.randint(n - size + 1) for n in image.shape[:2])
    hq = image[top : top + size, left : left + size]
    if np.random.uniform() < 0.5:
        hq = hq[:, ::-1]
    hq = np.ascontiguousarray(hq)
    return {key: plain_tensor(x) for key, x in {"hq": hq, "lq": plain_degrade(hq, recipe)}.items()}


def plain_tensor(image: NDArray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB).transpose(2, 0, 1)))


def plain_degrade(hq: NDArray, p: SecondOrder) -> NDArray:
    height, width = hq.shape[:2]
    scale = np.random.choice(p.scale)
    low = (round(height / scale), round(width / scale))

    x = plain_filter(hq, plain_kernel(p.blur_1))
    x = plain_resize(x, (height, width), p.resize_1.probs, p.resize_1.factor)
    x = plain_noise(x, p.noise_1)
    x = plain_jpeg(x, p.jpeg_1.quality)

    if np.random.uniform() < p.blur_2.prob:
        x = plain_filter(x, plain_kernel(p.blur_2))
    x = plain_resize(x, low, p.resize_2.probs, p.resize_2.factor)
    x = plain_noise(x, p.noise_2)
    compressed_last = np.random.uniform() < 0.5
    if not compressed_last:
        x = plain_jpeg(x, p.jpeg_2.quality)
    x = cv2.resize(x, low[::-1], interpolation=plain_mode())
    x = plain_filter(x, plain_last_sinc(p.sinc))
    if compressed_last:
        x = plain_jpeg(x, p.jpeg_2.quality)
    x = cv2.resize(np.clip(x, 0, 1), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.float32(np.clip((x * 255).round(), 0, 255) / 255)


def plain_kernel(p: RandomBlur) -> NDArray:
    largest = p.sizes[1]
    size = np.random.choice(np.arange(p.sizes[0], largest + 1, 2))
    if np.random.uniform() < p.sinc_prob:
        return plain_sinc(size, np.random.uniform(math.pi / (3 if size < 13 else 5), math.pi), largest)
    kind = np.random.choice(list(p.kinds), p=list(p.kinds.values()))
    sigma_x = sigma_y = np.random.uniform(*p.sigma)
    theta = 0.0
    if "aniso" in kind:
        sigma_y, theta = np.random.uniform(*p.sigma), np.random.uniform(-math.pi, math.pi)
    rotation = np.array([[math.cos(theta), -math.sin(theta)], [math.sin(theta), math.cos(theta)]])
    precision = np.linalg.inv(rotation @ np.diag([sigma_x**2, sigma_y**2]) @ rotation.T)
    axis = np.arange(size) - size // 2
    grid = np.stack(np.meshgrid(axis, axis), axis=-1)
    m = np.sum(grid @ precision * grid, axis=-1)
    beta = 1.0
    if "generalized" in kind or "plateau" in kind:
        low, high = p.beta_generalized if "generalized" in kind else p.beta_plateau
        beta = np.random.uniform(low, 1) if np.random.uniform() < 0.5 else np.random.uniform(1, high)
    kernel = 1 / (1 + m**beta) if "plateau" in kind else np.exp(-0.5 * m**beta)
    return np.pad(kernel / kernel.sum(), (largest - size) // 2)


def plain_sinc(size: int, cutoff: float, largest: int) -> NDArray:
    x, y = np.meshgrid(np.arange(size) - size // 2, np.arange(size) - size // 2)
    r = np.sqrt(x**2 + y**2)
    r[r == 0] = 1
    kernel = cutoff * j1(cutoff * r) / (2 * math.pi * r)
    kernel[size // 2, size // 2] = cutoff**2 / (4 * math.pi)
    return np.pad(kernel / kernel.sum(), (largest - size) // 2)


def plain_last_sinc(p: RandomSinc) -> NDArray:
    largest = p.sizes[1]
    if np.random.uniform() < p.prob:
        size = np.random.choice(np.arange(p.sizes[0], largest + 1, 2))
        return plain_sinc(size, np.random.uniform(math.pi / 3, math.pi), largest)
    pulse = np.zeros((largest, largest))
    pulse[largest // 2, largest // 2] = 1
    return pulse


def plain_filter(x: NDArray, kernel: NDArray) -> NDArray:
    return cv2.filter2D(x, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def plain_mode() -> int:
    return OPENCV[np.random.choice(["area", "bilinear", "bicubic"])]


def plain_resize(x: NDArray, base: tuple[int, int], probs: list[float], factor: list[float]) -> NDArray:
    direction = np.random.choice(["up", "down", "keep"], p=probs)
    by = {"up": np.random.uniform(1, factor[1]), "down": np.random.uniform(factor[0], 1), "keep": 1}[direction]
    return cv2.resize(x, (round(base[1] * by), round(base[0] * by)), interpolation=plain_mode())


def plain_noise(x: NDArray, p: RandomNoise) -> NDArray:
    grey = np.random.uniform() < p.grey_prob
    if np.random.uniform() < p.gaussian_prob:
        noise = np.random.randn(*x.shape[:2], 1 if grey else 3) * np.random.uniform(*p.sigma) / 255
    else:
        source = cv2.cvtColor(x, cv2.COLOR_BGR2GRAY)[..., None] if grey else x
        source = np.clip((source * 255).round(), 0, 255) / 255
        photons = 2 ** np.ceil(np.log2(max(len(np.unique(source)), 2)))
        noise = (np.random.poisson(source * photons) / photons - source) * np.random.uniform(*p.poisson_scale)
    return np.float32(np.clip(x + noise, 0, 1))


def plain_jpeg(x: NDArray, quality: list[int]) -> NDArray:
    image = (np.clip(x, 0, 1) * 255).round().astype(np.uint8)
    chosen = int(np.random.randint(quality[0], quality[1] + 1))
    _, data = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, chosen])
    return np.float32(cv2.imdecode(data, cv2.IMREAD_COLOR)) / 255


# The comparison


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    p.add_argument("--input", required=True, help="folder or list of photos; those below the crop size are left out")
    p.add_argument("--crop-size", type=int, default=512, help="pixels (default: %(default)s)")
    p.add_argument("--pairs", type=int, default=60, help="in each repeat (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=7, help="(default: %(default)s)")
    args = p.parse_args(argv)
    cv2.setNumThreads(1)
    torch.set_num_threads(1)
    np.random.seed(0)

    opencv = [f"recipes.second_order.params.{name}.params.published=false" for name in ("resize_1", "resize_2")]
    recipe = instantiate(load_config("configs/dataset/realesrgan.yaml", opencv).degradation, "degradation")
    source = Files(args.input)
    source.paths = [path for path in tqdm(source.paths, "sizes", leave=False) if short_side(path) >= args.crop_size]
    if not source.paths:
        raise UserError(f"no photo of {args.input} has a short side of {args.crop_size} pixels; lower --crop-size")
    pairs = ImagePairs(source, args.crop_size, recipe)

    both = ("straightforward", "ours")
    seconds = {key: np.zeros((args.repeats, 2)) for key in ("pairs", "degradation")}
    found = {name: [[], []] for name in STATISTICS}
    for n in tqdm(range(-5, args.repeats * args.pairs), unit="pair", leave=False):  # the first five warm up
        draw, repeat = max(n, 0), max(n, 0) // args.pairs
        path = source.paths[pairs.number(draw)]
        whole = ((plain_pair, path, args.crop_size, recipe), (pairs.__getitem__, draw))
        for who in (0, 1):
            item, spent = timed(*whole[who])
            hq = item["hq"].permute(1, 2, 0).contiguous().numpy()
            degrade = ((plain_degrade, hq, recipe), (recipe, hq, np.random.default_rng((1, draw))))
            _, alone = timed(*degrade[who])
            if n < 0:
                continue
            seconds["pairs"][repeat, who] += spent
            seconds["degradation"][repeat, who] += alone
            for name, statistic in STATISTICS.items():
                found[name][who].append(float(statistic(item["hq"], item["lq"])))

    side = args.crop_size
    print(f"\n| per second, {side}x{side} | {both[0]} | {both[1]} | ratio |\n|---|---|---|---|")
    for key, name in {"pairs": "pairs, from the JPEG file to tensors", "degradation": "degradations alone"}.items():
        rates = args.pairs / seconds[key]
        ratio = rates[:, 1] / rates[:, 0]
        cells = " | ".join(f"{rate:.1f}" for rate in np.median(rates, axis=0))
        print(f"| {name} | {cells} | {np.median(ratio):.2f} ({ratio.min():.2f} to {ratio.max():.2f}) |")
    print(f"\nMedians of {args.repeats} repeats with {args.pairs} pairs each, CPU time of one thread.")
    print(f"{machine.processor()};", machine.versions(*PACKAGES))
    print("\n| median over the pairs | straightforward | ours | p (Kolmogorov-Smirnov) |\n|---|---|---|---|")
    for name, (plain, ours) in found.items():
        print(f"| {name} | {np.median(plain):.4f} | {np.median(ours):.4f} | {stats.ks_2samp(plain, ours).pvalue:.2f} |")


def timed(f: Callable, *args: Any) -> tuple[Any, float]:
    """The result, and the CPU seconds that it took."""
    start = time.process_time()
    result = f(*args)
    return result, time.process_time() - start


def short_side(path: Path) -> int:
    with Image.open(path) as image:
        return min(image.size)


if __name__ == "__main__":
    sys.exit(main())
