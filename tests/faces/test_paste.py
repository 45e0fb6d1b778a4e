"""Pasting: what isn't a face stays to the bit, and no border is to be seen."""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.faces import steepness
from diffbir.faces.align import SIDE, TEMPLATE, inverse, scaled, similarity, warp
from diffbir.faces.detect import Detector
from diffbir.faces.paste import match_border, paste, soft_mask
from diffbir.utils.config import ROOT
from diffbir.utils.image import read_rgb, to_tensor

MASK = soft_mask()


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return to_tensor(read_rgb(ROOT / "tests" / "faces" / "group.jpg"))


@pytest.fixture(scope="module")
def maps(photo) -> list[torch.Tensor]:
    return [similarity(face.points) for face in Detector()(photo)]


def cut(photo: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    return warp(photo, inverse(matrix), (SIDE, SIDE))


def covered(photo: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """The mask in the photo, (H, W)."""
    return warp(MASK, matrix, photo.shape[-2:], "zeros")[0]


def test_the_mask_is_full_on_the_landmarks_and_zero_at_the_sides():
    x, y = TEMPLATE.long().T
    assert (MASK[0, y, x] == 1).all()
    frame = MASK.clone()
    frame[:, 4:-4, 4:-4] = 0
    assert frame.max() == 0
    steps = torch.cat([MASK.diff(dim=1).flatten(), MASK.diff(dim=2).flatten()]).abs()
    assert steps.max() < 1.5 / (0.38 * 196) * 1.05  # the steepest of a smoothstep over the ring


def test_faces_as_they_are_change_next_to_nothing_and_outside_nothing_at_all(photo, maps):
    """They are drawn twice, enlarged and shrunk again."""
    pasted = paste(photo, [(cut(photo, matrix), matrix) for matrix in maps])
    outside = torch.stack([covered(photo, matrix) for matrix in maps]).max(0).values == 0
    assert 0.3 < outside.float().mean() < 0.9
    assert torch.equal(pasted[:, outside], photo[:, outside])
    assert (pasted - photo).square().mean().sqrt() < 1 / 255


def test_no_face_is_no_change(photo):
    assert torch.equal(paste(photo, []), photo)


def test_a_face_of_another_colour_takes_that_of_its_surroundings(photo, maps):
    """A cast over the whole face vanishes; what differs within it stays."""
    face = cut(photo, maps[1])
    cast = face + torch.tensor([0.1, -0.05, 0.08]).view(3, 1, 1)
    inside = (face > 0.2).all(0) & (face < 0.8).all(0) & (MASK[0] > 0)  # where the cast wasn't cut off
    assert (match_border(cast, face, MASK) - face)[:, inside].abs().mean() < 0.01
    spot = face.clone()
    spot[:, 300:330, 240:270] *= 0.7
    assert (match_border(spot, face, MASK) - spot).abs().max() < 0.01


def test_no_border_is_seen_where_a_brighter_sharper_face_is_pasted(photo, maps):
    """Steps across the mask's border are the photo's own; with a hard edge, they would be a third larger."""
    for matrix in maps[1::2]:
        face = cut(photo, matrix)
        sharper = (face + 0.5 * (face - F.avg_pool2d(face, 9, 1, 4)) + 0.12).clamp(0, 1)
        assert 0.9 < steepness(paste(photo, [(sharper, matrix)]), photo, matrix) < 1.1
    hard = torch.where(covered(photo, maps[1]) > 0.15, photo + 0.12, photo)
    assert steepness(hard, photo, maps[1]) > 1.3


def test_overlapping_faces_do_not_depend_on_their_order_and_the_nearer_prevails(photo, maps):
    faces = [torch.full((3, SIDE, SIDE), value) for value in (0.2, 0.8)]
    grey, near = torch.full_like(photo, 0.5), maps[3:5]
    pairs = list(zip(faces, near, strict=True))
    pasted = paste(grey, pairs)
    torch.testing.assert_close(paste(grey, pairs[::-1]), pasted)
    first, second = (covered(photo, matrix) for matrix in near)
    assert ((first > 0) & (second > 0)).sum() > 100
    assert pasted.isfinite().all() and pasted.min() >= 0 and pasted.max() <= 1


def test_a_face_at_the_edge_and_one_outside_are_pasted_as_far_as_they_are_there(photo, maps):
    matrix = maps[0]
    for left in (60, 90, 400):
        part = photo[..., left:]
        moved = torch.cat([matrix[:, :2], matrix[:, 2:] + matrix[:, :1] * left], 1)
        assert paste(part, [(cut(part, moved), moved)]).shape == part.shape


def test_an_enlarged_photo_takes_the_face_in_the_same_place(photo, maps):
    """Uneven factors, as rounding of sizes makes them."""
    large = F.interpolate(photo[None], (800, 1000), mode="bicubic")[0].clamp(0, 1)
    matrix = scaled(maps[2], 1000 / photo.shape[2], 800 / photo.shape[1])
    changed = (paste(large, [(1 - cut(photo, maps[2]), matrix)]) - large).abs().amax(0)
    y, x = torch.nonzero(changed > 0, as_tuple=True)
    small = torch.nonzero(covered(photo, maps[2]) > 0)
    expected = (small.double().mean(0) + 0.5) * torch.tensor([800 / photo.shape[1], 1000 / photo.shape[2]])
    assert abs(y.double().mean() + 0.5 - expected[0]) < 3 and abs(x.double().mean() + 0.5 - expected[1]) < 3
