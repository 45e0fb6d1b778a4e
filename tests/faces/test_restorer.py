"""Whole photos with their faces, by the object and by the command. The networks are small, but nothing is left out."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import inference
from diffbir.faces.align import TEMPLATE
from diffbir.faces.detect import Detector
from diffbir.faces.restorer import FaceRestorer
from diffbir.folder.restorers import Faces, Restorers
from diffbir.model.options import Options
from diffbir.model.restorer import Restorer
from diffbir.utils.config import ROOT
from diffbir.utils.image import read_rgb, to_tensor
from scripts import align_faces

GROUP = ROOT / "tests" / "faces" / "group.jpg"
GREY = ROOT / "inputs" / "demo" / "harbour-1961-grey.png"
ONE = Options(stage="1")


class Striped(nn.Module):
    """A stage 1 that leaves a mark: fine stripes, which no matching of colours takes away."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 0.1 * (-1.0) ** (torch.arange(x.shape[-1]) // 8)).clamp(0, 1)


@pytest.fixture(scope="module")
def photo() -> torch.Tensor:
    return to_tensor(read_rgb(GROUP))[None]


@pytest.fixture(scope="module")
def plain() -> Restorer:
    return Restorer(defaults=ONE)


@pytest.fixture(scope="module")
def striped() -> Restorer:
    return Restorer(Striped(), defaults=ONE)


@pytest.fixture(scope="module")
def result(plain, striped, photo):
    return FaceRestorer(plain, striped).restore(photo)


def test_every_face_is_restored_by_the_model_for_faces_and_nothing_else_is(result, striped, photo):
    (faces,) = result.faces
    assert len(faces) == 6
    for face in faces:
        torch.testing.assert_close(face.restored, striped.restore(face.aligned[None]).image[0])
        (x, y), side = face.face.centre, face.face.box[2] - face.face.box[0]
        here = (..., slice(int(y - side / 4), int(y + side / 4)), slice(int(x - side / 4), int(x + side / 4)))
        assert (result.image - photo)[here].abs().mean() > 0.02
    assert torch.equal(result.image[..., 250:, :], photo[..., 250:, :])  # shirts and hands
    assert torch.equal(result.stage1, photo)


@pytest.mark.parametrize("batch", [1, 6])
def test_what_a_face_becomes_does_not_depend_on_the_batch(result, plain, striped, photo, batch):
    other = FaceRestorer(plain, striped, batch=batch).restore(photo)
    torch.testing.assert_close(other.image, result.image, rtol=0, atol=1e-5)


def test_only_the_face_nearest_to_the_centre(plain, striped, photo):
    (faces,) = FaceRestorer(plain, striped, only_center=True).restore(photo).faces
    assert len(faces) == 1 and faces[0].face.box[0] == pytest.approx(190.45, abs=0.1)


def test_without_a_face_the_background_comes_back(plain, striped):
    picture = to_tensor(read_rgb(GREY))[None]
    result = FaceRestorer(plain, striped).restore(picture)
    assert result.faces == [[]]
    assert torch.equal(result.image, picture)


def test_faces_that_would_lose_pixels_are_left_to_the_background(striped, plain, photo):
    """One face, cut out of the photo, has about 120 pixels aligned; twelve times that is more than twice 512."""
    restorer, part = FaceRestorer(plain, striped), photo[..., 90:240, 180:275]
    for upscale, kept in ((4, False), (12, True)):
        ((face,),) = restorer.restore(part, Options(stage="1", upscale=upscale)).faces
        assert (face.restored is None) == kept


def test_arrays_come_back_as_arrays_and_progress_is_told(plain, striped):
    steps = []
    array = read_rgb(GROUP)
    restored = FaceRestorer(plain, striped)(array, upscale=0.5, progress=lambda at: steps.append(at.step))
    assert restored.dtype == np.uint8 and restored.shape == (192, 250, 3)
    assert steps[-1] == 0  # of stage 1 alone there is no step


def test_faces_have_their_own_options_but_the_seed(plain, striped):
    restorer = FaceRestorer(plain, striped, options={"tile": 256})
    chosen = restorer.face_options(Options(stage="1", upscale=4, seed=5, tile=64))
    assert (chosen.tile, chosen.seed, chosen.upscale) == (256, 5, 1.0)
    assert FaceRestorer(plain).face_options(Options(tile=64, upscale=4)).tile == 64


