"""The hold-out that a training is validated on, unless it is given other photos."""

import logging
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from skimage.data import astronaut

from diffbir.dataset.data_module import DataModule
from diffbir.dataset.latents import CachedLatents, write
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.sources.files import Files
from diffbir.dataset.sources.split import Rest, hold_out
from diffbir.utils.cli import UserError
from diffbir.utils.config import instantiate, load_config
from diffbir.utils.image import write_png
from tests.runs import ROOT
from tests.scripts.test_dataset_scripts import run


def listed(folder: Path, names: list[str]) -> Files:
    folder.mkdir(exist_ok=True)
    (folder / "list.txt").write_text("\n".join(names))
    return Files(folder / "list.txt")


def keys(part) -> list[str]:
    return [part.key(i) for i in range(len(part))]


@pytest.mark.parametrize("n, count", [(2, 1), (19, 1), (99, 9), (320, 32), (1000, 32), (5000, 50), (120_000, 1000)])
def test_the_lowest_hashes_are_held_out_and_the_rest_is_trained_on(tmp_path, n, count):
    names = [f"{i:06d}.png" for i in range(n)]
    source = listed(tmp_path, names)
    trained, held = hold_out(source)
    lowest = set(sorted(names, key=lambda name: blake2b(name.encode(), digest_size=8).digest())[:count])
    assert keys(held) == [name for name in names if name in lowest]
    assert keys(trained) == [name for name in names if name not in lowest]


def test_the_split_is_the_same_wherever_the_photos_lie_and_in_any_order(tmp_path):
    names = [f"{i % 7}/{i}.png" for i in range(500)]
    _, held = hold_out(listed(tmp_path / "a", names))
    _, moved = hold_out(listed(tmp_path / "b", names[::-1]))
    assert keys(held) == keys(moved)[::-1]
    _, more = hold_out(listed(tmp_path / "c", [*names, *(f"new/{i}.png" for i in range(50))]))
    assert len(set(keys(held)) & set(keys(more))) >= 27  # of 32, about a tenth gives way to new ones


def test_every_part_of_a_set_is_as_likely_to_be_held_out(tmp_path):
    _, held = hold_out(listed(tmp_path, [f"{i:05d}.png" for i in range(10_000)]))
    counts = np.bincount(held.numbers // 1000, minlength=10)
    assert counts.sum() == 100
    assert stats.chisquare(counts).pvalue > 1e-4


def test_the_rest_of_five_millions_needs_no_list():
    class Millions:
        paired = False

        def __len__(self) -> int:
            return 5_000_000

        def name(self, i: int) -> str:
            return str(i)

    rest = Rest(Millions(), np.array([4_999_999, 0, 3, 4]))
    assert len(rest) == 4_999_996
    assert [rest.name(i) for i in (0, 1, 2, 3, len(rest) - 1)] == ["1", "2", "5", "6", "4999998"]


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(25):
        write_png(folder / f"{i}.png", np.full_like(astronaut()[:40, :40], i))
    return folder


def data_of(photos: Path, *overrides: str) -> DataModule:
    config = load_config(ROOT / "configs/train/mini/autoencoder.yaml", [f"photos={photos}", *overrides])
    return instantiate(config.data, "data")


@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_a_training_holds_photos_out_and_says_so(photos, tmp_path, kind, caplog):
    caplog.set_level(logging.INFO)
    if kind == "shards":
        assert run("make_shards", photos, "--output", tmp_path / "s", "--per-shard", 10) == 0
    data = data_of(photos if kind == "folder" else tmp_path / "s")
    shown = [
        {round(255 * item["hq"].mean().item()) for item in map(part.__getitem__, range(len(part)))}
        for part in (data.train, data.val)
    ]
    assert [len(part) for part in shown] == [23, 2]
    assert shown[0] | shown[1] == set(range(25))
    assert "2 photos are held out of training, by a hash of their names" in caplog.text


def test_with_photos_to_validate_on_nothing_is_held_out(photos, caplog):
    caplog.set_level(logging.INFO)
    data = data_of(photos, f"val_photos={photos}")
    assert (len(data.train), len(data.val)) == (25, 25)
    assert not caplog.text


def test_what_cannot_be_split_is_refused(photos, tmp_path):
    with pytest.raises(UserError, match=r"0.png is the only picture; .*val_photos="):
        data_of(photos / "0.png")
    write(tmp_path / "0.safetensors", torch.zeros(2, 8, 2, 2), torch.zeros(2, 4, 2, 2), ["", ""])
    with pytest.raises(UserError, match=r"CachedLatents cannot be split; .*val_photos="):
        DataModule(CachedLatents(tmp_path), ImagePairs(None, 32))
