import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.fft import dctn
from skimage import data
from torch import Tensor
from torch.testing import assert_close

from diffbir.dataset.degradations.jpeg import jpeg
from diffbir.dataset.degradations.jpeg_torch import CHROMA, DCT, LUMA, jpeg_batch, quantise, tables
from tests.golden.fill import image as golden_image


@pytest.fixture(scope="module")
def photo() -> Tensor:
    """(1, 3, 96, 128) in [0, 1]."""
    return torch.from_numpy(data.astronaut()[40:136, 160:288]).permute(2, 0, 1)[None] / 255


def codec(image: Tensor, quality: int) -> Tensor:
    """libjpeg's result for (1, 3, H, W)."""
    array = np.ascontiguousarray(image[0].permute(1, 2, 0).numpy())
    return torch.from_numpy(np.ascontiguousarray(jpeg(array, quality))).permute(2, 0, 1)[None]


@pytest.mark.parametrize("quality", [30, 75, 95])
def test_the_published_variant_agrees_with_the_published_code(quality, numerics_golden):
    x = F.interpolate(golden_image("jpeg_in", (1, 3, 8, 8)), (64, 48), mode="bicubic").clamp(0, 1)
    compressed = jpeg_batch(x, torch.tensor([quality]), published=True)
    assert_close(compressed, numerics_golden[f"jpeg_q{quality}"], rtol=0, atol=2e-6)


@pytest.mark.parametrize("quality", [1, 10, 30, 75, 95, 100])
def test_it_differs_from_a_codec_by_less_than_a_level_on_average(quality, photo):
    """What is left comes from libjpeg's integer arithmetic, mostly from how it rounds halves of chroma."""
    difference = (jpeg_batch(photo, torch.tensor([quality])) - codec(photo, quality)).abs() * 255
    assert difference.mean() < 1
    assert difference.max() < 20


@pytest.mark.parametrize("quality", [10, 30, 75, 95])
def test_the_published_variant_is_near_a_codec(quality, photo):
    difference = jpeg_batch(photo, torch.tensor([quality]), published=True) - codec(photo, quality)
    assert difference.abs().mean() < 0.02


@pytest.mark.parametrize("size", [(1, 1), (7, 9), (17, 33), (90, 100)])
def test_any_size_is_compressed_like_a_codec_does(size, photo):
    x = photo[..., : size[0], : size[1]].contiguous()
    compressed = jpeg_batch(x, torch.tensor([40]))
    assert compressed.shape == x.shape
    assert (compressed - codec(x, 40)).abs().mean() < 2 / 255


@pytest.mark.parametrize("quality", [1, 5, 25, 49, 50, 51, 75, 90, 100])
def test_tables_are_those_in_the_file_of_a_codec(quality):
    """Pillow gives them in rows."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, format="JPEG", quality=quality)
    written = Image.open(file).quantization
    for base, table in zip((LUMA, CHROMA), (written[0], written[1]), strict=True):
        assert tables(base, torch.tensor([quality]), published=False).flatten().tolist() == list(table)


def test_the_transform_is_scipys_orthonormal_dct():
    block = np.random.default_rng(0).random((8, 8))
    dct = np.array(DCT)
    np.testing.assert_allclose(dct @ block @ dct.T, dctn(block, norm="ortho"), rtol=0, atol=1e-12)


def test_quantised_blocks_have_coefficients_that_are_multiples_of_the_table():
    plane = torch.rand(2, 1, 16, 24, generator=torch.Generator().manual_seed(0)) * 255 - 128
    table = tables(LUMA, torch.tensor([30, 80]), published=False)
    out = quantise(plane, table)
    for i in range(2):
        for top, left in ((0, 0), (8, 16)):
            block = out[i, 0, top : top + 8, left : left + 8].numpy()
            steps = dctn(block.astype(np.float64), norm="ortho") / table[i].squeeze().numpy()
            np.testing.assert_allclose(steps, np.rint(steps), rtol=0, atol=2e-4)
            source = plane[i, 0, top : top + 8, left : left + 8].numpy().astype(np.float64)
            assert np.abs(dctn(source, norm="ortho") / table[i].squeeze().numpy() - steps).max() < 0.5 + 2e-4


@pytest.mark.parametrize("published", [False, True])
def test_every_image_has_its_own_quality(published, photo):
    quality = torch.tensor([20, 60, 95])
    images = torch.cat([photo, photo.flip(-1), 1 - photo])
    together = jpeg_batch(images, quality, published)
    for i in range(3):
        assert_close(together[i : i + 1], jpeg_batch(images[i : i + 1], quality[i : i + 1], published))


@pytest.mark.parametrize("published", [False, True])
def test_worse_quality_means_more_error_and_the_best_almost_none(published, photo):
    error = [(jpeg_batch(photo, torch.tensor([q]), published) - photo).abs().mean().item() for q in (5, 20, 50, 80, 95)]
    assert error == sorted(error, reverse=True)
    grey = photo.mean(1, keepdim=True).expand_as(photo)  # chroma subsampling loses even at 100
    assert (jpeg_batch(grey, torch.tensor([100]), published) - grey).abs().mean() < 1 / 255


@pytest.mark.parametrize("published", [False, True])
def test_gradients_pass_straight_through_the_rounding(published):
    """With rounding taken as the identity, a grey image is passed on as it is, so the gradient of a sum is one each."""
    x = (0.3 + 0.4 * torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(0))).expand(1, 3, 32, 32)
    x = x.clone().requires_grad_()
    weight = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(1)).expand(1, 3, 32, 32)
    (jpeg_batch(x, torch.tensor([90]), published) * weight).sum().backward()
    # Of a change that is grey: colour passes as well, but is blurred by the subsampling of chroma.
    assert_close(x.grad.sum(1), weight.sum(1), rtol=0, atol=1e-4)


def test_values_out_of_range_are_clipped(photo):
    q = torch.tensor([50])
    assert_close(jpeg_batch(3 * photo - 1, q), jpeg_batch((3 * photo - 1).clamp(0, 1), q), rtol=0, atol=0)
