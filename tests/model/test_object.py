"""The restorer as an object: any picture in, the same kind out."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import inference
from diffbir import Restorer
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Cancelled, Progress
from diffbir.utils.cli import UserError
from diffbir.utils.image import read_rgb

FAST = {"steps": 2, "solver": "ddpm"}
README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    return Restorer.from_preset("mini", device="cpu")


@pytest.fixture(scope="module")
def crop() -> np.ndarray:
    return read_rgb(Path("inputs/demo/village-phone.jpg"))[:30, :41].copy()


@pytest.fixture(scope="module")
def pixels(crop, tmp_path_factory) -> np.ndarray:
    """What the command line makes of it."""
    folder = tmp_path_factory.mktemp("command")
    Image.fromarray(crop).save(folder / "crop.png")
    args = ["--input", folder / "crop.png", "--output", folder / "out", "--steps", 2, "--solver", "ddpm"]
    assert inference.main([*map(str, args), "--upscale", "1.5", "--seed", "1", "--device", "cpu"]) == 0
    return read_rgb(folder / "out" / "crop.png")


def test_every_kind_of_picture_gives_the_pixels_of_the_command_line(restorer, crop, pixels, tmp_path):
    options = {**FAST, "upscale": 1.5, "seed": 1}
    path = tmp_path / "crop.png"
    Image.fromarray(crop).save(path)
    for image in (restorer(path, **options), restorer(str(path), **options), restorer(Image.open(path), **options)):
        assert isinstance(image, Image.Image)
        assert np.array_equal(np.asarray(image), pixels)
    assert np.array_equal(restorer(crop, **options), pixels)
    for white, kind in ((65535, np.uint16), (1, np.float32), (1, np.float64)):
        array = (crop / 255 * white).astype(kind) if white == 1 else crop.astype(np.uint16) * 257
        result = restorer(array, **options)
        assert result.dtype == kind
        assert np.array_equal(np.rint(result / white * 255), pixels)
    tensor = torch.from_numpy(crop).permute(2, 0, 1) / 255
    result = restorer(tensor, **options)
    assert result.shape == (3, *pixels.shape[:2])
    assert np.array_equal((result * 255).round().byte().permute(1, 2, 0).numpy(), pixels)
    assert restorer(tensor[None], **options).shape == (1, 3, *pixels.shape[:2])


def test_a_list_of_mixed_kinds_and_sizes_equals_one_by_one_bit_for_bit(restorer, crop):
    tensor = torch.rand(2, 3, 17, 25, generator=torch.Generator().manual_seed(0))
    pictures = [crop, crop[:9, :20, :1] / 255, Image.fromarray(crop[5:, 3:]).convert("L"), tensor]
    together = restorer(pictures, **FAST)
    for one, picture in zip(together, pictures, strict=True):
        alone = restorer(picture, **FAST)
        assert type(one) is type(alone) is type(picture)
        assert np.array_equal(np.asarray(one), np.asarray(alone))
        assert np.shape(one) == np.shape(picture)
    assert together[1].dtype == np.float64
    assert together[2].mode == "L"


def test_a_result_can_be_trained_on(restorer):
    x = restorer(torch.rand(3, 16, 16), stage="1")
    (x * torch.ones((), requires_grad=True)).sum().backward()


def test_a_stream_restores_what_is_asked_for(restorer, crop):
    opened = []

    def pictures():
        for i in range(3):
            opened.append(i)
            yield crop[: 8 + i]

    stream = restorer.stream(pictures(), **FAST)
    assert opened == []
    assert next(stream).shape == (8, *crop.shape[1:])
    assert opened == [0]
    assert [len(image) for image in stream] == [9, 10]


def test_stages_are_pictures_too(restorer, crop):
    result = restorer(crop, stages=True, **FAST)
    assert np.array_equal(result.input, crop)
    assert np.array_equal(result.image, restorer(crop, **FAST))
    assert np.array_equal(result.stage1, restorer(crop, stage="1"))


def test_progress_is_told_step_by_step(restorer, crop):
    seen = []
    restorer([crop[:8], crop[:9]], progress=seen.append, steps=3)
    assert seen == [Progress(i, 2, step, 3) for i in range(2) for step in (1, 2, 3)]
    seen.clear()
    list(restorer.stream(iter([crop[:8]]), progress=seen.append, stage="1"))
    assert seen == [Progress(0, None, 0, 0)]


def test_progress_may_cancel(restorer, crop):
    seen = []

    def stop(progress: Progress) -> bool:
        seen.append(progress)
        return progress.step < 2

    with pytest.raises(Cancelled, match="picture 1, step 2 of 5"):
        restorer([crop, crop], progress=stop, steps=5)
    assert len(seen) == 2
    assert restorer(crop[:8], **FAST).shape == crop[:8].shape  # it is as good as before


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda r: r(np.zeros((8, 8, 3)), step=3), "unknown option 'step'; did you mean 'steps'?"),
        (lambda r: r.stream([], upscal=2), "unknown option 'upscal'; did you mean 'upscale'?"),
        (lambda r: r(np.zeros((8, 8, 3)), upscale=99), "upscale must be at most 16"),
        (lambda r: r.restore(torch.zeros(2, 3, 8, 8), seeds=[1]), "2 images need as many seeds, not 1"),
        (lambda r: r.restore(torch.zeros(1, 3, 8, 8, dtype=torch.uint8)), "floats in [0, 1], not torch.uint8"),
        (lambda r: r.restore(torch.full((1, 3, 8, 8), 200.0)), "this one in [200, 200]"),
        (lambda r: r.restore(torch.zeros(1, 8, 8, 3)), "with 3 channels, not (1, 8, 8, 3)"),
        (lambda r: r("no such.png"), "no such.png does not exist"),
        (lambda r: Restorer.from_preset("mini", precision="fp8"), "there is no precision 'fp8'"),
        (lambda r: Restorer.from_preset("mini", device="cuda:99"), "cuda:99 is not available"),
    ],
)
def test_bad_calls_are_refused_in_one_sentence(restorer, call, words):
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        call(restorer)
    assert "\n" not in str(caught.value)


def test_a_preset_may_be_a_path():
    path = Path("configs/inference/mini.yaml")
    assert load_preset(path) == load_preset("mini") == load_preset(str(path))
    assert load_preset("mini", stage1=Path("configs/stage1/mini.yaml")) == load_preset("mini", stage1="mini")


def test_the_example_of_the_readme_runs(tmp_path, monkeypatch, crop):
    (block,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    monkeypatch.chdir(tmp_path)
    for name in ("photo.jpg", "a.jpg", "b.png"):
        Image.fromarray(crop).save(tmp_path / name)
    names: dict = {"array": crop}
    exec(block, names)
    assert Image.open(tmp_path / "restored.png").size == (82, 60)
    assert names["restored"].shape == crop.shape
    assert len(names["sizes"]) == 2


def test_compiled_networks_compute_the_same(restorer, crop):
    """With the backend that only traces: it needs no compiler."""
    compiled = Restorer.from_preset("mini", device="cpu", stage="1", compiled={"backend": "eager"})
    assert compiled.stage1._compiled_call_impl is not None
    difference = compiled(crop, stage="1").astype(int) - restorer(crop, stage="1")
    assert abs(difference).max() <= 1
