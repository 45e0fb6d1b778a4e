import logging
import re
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from skimage import data
from torch.testing import assert_close
from torch.utils.data import DataLoader

from diffbir.dataset.fetch import ALLOW_PIPES
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.preflight import Recorded, quick_check, scan, throughput
from diffbir.dataset.sources.files import Files
from diffbir.dataset.sources.shards import write_shard
from diffbir.dataset.streams import StreamedPairs
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import instantiate, load_config
from diffbir.utils.image import write_png

RNG = np.random.default_rng(0)
SIZES = [(3, 1), (40, 30), (64, 70), (130, 512)]


@pytest.fixture
def photos(tmp_path) -> Path:
    for i, (height, width) in enumerate(SIZES):
        write_png(tmp_path / f"{i}.png", np.resize(data.astronaut(), (height, width, 3)))
    return tmp_path


def damage(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.fixture
def hundred(tmp_path) -> Path:
    """A hundred images of which one, 1 %, is cut off."""
    for i in range(100):
        write_png(tmp_path / f"{i:03d}.png", np.full((8, 8, 3), i, np.uint8))
    damage(tmp_path / "041.png")
    return tmp_path


# Unreadable images


def test_an_unreadable_image_fails_by_name(hundred):
    loader = DataLoader(ImagePairs(hundred, 8), 10)
    with pytest.raises(UserError, match=re.escape(str(hundred / "041.png"))):
        list(loader)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_command_says_so_in_one_sentence(hundred, workers, capsys):
    path = hundred / "041.png"
    path.write_text("words")
    load = entry_point(lambda: list(DataLoader(ImagePairs(path, 8), 1, num_workers=workers)))
    assert load() == 1
    assert capsys.readouterr().err == f"error: {path} is not an image that can be read here; replace or remove it\n"


@pytest.mark.parametrize("workers", [0, 2])
def test_a_skipped_image_leaves_its_place_empty_and_changes_nothing_else(hundred, workers, caplog):
    dataset = ImagePairs(hundred, 8, on_error="skip")
    batches = list(DataLoader(dataset, 10, sampler=range(100), num_workers=workers))
    bad = next(n for n in range(100) if dataset.number(n) == 41)
    assert [len(b["prompt"]) for b in batches] == [9 if k == bad // 10 else 10 for k in range(10)]
    shown = [round(v * 255) for b in batches for v in b["hq"][:, 0, 0, 0].tolist()]
    assert shown == [dataset.number(n) for n in range(100) if n != bad]
    if not workers:
        assert dataset.skipped == 1
        assert "skipped (1 so far in this loader process)" in caplog.text
        assert "041.png" in caplog.text


def test_a_batch_of_which_nothing_remains_is_an_error(hundred):
    dataset = ImagePairs(hundred / "041.png", 8, on_error="skip")
    with pytest.raises(UserError, match=r"none of the 2 images of a batch can be read.*041\.png.*--good-list"):
        dataset.__getitems__([0, 1])


def test_on_error_is_fail_or_skip(hundred):
    with pytest.raises(ValueError, match="'fail' or 'skip', not 'retry'"):
        ImagePairs(hundred, 8, on_error="retry")


# The scan


@pytest.mark.parametrize("workers", [0, 2])
def test_a_scan_finds_sizes_small_and_unreadable_images(photos, workers):
    damage(photos / "1.png")
    found = scan(Files(photos), workers)
    assert found.short.tolist() == [1, 0, 64, 130]
    assert found.readable.tolist() == [0, 2, 3]
    assert list(found.unreadable) == [1]
    assert str(photos / "1.png") in found.unreadable[1]
    assert found.below(64).tolist() == [0]
    assert found.below(65).tolist() == [0, 2]


def test_the_histogram_counts_every_image_once(photos):
    counts = {k: v for k, v in scan(Files(photos)).histogram().items() if v}
    assert counts == {"0 to 63": 2, "64 to 127": 1, "128 to 255": 1}
    assert scan(Files(photos)).histogram([0, 30])["30 and more"] == 3


def test_the_quick_check_tells_the_size_and_fails_by_name(photos, caplog):
    caplog.set_level(logging.INFO)
    quick_check(ImagePairs(photos, 32), 2)
    assert "4 images, 2.0 steps an epoch" in caplog.text
    assert not [r for r in caplog.records if r.levelno > logging.INFO]
    quick_check(ImagePairs(photos, 32), 16)
    assert "effective batch of 16" in caplog.text
    damage(photos / "0.png")
    with pytest.raises(UserError, match=re.escape(str(photos / "0.png"))):
        quick_check(ImagePairs(photos, 32), 2)
    quick_check(ImagePairs(photos, 32, on_error="skip"), 2)
    assert "will be skipped" in caplog.text


def test_the_quick_check_of_a_stream_reads_its_ends_and_fails_by_name(photos, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv(ALLOW_PIPES, "1")
    caplog.set_level(logging.INFO)
    content = (photos / "2.png").read_bytes()
    for name, samples in (("0", 3), ("1", 2), ("2", 0)):
        write_shard(tmp_path / f"{name}.tar", [(f"{i}", {"png": content}) for i in range(samples)])
    for urls in (f"{tmp_path}/{{0..1}}.tar", f"pipe:cat {tmp_path}/{{0..1}}.tar"):
        quick_check(StreamedPairs(urls, 32), 2)
        assert "2 shards, streamed" in caplog.text
    for urls, words in (
        (f"{tmp_path}/{{0..4}}.tar", r"3.tar does not exist \(2 of 5 shards\)"),
        (f"{tmp_path}/{{0..2}}.tar", r"no images in .*2.tar"),
        (f"pipe:cat {tmp_path}/{{0..3}}.tar", r"3.tar cannot be read"),
    ):
        with pytest.raises(UserError, match=words):
            quick_check(StreamedPairs(urls, 32, retries=0), 2)
        caplog.clear()
        quick_check(StreamedPairs(urls, 32, on_error="skip", retries=0), 2)
        assert re.search(f"will be skipped: .*{words}", caplog.text)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_throughput_is_that_of_the_dataset(hundred, workers):
    """Of a dataset that sleeps 5 ms an item: at most 200 a second."""
    import time

    class Slow(ImagePairs):
        def __getitem__(self, n: int) -> dict:
            time.sleep(0.005)
            return super().__getitem__(n)

    (hundred / "041.png").unlink()
    assert 20 < throughput(Slow(hundred, 8), 4, workers, batches=5) < 220


# What was drawn


def test_a_recorded_recipe_gives_the_same_pixels_and_tells_its_parameters():
    recipe = instantiate(load_config("configs/dataset/codeformer.yaml").degradation)
    recorded, hq = Recorded(recipe), data.astronaut()[:64, :64].astype(np.float32) / 255
    lq = recorded(hq, np.random.default_rng(7))
    assert_array_equal(lq, recipe(hq, np.random.default_rng(7)))
    assert [step.partition("(")[0] for step in recorded.drawn] == ["Blur", "Resize", "GaussianNoise", "Jpeg", "Resize"]
    assert recorded.drawn[0] == "Blur(kernel=41x41)"
    first = list(recorded.drawn)
    recorded(hq, np.random.default_rng(8))
    assert recorded.drawn != first


def test_small_images_become_crops(photos):
    item = ImagePairs(photos / "0.png", 32, flip=False)[0]
    assert item["hq"].shape == (3, 32, 32)
    assert_close(item["hq"], item["hq"].clamp(0, 1), rtol=0, atol=0)
