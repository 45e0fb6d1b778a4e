import math

import numpy as np
import pytest
import torch
from skimage import data
from skimage.color import rgb2ycbcr
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch.testing import assert_close
from torchmetrics.functional.image.lpips import _NoTrainLpips

from diffbir.utils.metrics import LPIPS, psnr, ssim


@pytest.fixture(scope="module")
def lpips() -> LPIPS:
    return LPIPS()


@pytest.fixture(params=["psnr", "ssim", "lpips"])
def metric(request, lpips: LPIPS):
    return {"psnr": psnr, "ssim": ssim, "lpips": lpips}[request.param]


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """(2, 3, 96, 128): two different scenes."""
    crops = [data.astronaut()[40:136, 160:288], data.coffee()[100:196, 200:328]]
    return torch.from_numpy(np.stack(crops)).permute(0, 3, 1, 2).float() / 255


@pytest.fixture(scope="module")
def noisy(photos: Tensor) -> Tensor:
    """The photos with noise of a different strength each, so that their scores differ."""
    noise = torch.randn(photos.shape, generator=torch.Generator().manual_seed(0))
    return (photos + torch.tensor([0.05, 0.15]).view(2, 1, 1, 1) * noise).clamp(0, 1)


def to_numpy(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def test_scores_are_per_image(metric, photos, noisy):
    scores = metric(noisy, photos)
    assert scores.shape == (2,)
    assert (scores[0] - scores[1]).abs() > 0.05
    assert_close(
        scores, torch.cat([metric(noisy[i : i + 1], photos[i : i + 1]) for i in range(2)]), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("metric, best", [("psnr", math.inf), ("ssim", 1.0), ("lpips", 0.0)], indirect=["metric"])
def test_equal_images_have_the_best_score(metric, best, photos):
    assert_close(metric(photos, photos.clone()), torch.full((2,), best), rtol=0, atol=1e-6)


def test_autocast_does_not_change_the_score(metric, photos, noisy):
    """bfloat16 convolutions would: on photos SSIM by up to 5e-2, LPIPS by up to 4e-3."""
    with torch.autocast("cpu", torch.bfloat16):
        scores = metric(noisy, photos)
    assert_close(scores, metric(noisy, photos), rtol=0, atol=0)


@pytest.mark.parametrize("metric, side", [("ssim", 10), ("lpips", 30)], indirect=["metric"])
def test_too_small_images_are_refused(metric, side):
    with pytest.raises(ValueError, match=f"64 x {side} are too small: each side needs {side + 1}"):
        metric(torch.zeros(1, 3, 64, side), torch.zeros(1, 3, 64, side))
    metric(torch.zeros(1, 3, 64, side + 1), torch.zeros(1, 3, 64, side + 1))


@pytest.mark.parametrize("shape", [(1, 3, 64, 64), (2, 1, 64, 64), (3, 64, 64)])
def test_shapes_that_would_broadcast_are_refused(metric, shape):
    with pytest.raises(ValueError, match="of one shape"):
        metric(torch.zeros(2, 3, 64, 64), torch.zeros(shape))


def test_psnr_of_a_constant_error():
    """An error of d everywhere has MSE d**2, so -20 log10(d) dB."""
    y = torch.full((2, 3, 8, 8), 0.5)
    x = y + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert_close(psnr(x, y), torch.tensor([20.0, 40.0]), rtol=0, atol=1e-3)


def test_psnr_matches_scikit_image(photos, noisy):
    expected = [
        peak_signal_noise_ratio(y, x, data_range=1) for x, y in zip(to_numpy(noisy), to_numpy(photos), strict=True)
    ]
    assert_close(psnr(noisy, photos), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-4)


def test_psnr_crop_leaves_out_exactly_the_border(photos):
    """Damage to the outer four pixels is invisible at crop 4 and visible at crop 3."""
    x = 1 - photos
    x[..., 4:-4, 4:-4] = photos[..., 4:-4, 4:-4]
    assert psnr(x, photos, crop=4).isinf().all()
    assert psnr(x, photos, crop=3).isfinite().all()
    with pytest.raises(ValueError, match="too small"):
        psnr(x, photos, crop=48)


@pytest.mark.parametrize("crop", [0, 4])
def test_ssim_matches_scikit_image(photos, noisy, crop):
    """Only float32 sums differ: 1e-5."""
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1, channel_axis=-1)
    inner = slice(crop, -crop or None)
    expected = [
        structural_similarity(x[inner, inner], y[inner, inner], **settings)
        for x, y in zip(to_numpy(noisy).astype(np.float64), to_numpy(photos).astype(np.float64), strict=True)
    ]
    assert_close(ssim(noisy, photos, crop), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-5)


def test_scores_of_the_luma_match_scikit_image(photos, noisy):
    """Its conversion is MATLAB's: 16 to 235."""
    x, y = (rgb2ycbcr(to_numpy(v).astype(np.float64))[..., 0] / 255 for v in (noisy, photos))
    expected = [peak_signal_noise_ratio(b, a, data_range=1) for a, b in zip(x, y, strict=True)]
    assert_close(psnr(noisy, photos, channel="y"), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-4)
    settings = dict(gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)
    x, y = (np.rint(v * 255) / 255 for v in (x, y))
    expected = [structural_similarity(a, b, **settings) for a, b in zip(x, y, strict=True)]
    # Some levels are rounded the other way in float32.
    assert_close(ssim(noisy, photos, channel="y"), torch.tensor(expected, dtype=torch.float32), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="rgb or y, not 'cb'"):
        psnr(noisy, photos, channel="cb")


@pytest.mark.parametrize("size", [(96, 128), (64, 64), (31, 45)])
def test_lpips_matches_torchmetrics(lpips, photos, noisy, size):
    """Their code and their heads; only the backbone's weights are ours, as theirs would be downloaded."""
    reference = _NoTrainLpips(net="alex", pnet_rand=True)
    theirs, ours = ([m for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (reference.net, lpips.features))
    assert len(theirs) == len(ours) == 5
    for target, source in zip(theirs, ours, strict=True):
        target.load_state_dict(source.state_dict())

    h, w = size
    x, y = noisy[..., :h, :w], photos[..., :h, :w]
    assert_close(lpips(x, y), reference(x, y, normalize=True).flatten(), rtol=0, atol=1e-5)
    assert_close(
        lpips(photos, photos.flip(0)), reference(photos, photos.flip(0), normalize=True).flatten(), rtol=0, atol=1e-5
    )


def test_lpips_backbone_is_the_published_alexnet(lpips):
    """Both ends of the first filter row of torchvision's `alexnet-owt`; another kernel layout differs there."""
    row = lpips.features[0].weight[0, 0, 0, [0, 1, 2, -3, -2, -1]]
    published = torch.tensor([1.1864e-01, 9.4069e-02, 9.5435e-02, 5.5822e-02, 2.1575e-02, 4.9963e-02])
    assert_close(row, published, rtol=1e-4, atol=0)


def test_lpips_gradient_reduces_the_distance(lpips, photos, noisy):
    """A small step against the gradient lowers the loss by step * |gradient|**2, to first order."""
    x = noisy.clone().requires_grad_()
    distance = lpips(x, photos).sum()
    (gradient,) = torch.autograd.grad(distance, x)
    step = 0.1
    drop = distance - lpips(noisy - step * gradient, photos).sum()
    assert_close(drop.detach(), step * gradient.square().sum(), rtol=0.1, atol=0)


def test_lpips_is_finite_where_all_channels_are_zero(lpips):
    """Flat light grey gives an all-zero pixel at the last ReLU, which has no direction to normalise to."""
    flat = torch.full((1, 3, 64, 64), 0.9, requires_grad=True)
    relu_5 = lpips.features((2 * flat - 1 - lpips.shift) / lpips.scale)
    assert (relu_5 == 0).all(dim=1).any()
    distance = lpips(flat, 1 - flat.detach())
    distance.sum().backward()
    assert distance.isfinite().all()
    assert flat.grad.isfinite().all() and flat.grad.any()


def test_lpips_is_frozen_and_leaves_the_random_state(lpips):
    state = torch.get_rng_state()
    fresh = LPIPS()
    assert torch.equal(state, torch.get_rng_state())
    assert not any(p.requires_grad for p in fresh.parameters())
    assert not fresh.training


def test_lpips_without_weights_says_what_is_missing(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"alex\.safetensors not found.*weights/lpips/README\.md"):
        LPIPS(tmp_path / "alex.safetensors")
