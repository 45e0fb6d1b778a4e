import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image
from skimage import data
from torch.testing import assert_close
from torch.utils.data import DataLoader

from diffbir.dataset.order import DrawSampler
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.sources.shards import Shards, expand_braces, index_shard, load_index, write_shard
from diffbir.utils.cli import UserError

RNG = np.random.default_rng(0)
PHOTO = data.astronaut()[:40, :50]
COUNTS = (3, 1, 7, 2, 5, 4, 9)  # samples of seven uneven shards


def png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, format="PNG")
    return stream.getvalue()


def picture(i: int) -> np.ndarray:
    """A picture whose first pixel says which one it is."""
    image = PHOTO.copy()
    image[:, :, 0] = i
    return image


@pytest.fixture
def shards(tmp_path) -> Path:
    i = 0
    for shard, count in enumerate(COUNTS):
        samples = []
        for _ in range(count):
            texts = json.dumps({"short": f"picture {i}", "long": None}).encode()
            samples.append((f"{i:04d}", {"png": png(picture(i)), "json": texts}))
            i += 1
        write_shard(tmp_path / f"{shard:03d}.tar", samples)
    return tmp_path


def whole(source: Path, **kwargs) -> ImagePairs:
    return ImagePairs(Shards(source, {"short": 1}), 40, crop="centre", flip=False, seed=3, **kwargs)


def which(item: dict) -> int:
    return round(item["hq"][0, 0, 0].item() * 255)


def test_samples_are_read_in_any_order(shards):
    source = Shards(shards, {"short": 1})
    assert len(source) == sum(COUNTS)
    for i in (30, 0, 3, 4, 17, 0):
        sample = source.read(i, RNG)
        assert_array_equal(sample.hq, picture(i))
        assert sample.prompt == f"picture {i}"


def test_a_folder_a_file_and_braces_name_shards(shards):
    assert len(Shards(shards / "002.tar")) == 7
    assert len(Shards(shards / "{001..003}.tar")) == 1 + 7 + 2
    assert len(ImagePairs(shards, 32)) == len(ImagePairs(str(shards / "{000..006}.tar"), 32)) == 31
    assert list(expand_braces("{0..1}/{08..10}")) == ["0/08", "0/09", "0/10", "1/08", "1/09", "1/10"]


def test_three_ranks_finish_an_epoch_of_seven_uneven_shards_with_equal_steps_and_nothing_twice(shards):
    """31 samples, batches of 2: five steps of 3 ranks are 30 draws, in which no sample occurs twice."""
    dataset, ranks, batch = whole(shards), 3, 2
    total = len(dataset) // (ranks * batch) * ranks * batch
    seen = []
    for rank in range(ranks):
        loader = DataLoader(dataset, batch, sampler=DrawSampler(total, 0, rank, ranks), num_workers=rank)
        batches = [[round(v * 255) for v in b["hq"][:, 0, 0, 0].tolist()] for b in loader]
        assert [len(b) for b in batches] == [2] * 5
        seen += [i for b in batches for i in b]
    assert len(seen) == len(set(seen)) == 30
    assert len({which(dataset[n]) for n in range(31)}) == 31


@pytest.mark.parametrize("ranks, workers, start", [(1, 0, 0), (1, 2, 12), (2, 1, 12), (3, 0, 0), (3, 2, 24)])
def test_a_draw_is_the_same_pair_for_any_ranks_workers_and_start(shards, ranks, workers, start):
    dataset = ImagePairs(Shards(shards, {"short": 0.5}), 16, lambda hq, rng: hq + rng.normal(0, 0.1), seed=3)
    for rank in range(ranks):
        sampler = DrawSampler(36, start, rank, ranks)
        loader = DataLoader(dataset, 2, sampler=sampler, num_workers=workers)
        items = [(hq, lq, p) for b in loader for hq, lq, p in zip(b["hq"], b["lq"], b["prompt"], strict=True)]
        for n, (hq, lq, prompt) in zip(sampler, items, strict=True):
            assert_close(hq, dataset[n]["hq"], rtol=0, atol=0)
            assert_close(lq, dataset[n]["lq"], rtol=0, atol=0)
            assert prompt == dataset[n]["prompt"]