def test_a_preset_with_a_task_for_faces_shares_all_but_its_stage_1(tmp_path):
    preset = tmp_path / "tasks.yaml"
    preset.write_text(
        f"include: {ROOT / 'configs/inference/mini.yaml'}\ntasks: {{sr: mini, face: mini, denoise: mini}}\n"
    )
    arguments = (str(preset), "auto", None, None, "fp32", False, ())
    restorers = Restorers(*arguments, device="cpu", faces=Faces(only_center=True))
    sr, denoise = restorers("sr"), restorers("denoise")
    assert restorers.build() is sr and denoise is not sr
    assert sr.faces is denoise.faces and sr.faces.one_step is sr.background.one_step
    assert len({id(r.stage1) for r in (sr.faces, sr.background, denoise.background)}) == 3


def test_the_command_restores_saves_and_counts_faces(tmp_path, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    rgb = Image.fromarray(read_rgb(GROUP)).crop((180, 90, 350, 230))
    exif = Image.Exif()
    exif[0x0112] = 8
    rgb.transpose(Image.Transpose.ROTATE_270).save(photos / "turned.png", exif=exif)
    Image.open(GREY).save(photos / "harbour.png")
    flags = ["--faces", "--only-center-face", "--save-faces", "--stage", "1", "--device", "cpu"]
    args = ["--input", str(photos), "--output", str(tmp_path / "out"), *flags]
    assert inference.main(args) == 0
    said = capsys.readouterr().err
    assert "1 face in 1 image; no face found in 1 image (harbour.png)" in said
    with Image.open(tmp_path / "out" / "turned.png") as restored:
        assert restored.size == (170, 140)
    saved = sorted(path.name for path in (tmp_path / "out" / "faces").iterdir())
    assert saved == ["turned.1.input.png", "turned.1.png"]
    assert all(Image.open(tmp_path / "out" / "faces" / name).size == (512, 512) for name in saved)
    lines = {line["output"]: line for line in map(json.loads, (tmp_path / "out" / "manifest.jsonl").open())}
    assert lines["harbour.png"]["faces"] == []
    (face,) = lines["turned.png"]["faces"]
    assert face["restored"] and 80 < face["box"][0] < 100  # the girl in red, where she is in the upright photo
    assert lines["turned.png"]["settings"]["faces"]["only_center"]


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--save-faces"], "--save-faces: it needs --faces"),
        (["--face-preset", "v1_face"], "--face-preset: it needs --faces"),
        (["--faces", "--face-threshold", "2"], "not between 0 and 1"),
    ],
)
def test_flags_that_make_no_sense_are_refused(flags, words, capsys):
    with pytest.raises(SystemExit):
        inference.main(["--input", "x", "--output", "y", *flags])
    assert words in capsys.readouterr().err


def test_a_detector_that_is_none_is_refused_before_anything_is_written(tmp_path, capsys):
    args = ["--input", str(GREY), "--output", str(tmp_path / "out"), "--faces", "--face-detector", "none.safetensors"]
    assert inference.main([*args, "--stage", "1", "--device", "cpu"]) == 1
    assert "none.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_script_cuts_the_faces_that_the_detector_finds(tmp_path, capsys):
    photos = tmp_path / "photos" / "trip"
    photos.mkdir(parents=True)
    (photos / "group.jpg").write_bytes(GROUP.read_bytes())
    (photos / "harbour.png").write_bytes(GREY.read_bytes())
    assert align_faces.main(["--input", str(photos.parent), "--output", str(tmp_path / "out"), "--device", "cpu"]) == 0
    assert "no face found in 1 of the photos: trip/harbour.png" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "out" / "trip").iterdir())
    assert names == [f"group_{i}.png" for i in range(1, 7)]
    face = to_tensor(read_rgb(tmp_path / "out" / "trip" / "group_2.png"))
    (again,) = [f for f in Detector()(face) if abs(f.centre[0] - 256) < 60 and f.box[2] - f.box[0] > 150]
    assert (again.points - TEMPLATE).norm(dim=1).max() < 0.15 * 126  # of the distance of the eyes
