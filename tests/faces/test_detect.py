"""Faces of a real photo with six of them, and what no face is."""

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from diffbir.faces.detect import MIRRORED, Detector
from diffbir.utils.cli import UserError
from diffbir.utils.config import ROOT
from diffbir.utils.image import read_rgb, to_tensor

GROUP = ROOT / "tests" / "faces" / "group.jpg"
# What facenet-pytorch 2.6.0, whose weights these are, finds (min_face_size=20, thresholds=[0.6, 0.7, 0.9]).
BOXES = [
    [7.50, 108.44, 83.27, 204.49],
    [99.95, 113.58, 175.50, 218.07],
    [190.45, 111.36, 256.66, 200.37],
    [267.74, 122.29, 323.89, 199.26],
    [324.57, 124.37, 389.50, 212.82],
    [411.09, 76.14, 492.36, 174.81],
]
POINTS = [  # eyes, nose, mouth of the second and the last, by the same
    [[119.21, 156.06], [153.78, 152.91], [138.24, 175.99], [122.63, 190.71], [156.50, 188.17]],
    [[429.30, 116.00], [462.45, 109.53], [446.53, 133.74], [436.19, 149.56], [471.33, 143.83]],
]


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return to_tensor(read_rgb(GROUP))


@pytest.fixture(scope="module")
def detector() -> Detector:
    return Detector()


@pytest.fixture(scope="module")
def faces(detector, photo) -> list:
    return detector(photo)


def between_eyes(face) -> float:
    return (face.points[0] - face.points[1]).norm().item()


def test_six_faces_where_another_library_finds_them(faces):
    np.testing.assert_allclose([face.box for face in faces], BOXES, atol=0.05)
    assert min(face.score for face in faces) > 0.99


def test_landmarks_are_near_those_of_the_other_library(faces):
    """Not equal: they are looked for once more in the final box."""
    for face, expected in zip([faces[1], faces[5]], POINTS, strict=True):
        distance = (face.points - torch.tensor(expected, dtype=torch.float64) - 0.5).norm(dim=1)
        assert distance.max() < 0.1 * between_eyes(face)


def test_a_mirrored_photo_has_the_same_faces(detector, photo, faces):
    mirrored = detector(photo.flip(-1))[::-1]
    assert len(mirrored) == len(faces)
    for face, other in zip(faces, mirrored, strict=True):
        points = other.points * torch.tensor([-1, 1]) + torch.tensor([photo.shape[-1], 0])
        assert (points[MIRRORED] - face.points).norm(dim=1).max() < 0.1 * between_eyes(face)


def test_a_photo_that_exif_turns_has_the_same_faces(detector, photo, faces):
    """Saved lying on its side, with the tag that says so."""
    upright = Image.fromarray(read_rgb(GROUP))
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    upright.transpose(Image.Transpose.ROTATE_90).save(file, "PNG", exif=exif)
    assert Image.open(file).size == upright.size[::-1]
    turned = detector(to_tensor(read_rgb(file)))
    assert [face.box for face in turned] == [face.box for face in faces]
    assert all(torch.equal(face.points, other.points) for face, other in zip(turned, faces, strict=True))


def test_smaller_faces_are_found_down_to_the_smallest_that_is_looked_for(detector, photo, faces):
    """At a third they are 19 to 27 pixels wide, at a sixteenth 4."""
    third = F.interpolate(photo[None], scale_factor=1 / 3, mode="area")[0]
    np.testing.assert_allclose([f.centre for f in detector(third)], [np.divide(f.centre, 3) for f in faces], atol=3)
    assert detector(F.interpolate(photo[None], scale_factor=1 / 16, mode="area")[0]) == []


def test_a_face_that_the_edge_cuts_is_found_and_its_box_reaches_out(detector, photo):
    left = detector(photo[..., 30:, 20:])[0]
    assert left.box[0] < 0 and left.box[2] > 40


def test_the_threshold_decides(photo):
    """At 0.7 leaves pass for a seventh face."""
    found = [len(Detector(threshold=threshold)(photo)) for threshold in (0.7, 0.9, 1.0)]
    assert found == [7, 6, 0]


@pytest.mark.parametrize("size", [(1, 1), (5, 300), (64, 64)])
def test_where_there_is_no_face_none_is_found(detector, size):
    for picture in (torch.zeros(3, *size), torch.rand(3, *size, generator=torch.Generator().manual_seed(0))):
        assert detector(picture) == []


def test_wrong_weights_and_thresholds_are_refused():
    with pytest.raises(UserError, match="alex"):
        Detector(ROOT / "weights" / "lpips" / "alex.safetensors")
    with pytest.raises(UserError, match="must lie in 0"):
        Detector(threshold=1.5)
