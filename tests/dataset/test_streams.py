import itertools
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data
from torch.utils.data import DataLoader

from diffbir.dataset.sources.shards import write_shard
from diffbir.dataset.streams import StreamedPairs
from diffbir.utils.cli import UserError
from diffbir.utils.image import write_png

pytest.importorskip("webdataset")
COUNTS = (3, 1, 7, 2, 5, 4, 9)
TOTAL = sum(COUNTS)


def write(folder: Path, counts: tuple[int, ...]) -> None:
    i = 0
    for shard, count in enumerate(counts):
        samples = []
        for _ in range(count):
            image = data.astronaut()[:24, :30].copy()
            image[:, :, 0] = i
            write_png(folder / "image.png", image)
            samples.append((f"{i:04d}", {"png": (folder / "image.png").read_bytes(), "txt": f"{i}".encode()}))
            i += 1
        write_shard(folder / f"{shard:03d}.tar", samples)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write(folder, COUNTS)
    return folder


def stream(folder: Path, last: int = 6, **kwargs) -> StreamedPairs:
    urls = f"{folder}/{{000..{last:03d}}}.tar"
    options = {
        "crop_size": 16,
        "degradation": lambda hq, rng: hq + rng.normal(0, 0.1),
        "captions": {"txt": 1},
        "seed": 3,
    }
    return StreamedPairs(urls, **{**options, **kwargs})


def take(loader, count: int) -> list:
    return list(itertools.islice(loader, count))


def prompts(items) -> list[int]:
    return [int(item["prompt"]) for item in items]


def test_an_epoch_has_every_sample_once_and_epochs_have_orders_of_their_own(shards):
    drawn = prompts(take(stream(shards), 2 * TOTAL))
    assert sorted(drawn[:TOTAL]) == sorted(drawn[TOTAL:]) == list(range(TOTAL))
    assert drawn[:TOTAL] != drawn[TOTAL:]
    assert drawn[:TOTAL] != list(range(TOTAL))


@pytest.mark.parametrize("ranks, workers", [(3, 0), (3, 2), (2, 1)])
def test_ranks_and_workers_share_an_epoch_and_never_run_dry(shards, ranks, workers):
    """By what each reader has in its first epoch: together all samples, none twice."""
    seen, pairs = [], {int(item["prompt"]): item["lq"] for item in take(stream(shards), TOTAL)}
    for rank in range(ranks):
        batches = take(DataLoader(stream(shards).share(rank, ranks, 0, 1), 1, num_workers=workers), 60)
        assert len(batches) == 60
        for reader in range(max(workers, 1)):
            first = []
            for batch in batches[reader :: max(workers, 1)]:
                number = int(batch["prompt"][0])
                if number in first or not torch.equal(batch["lq"][0], pairs[number]):
                    break  # of the next epoch, where a sample gives another pair
                first.append(number)
            seen += first
    assert sorted(seen) == list(range(TOTAL))


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("used", [1, 5, 14])
def test_a_resumed_run_goes_on_where_it_stopped(shards, workers, used):
    whole = take(DataLoader(stream(shards), 3, num_workers=workers), used + 5)
    rest = take(DataLoader(stream(shards).share(0, 1, used, 3), 3, num_workers=workers), 5)
    for a, b in zip(whole[used:], rest, strict=True):
        assert a["prompt"] == b["prompt"]
        assert torch.equal(a["lq"], b["lq"])


def test_whole_shards_are_skipped_unread_when_their_size_is_known(tmp_path):
    write(tmp_path, (4, 4, 4))
    whole = prompts(take(stream(tmp_path, 2), 30))
    opened = []
    resumed = stream(tmp_path, 2, per_shard=4).share(0, 1, 9, 1)
    read = resumed._samples
    resumed._samples = lambda url: opened.append(url) or read(url)
    assert prompts(take(resumed, 3)) == whole[9:12]
    assert len(opened) == 1


def test_pipes_are_read(shards):
    piped = StreamedPairs(f"pipe:cat {shards}/{{000..006}}.tar", 16, captions={"txt": 1})
    assert sorted(prompts(take(piped, TOTAL))) == list(range(TOTAL))


def test_a_vanished_shard_fails_by_name_or_is_skipped(shards):
    urls = [f"pipe:cat {shards}/000.tar", f"pipe:cat {shards}/gone.tar", f"{shards}/gone.tar"]
    with pytest.raises(UserError, match=re.escape("gone.tar cannot be read to its end")):
        take(StreamedPairs(urls, 16), 20)
    rest = StreamedPairs(urls, 16, captions={"txt": 1}, on_error="skip")
    assert sorted(prompts(take(rest, 6))) == [0, 0, 1, 1, 2, 2]
    assert rest.skipped >= 2
    with pytest.raises(UserError, match="no images in any of the shards"):
        take(StreamedPairs(urls[1:], 16, on_error="skip"), 1)


def test_a_damaged_image_fails_by_name_or_is_skipped(tmp_path):
    write_png(tmp_path / "a.png", np.zeros((20, 20, 3), np.uint8))
    good = (tmp_path / "a.png").read_bytes()
    write_shard(tmp_path / "000.tar", [("good", {"png": good, "txt": b"1"}), ("bad", {"png": good[:50], "txt": b"2"})])
    with pytest.raises(UserError, match=r"000\.tar: bad is damaged"):
        take(stream(tmp_path, 0), 4)
    assert prompts(take(stream(tmp_path, 0, on_error="skip"), 3)) == [1, 1, 1]


def test_more_readers_than_shards_are_refused(shards):
    with pytest.raises(UserError, match="8 loader processes share 7 shards"):
        take(stream(shards).share(0, 8, 0, 1), 1)