def test_the_index_is_kept_beside_the_shard_and_made_again_when_the_shard_changes(shards):
    path = shards / "000.tar"
    first = load_index(path)
    cache = shards / "000.tar.index.npz"
    assert cache.exists()
    assert_array_equal(load_index(path), first)
    write_shard(path, [("a", {"png": png(picture(9))})])
    assert len(load_index(path)) == 1
    cache.write_bytes(b"PK damaged")
    assert_array_equal(load_index(path), index_shard(path))
    assert not list(shards.glob(".*.part"))


def test_members_group_as_webdataset_does(tmp_path):
    """By folder and name up to the first dot; other members are ignored, samples without an image left out."""
    members = {
        "./a/x.png": png(picture(1)),
        "./a/x.txt": b"first",
        "./b/x.PNG": png(picture(2)),
        "./b/x.cls": b"7",
        "./c.txt": b"lonely",
        "./d/long" + 120 * "n" + ".png": png(picture(3)),
    }
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    source = Shards(tmp_path, {"txt": 1})
    assert [source.read(i, RNG).hq[0, 0, 0] for i in range(len(source))] == [1, 2, 3]
    assert [source.read(i, RNG).prompt for i in range(3)] == ["first", "", ""]


def test_webdataset_reads_these_shards(shards):
    webdataset = pytest.importorskip("webdataset")
    samples = list(webdataset.WebDataset(str(shards / "002.tar"), shardshuffle=False))
    assert [json.loads(s["json"])["short"] for s in samples] == [f"picture {i}" for i in range(4, 11)]
    assert_array_equal(np.asarray(Image.open(io.BytesIO(samples[0]["png"]))), picture(4))


def test_a_shard_has_the_same_bytes_every_time(tmp_path):
    for name in ("a.tar", "b.tar"):
        write_shard(tmp_path / name, [("x", {"png": png(PHOTO), "txt": b"t"})])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


# Errors


def test_a_vanished_shard_is_named(shards):
    dataset = whole(shards, shuffle=False)
    (shards / "000.tar").unlink()
    with pytest.raises(UserError, match=rf"{re.escape(str(shards / '000.tar'))} does not exist any more"):
        dataset[0]
    assert which(dataset[3]) == 3
    with pytest.raises(UserError, match=r"000.tar does not exist \(1 of 3 shards\)"):
        Shards(shards / "{000..002}.tar")


def test_samples_of_a_vanished_shard_can_be_skipped(shards):
    dataset = whole(shards, shuffle=False, on_error="skip")
    (shards / "000.tar").unlink()
    assert [which(item) for item in dataset.__getitems__([0, 1, 2, 3, 4])] == [3, 4]
    assert dataset.skipped == 3


def test_a_damaged_sample_is_named(tmp_path):
    write_shard(tmp_path / "s.tar", [("a", {"png": png(PHOTO)}), ("b", {"png": png(PHOTO)[:900]})])
    source = Shards(tmp_path)
    source.read(0, RNG)
    with pytest.raises(UserError, match=r"s.tar: sample 1 is damaged"):
        source.read(1, RNG)


@pytest.mark.parametrize("kind", ["cut", "compressed", "text"])
def test_what_is_no_whole_tar_file_is_named(shards, kind):
    path = shards / "002.tar"
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:9000])
    elif kind == "compressed":
        with tarfile.open(path, "w:gz") as tar:
            tar.add(shards / "001.tar", "x.tar")
    else:
        path.write_text("not a tar file " * 100)
    with pytest.raises(UserError, match=rf"{re.escape(str(path))} is not a readable, uncompressed tar file"):
        Shards(shards)


def test_a_folder_without_shards_or_images_and_unknown_captions_are_named(shards, tmp_path_factory):
    empty = tmp_path_factory.mktemp("empty")
    with pytest.raises(UserError, match="no tar files in"):
        Shards(empty)
    write_shard(empty / "s.tar", [("a", {"txt": b"words"})])
    with pytest.raises(UserError, match="no images in the shards of"):
        Shards(empty)
    with pytest.raises(UserError, match=r"000.tar has no caption 'text'; it has short, long"):
        Shards(shards, {"text": 1})
