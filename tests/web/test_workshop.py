"""Restorations of the page, without the page."""

import shlex
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from diffbir.command import main
from diffbir.model.presets import PRESETS
from diffbir.model.restorer import Restorer
from diffbir.utils.cli import UserError
from diffbir.utils.image import read_rgb
from diffbir.web.models import Models
from diffbir.web.wish import Wish
from diffbir.web.workshop import INPUT, NOW, RESULT, STAGE1, Workshop

GROUP = Path(__file__).parents[1] / "faces" / "group.jpg"


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(["mini"], "cpu", "auto", offload=False)


@pytest.fixture
def shop(models, tmp_path):
    folder = tmp_path / "uploads"
    folder.mkdir()
    shop = Workshop(models, folder, megapixels=0.1)
    yield shop
    shop.close()


@pytest.fixture
def photo(tmp_path) -> Path:
    """With EXIF, as phones write it."""
    exif = Image.Exif()
    exif[0x010E] = "a village"
    path = tmp_path / "village.jpg"
    Image.fromarray(read_rgb("inputs/demo/village-phone.jpg")[:40, :51]).save(path, quality=80, exif=exif)
    return path


@pytest.fixture
def mini(models) -> Wish:
    return Wish(models.offer("mini"))


def test_a_result_is_the_command_lines_byte_for_byte(shop, photo, mini, tmp_path):
    wish = replace(mini, realism=40, upscale=1.5, seed=3, solver="ddim", steps=2)
    *_, last = shop.restore(photo, wish)
    words = ["--input", str(photo), "--output", str(tmp_path / "out"), "--device", "cpu", "--guidance-scale", "10500"]
    assert main([*words, "--upscale", "1.5", "--seed", "3", "--solver", "ddim", "--steps", "2"]) == 0
    assert last.result.read_bytes() == (tmp_path / "out" / "village.png").read_bytes()
    assert last.result.name == "village_restored.png"
    assert Image.open(last.result).getexif()[0x010E] == "a village"


def test_news_go_from_the_input_by_stage_1_and_the_steps_to_the_result(shop, photo, mini):
    news = list(shop.restore(photo, replace(mini, upscale=2, solver="ddpm", steps=4)))
    shares = [item.share for item in news]
    assert shares == sorted(shares)
    assert shares[-1] == 1
    assert [item.result is not None for item in news] == [False] * (len(news) - 1) + [True]
    first = next(i for i, item in enumerate(news) if STAGE1 in item.pictures)
    assert all(INPUT in item.pictures for item in news[first:])
    looks = {item.pictures[NOW] for item in news[first:-1]}
    assert len(looks) > 1  # stage 1, and a step at least
    pictures = [Image.open(path) for path in (*looks, *news[-1].pictures.values())]
    assert {picture.size for picture in pictures} == {(102, 80)}
    assert set(news[-1].pictures) == {INPUT, STAGE1, RESULT}
    shown = np.asarray(Image.open(news[-1].pictures[RESULT])).astype(float)
    assert np.abs(shown - read_rgb(news[-1].result)).mean() < 3  # JPEG


def test_a_preview_of_the_last_estimate_is_the_result():
    restorer = Restorer.from_preset("mini", device="cpu")
    options = restorer.options(solver="ddim", steps=2, residual=0.0, color="none", min_side=48, upscale=1)
    estimates = []
    images = torch.rand(1, 3, 37, 30, generator=torch.Generator().manual_seed(0))
    stages = []
    result = restorer.restore(images, options, on_step=lambda i, z_0: estimates.append(z_0), on_stage1=stages.append)
    assert torch.equal(stages[0], result.stage1)
    torch.testing.assert_close(restorer.preview(estimates[-1], (37, 30), options), result.image, rtol=0, atol=1e-6)
    assert not torch.allclose(restorer.preview(estimates[0], (37, 30), options), result.image, atol=1e-3)


def test_leaving_ends_the_work_within_a_step(shop, photo, mini):
    news = shop.restore(photo, replace(mini, solver="ddpm", steps=900))
    while "step 1" not in next(news).text:
        pass
    news.close()
    start = time.monotonic()
    shop.pool.submit(lambda: None).result()  # the one worker is free again
    assert time.monotonic() - start < 20  # 900 steps take longer


def test_leaving_while_others_are_restored_takes_no_turn(shop, photo, mini):
    first = shop.restore(photo, replace(mini, solver="ddpm", steps=900))
    next(first)
    waiting = shop.restore(photo, mini)
    first.close()
    assert [item.result for item in waiting][-1].is_file()


@pytest.mark.parametrize(
    "upscale, words", [(1, "wide.png would be 600x200"), (10, "result of small.png would be 300x")]
)
def test_large_pictures_and_results_are_refused_by_their_header(shop, mini, tmp_path, upscale, words):
    Image.new("RGB", (600, 200)).save(tmp_path / "wide.png")
    Image.new("RGB", (30, 40)).save(tmp_path / "small.png")
    path = tmp_path / ("wide.png" if upscale == 1 else "small.png")
    with pytest.raises(UserError, match=words):
        list(shop.restore(path, replace(mini, upscale=upscale)))


def test_a_file_that_is_no_picture_is_named_without_its_folder(shop, mini, tmp_path):
    path = tmp_path / "text.png"
    path.write_text("no picture")
    for act in (lambda: shop.look(path), lambda: list(shop.restore(path, mini))):
        with pytest.raises(UserError) as caught:
            act()
        assert str(caught.value).startswith("text.png is not an image")
        assert str(tmp_path) not in str(caught.value)


def test_wrong_options_are_refused_before_anything_is_computed(shop, mini, photo):
    with pytest.raises(UserError, match="steps must be at most"):
        list(shop.restore(photo, replace(mini, steps=2000)))


def test_faces_are_restored_as_the_command_line_does(models, mini, tmp_path):
    photo = tmp_path / "group.jpg"
    Image.open(GROUP).crop((0, 90, 99, 220)).save(photo)  # one face
    shop = Workshop(models, tmp_path)
    wish = replace(mini, faces=True)
    *_, faces = shop.restore(photo, wish)
    words = shlex.split(wish.command(str(photo)).replace("RESTORED", str(tmp_path / "out")))[1:]
    assert main([*words, "--device", "cpu"]) == 0
    assert faces.result.read_bytes() == (tmp_path / "out" / "group.png").read_bytes()
    *_, plain = shop.restore(photo, mini)
    assert not np.array_equal(read_rgb(plain.result), read_rgb(faces.result))
    shop.close()


def test_only_presets_whose_weights_are_here_are_offered(tmp_path):
    preset = tmp_path / "own.yaml"
    preset.write_text(f"include: {PRESETS / 'mini.yaml'}\nweights: {{unet: missing.safetensors}}\n")
    assert next(iter(Models(None, "cpu", "auto", offload=False).offers)) == "mini"
    with pytest.raises(UserError, match="weights not found"):
        Models([str(preset)], "cpu", "auto", offload=False)
    with pytest.raises(UserError, match="no preset '/etc/passwd' here"):
        Models(["mini"], "cpu", "auto", offload=False).offer("/etc/passwd")
