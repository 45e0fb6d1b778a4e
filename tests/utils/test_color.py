import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from diffbir.utils.color import ALIGNMENTS, adain, ciede2000, colour_error, lab, low_frequencies, wavelet
from tests.golden.fill import image

SHAPE = (1, 3, 48, 40)


@pytest.fixture(scope="module")
def content() -> Tensor:
    return image("colour_content", SHAPE)


@pytest.fixture(scope="module")
def style() -> Tensor:
    """Darker and flatter than the content, with another mean in each channel."""
    return 0.4 * image("colour_style", SHAPE) + torch.tensor([0.1, 0.3, 0.5]).view(1, 3, 1, 1)


@pytest.mark.parametrize("name", ["wavelet", "adain"])
def test_alignment_agrees_with_the_published_code(name, content, numerics_golden):
    aligned = ALIGNMENTS[name](content, image("colour_style", SHAPE))
    assert_close(aligned, numerics_golden[f"{name}_fix"], rtol=0, atol=2e-6)


def test_none_returns_the_content(content, style):
    assert ALIGNMENTS["none"](content, style) is content


@pytest.mark.parametrize("align", [wavelet, adain])
def test_alignment_with_itself_is_the_identity(align, content):
    assert_close(align(content, content), content, rtol=0, atol=1e-6)


@pytest.mark.parametrize("align", [wavelet, adain])
def test_a_constant_colour_shift_of_the_content_is_removed(align, content, style):
    shift = torch.tensor([0.2, -0.1, 0.3]).view(1, 3, 1, 1)
    assert_close(align(content + shift, style), align(content, style), rtol=0, atol=2e-6)


@pytest.mark.parametrize("align", [wavelet, adain])
def test_a_constant_colour_shift_of_the_style_is_taken_over(align, content, style):
    shift = torch.tensor([0.2, -0.1, 0.3]).view(1, 3, 1, 1)
    assert_close(align(content, style + shift), align(content, style) + shift, rtol=0, atol=2e-6)


@pytest.mark.parametrize("align", [wavelet, adain])
def test_images_of_a_batch_and_channels_are_aligned_on_their_own(align, content, style):
    contents, styles = torch.cat([content, content.flip(3)]), torch.cat([style, 1 - style.flip(1)])
    both = align(contents, styles)
    for i in range(2):
        for c in range(3):
            alone = align(contents[i : i + 1, c : c + 1], styles[i : i + 1, c : c + 1])
            assert_close(both[i : i + 1, c : c + 1], alone, rtol=0, atol=2e-6)


def test_wavelet_takes_details_of_the_content_and_colours_of_the_style(content, style):
    aligned = wavelet(content, style)
    assert_close(aligned - low_frequencies(style), content - low_frequencies(content), rtol=0, atol=2e-6)


@pytest.mark.parametrize("levels", [1, 3])
def test_low_frequencies_spread_a_point_over_the_reach_of_all_levels(levels):
    """(1 2 1) / 4 dilated by 1, 2, 4, ...: variances 1/2, 4/2, 16/2, ... of the blur add up; its sum stays 1."""
    x = torch.zeros(1, 1, 41, 41, dtype=torch.float64)
    x[..., 20, 20] = 1
    response = low_frequencies(x, levels)[0, 0]
    offset = torch.arange(41) - 20.0
    assert_close(response.sum().item(), 1.0)
    assert_close((response.sum(0) * offset**2).sum().item(), sum(4**i for i in range(levels)) / 2)
    assert_close(response, response.T, rtol=0, atol=1e-12)
    reach = 2**levels - 1
    assert response[20, 20 + reach] > 0
    assert response[:, 20 + reach + 1 :].abs().max() == 0


def test_low_frequencies_keep_a_flat_image_up_to_its_borders():
    x = torch.full((1, 3, 9, 13), 0.7)
    assert_close(low_frequencies(x), x, rtol=0, atol=1e-6)


def test_adain_gives_the_mean_and_deviation_of_the_style(content, style):
    """The deviation to 1e-3 because of the epsilon under the roots."""
    aligned = adain(content, style)
    assert_close(aligned.mean((2, 3)), style.mean((2, 3)), rtol=0, atol=1e-6)
    assert_close(aligned.std((2, 3)), style.std((2, 3)), rtol=1e-3, atol=0)


def test_adain_of_a_flat_content_is_the_mean_colour_of_the_style(style):
    flat = torch.full(SHAPE, 0.5)
    assert_close(adain(flat, style), style.mean((2, 3), keepdim=True).expand(SHAPE), rtol=0, atol=1e-4)


def test_differences_of_colours_are_those_of_the_standard():
    """Pairs of the table of Sharma, Wu and Dalal: hues across 0, greys, and the corners of the formula."""
    rows = torch.tensor(
        [
            [50.0, 2.6772, -79.7751, 50.0, 0.0, -82.7485, 2.0425],
            [50.0, 0.0, 0.0, 50.0, -1.0, 2.0, 2.3669],
            [50.0, 2.4900, -0.0010, 50.0, -2.4900, 0.0009, 7.1792],
            [50.0, 2.4900, -0.0010, 50.0, -2.4900, 0.0011, 7.2195],
            [50.0, 2.5, 0.0, 73.0, 25.0, -18.0, 27.1492],
            [60.2574, -34.0099, 36.2677, 60.4626, -34.1751, 39.4387, 1.2644],
            [6.7747, -0.2908, -2.4247, 5.8714, -0.0985, -2.2286, 0.6377],
            [2.0776, 0.0795, -1.1350, 0.9033, -0.0636, -0.5514, 0.9082],
        ],
        dtype=torch.float64,
    )
    x, y, expected = rows[:, :3, None, None], rows[:, 3:6, None, None], rows[:, 6]
    assert_close(ciede2000(x, y)[:, 0, 0], expected, rtol=0, atol=1e-4)
    assert_close(ciede2000(y, x)[:, 0, 0], expected, rtol=0, atol=1e-4)


def test_colour_error_agrees_with_scikit_image(content, style):
    color = pytest.importorskip("skimage.color")
    x, y = (torch.cat([image, torch.eye(3)[..., None].expand(1, 3, 3, 40), 0 * image], 2) for image in (content, style))
    y = torch.cat([y, torch.full((1, 3, 8, 40), 0.5)], 2)
    x = torch.cat([x, torch.rand(1, 3, 8, 40, generator=torch.Generator().manual_seed(0))], 2)
    labs = [color.rgb2lab(image[0].permute(1, 2, 0).double().numpy()) for image in (x, y)]
    assert_close(lab(x)[0].permute(1, 2, 0).double().numpy(), labs[0], rtol=0, atol=1e-3)
    assert_close(colour_error(x, y)[0].item(), color.deltaE_ciede2000(*labs).mean(), rtol=1e-4, atol=0)
    assert colour_error(x, x).item() == 0
