"""Maps between photo and aligned face, and pictures drawn by them."""

import math

import numpy as np
import pytest
import torch

from diffbir.faces import align
from diffbir.faces.align import SIDE, TEMPLATE, apply, inverse, misfit, scaled, shifted, similarity, warp


def turned(scale: float, degrees: float, x: float, y: float) -> torch.Tensor:
    c, s = (scale * f(math.radians(degrees)) for f in (math.cos, math.sin))
    return torch.tensor([[c, -s, x], [s, c, y]], dtype=torch.float64)


def test_a_similarity_is_found_exactly_and_leaves_nothing():
    matrix = turned(3.5, 25, -40, 300)
    points = apply(inverse(matrix), TEMPLATE)
    torch.testing.assert_close(similarity(points), matrix)
    assert misfit(points) < 1e-9


def test_with_noise_it_solves_the_normal_equations():
    points = TEMPLATE / 7 + 5 * torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x, y, one, zero = *points.numpy().T, np.ones(5), np.zeros(5)
    rows = np.stack([np.c_[x, -y, one, zero], np.c_[y, x, zero, one]], 1).reshape(10, 4)
    (a, b, c, d), (rest,), *_ = np.linalg.lstsq(rows, TEMPLATE.numpy().reshape(10), rcond=None)
    np.testing.assert_allclose(similarity(points), [[a, -b, c], [b, a, d]])
    np.testing.assert_allclose(misfit(points), np.sqrt(rest / 5))


def test_mirrored_landmarks_do_not_fit():
    """No turn makes the left eye the right one, so a mirrored face isn't mistaken for an upright one."""
    assert misfit(TEMPLATE * torch.tensor([-1, 1])) > 50


def test_maps_from_enlarged_pictures_and_from_parts():
    matrix, points = turned(2, 10, 3, 4), torch.tensor([[8.0, 9.0], [1.0, 2.0]], dtype=torch.float64)
    expected = apply(matrix, points)
    torch.testing.assert_close(apply(scaled(matrix, 2, 3), points * torch.tensor([2, 3])), expected)
    torch.testing.assert_close(apply(shifted(matrix, 5, -6), points - torch.tensor([5, -6])), expected)


def test_no_change_draws_the_same_picture_and_whole_pixels_shift_it():
    picture = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    assert torch.allclose(warp(picture, turned(1, 0, 0, 0), (20, 30)), picture, atol=1e-6)
    part = warp(picture, turned(1, 0, 4, 7), (6, 8))
    assert torch.allclose(part, picture[:, 7:13, 4:12], atol=1e-6)


def test_outside_is_a_reflection_or_zero():
    picture = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
    drawn = warp(picture, turned(1, 0, -3, 0), (20, 10))
    assert torch.allclose(drawn[..., :3], picture[..., :3].flip(-1), atol=1e-6)
    assert warp(picture, turned(1, 0, -8, 0), (20, 4), "zeros").abs().max() == 0


def test_what_shrinks_is_antialiased():
    """Stripes of one pixel become grey; plain interpolation would leave them black and white."""
    stripes = (torch.arange(64) % 2).float().expand(1, 64, 64)
    small = warp(stripes, turned(4, 0, 0, 0), (16, 16))
    assert (small[..., 2:-2] - 0.5).abs().max() < 0.02


@pytest.mark.parametrize("factor, degrees", [(0.25, 0), (0.11, 30), (1.5, -40)])
def test_landmarks_come_to_lie_on_the_template(factor, degrees):
    """Each is a soft dot in a dark photo; its centre of mass is measured in the aligned face."""
    matrix = turned(factor, degrees, 40, 200 + 1500 * (factor > 1))  # all of it inside the photo
    points = apply(matrix, TEMPLATE)
    width, height = (points.max(0).values + SIDE * factor).int().tolist()  # so far that no reflection of a dot is seen
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    for point, target in zip(points, TEMPLATE, strict=True):
        dot = torch.exp(-((x - point[0]) ** 2 + (y - point[1]) ** 2) / 2 / (8 * factor) ** 2)
        face = align.align(dot.float().expand(3, -1, -1), points)[0].double()
        at = torch.arange(SIDE) + 0.5
        centre = torch.stack([(face.sum(0) * at).sum(), (face.sum(1) * at).sum()]) / face.sum()
        assert (centre - target).abs().max() < 0.25
