import http.server
import itertools
import re
import tarfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage import data
from torch.utils.data import DataLoader

from diffbir.dataset.fetch import ALLOW_PIPES
from diffbir.dataset.sources.shards import write_shard
from diffbir.dataset.streams import StreamedPairs
from diffbir.model.training.command import main as train
from diffbir.utils.cli import UserError
from diffbir.utils.image import write_png
from tests.runs import PHOTOS

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


@pytest.mark.parametrize("mix, used, shards_read", [(1, 9, 1), (2, 8, 1), (2, 14, 2), (3, 13, 3)])
def test_whole_groups_of_shards_are_skipped_unread_when_their_size_is_known(tmp_path, mix, used, shards_read):
    write(tmp_path, (4, 4, 4))
    whole = prompts(take(stream(tmp_path, 2, mix=mix), 30))
    opened = []
    resumed = stream(tmp_path, 2, per_shard=4, mix=mix).share(0, 1, used, 1)
    read = resumed._samples
    resumed._samples = lambda url: opened.append(url) or read(url)
    assert prompts(take(resumed, 3)) == whole[used : used + 3]
    assert len(opened) == shards_read


@pytest.fixture
def pipes(monkeypatch) -> None:
    monkeypatch.setenv(ALLOW_PIPES, "1")


def test_pipes_are_read(shards, pipes):
    piped = StreamedPairs(f"pipe:cat {shards}/{{000..006}}.tar", 16, captions={"txt": 1})
    assert sorted(prompts(take(piped, TOTAL))) == list(range(TOTAL))


def test_a_command_in_a_configuration_needs_leave(shards, tmp_path, monkeypatch, capsys):
    """It may come from a stranger; however it is spelt, nothing is run."""
    monkeypatch.setenv(ALLOW_PIPES, "0")
    proof = tmp_path / "proof"
    for url in (f"pipe:touch {proof}", f"PIPE:touch {proof}", f" pipe:touch {proof}"):
        with pytest.raises(UserError):
            take(StreamedPairs([url, f"{shards}/000.tar"], 16), 1)
    for url in (f"s3://x'; touch {proof}; '", "file:///etc/passwd", "ftp://host/0.tar"):
        with pytest.raises(UserError, match="cannot be fetched; give http"):
            StreamedPairs(url, 16)
    options = ["data.params.train.target=dataset.streams.StreamedPairs", f"run_dir={tmp_path}", f"val_photos={PHOTOS}"]
    config, url = "configs/train/mini/stage1.yaml", f"photos='pipe:touch {proof}; cat {shards}/000.tar'"
    run = ["--config", config, *options, url, "trainer.params.max_steps=1", "data.params.num_workers=0"]
    assert train("", "", run) == 1
    assert "runs a shell command; give --allow-pipes" in capsys.readouterr().err
    assert not proof.exists()
    small = ["data.params.batch_size=1", "data.params.train.params.crop_size=16", "data.params.val.params.crop_size=16"]
    assert train("", "", [*run, *small, "--allow-pipes"]) == 0
    assert proof.exists()


def test_a_vanished_shard_fails_by_name_or_is_skipped(shards, pipes):
    urls = [f"pipe:cat {shards}/000.tar", f"pipe:cat {shards}/gone.tar", f"{shards}/gone.tar"]
    with pytest.raises(UserError, match=re.escape("gone.tar cannot be read to its end")):
        take(StreamedPairs(urls, 16, retries=0), 20)
    rest = StreamedPairs(urls, 16, captions={"txt": 1}, on_error="skip", retries=0)
    assert sorted(prompts(take(rest, 6))) == [0, 0, 1, 1, 2, 2]
    assert rest.skipped >= 2
    with pytest.raises(UserError, match="no images in any of the shards"):
        take(StreamedPairs(urls[1:], 16, on_error="skip", retries=0), 1)


def test_a_failing_command_is_tried_again_and_no_sample_comes_twice(shards, tmp_path, pipes):
    """It breaks off after ever more of the shard; at the third time it comes through."""
    size = (shards / "002.tar").stat().st_size
    script = tmp_path / "flaky.sh"
    script.write_text(
        f"echo x >> {tmp_path}/tries; n=$(wc -l < {tmp_path}/tries)\n"
        f"if [ $n -lt 3 ]; then head -c $((n * {size // 3})) {shards}/002.tar; exit 7; fi; cat {shards}/002.tar\n"
    )
    flaky = StreamedPairs(f"pipe:sh {script}", 16, captions={"txt": 1}, pause=0.001)
    assert sorted(prompts(take(flaky, 7))) == list(range(4, 11))
    assert (tmp_path / "tries").read_text() == "x\n" * 3
    script.write_text(f"echo x >> {tmp_path}/tries; exit 7\n")
    (tmp_path / "tries").unlink()
    with pytest.raises(UserError, match=r"cannot be read to its end \(the command ended with status 7\)"):
        take(StreamedPairs(f"pipe:sh {script}", 16, retries=2, pause=0.001), 1)
    assert (tmp_path / "tries").read_text() == "x\n" * 3


class Server(http.server.BaseHTTPRequestHandler):
    """Serves a folder; the answers of `plan` come first: a status, or how many bytes to send before hanging up."""

    folder: Path
    plan: list[int]
    asked: list[float]

    def do_GET(self) -> None:
        self.asked.append(time.monotonic())
        path = self.folder / self.path.strip("/")
        answer = self.plan.pop(0) if self.plan else 200 if path.is_file() else 404
        if 400 <= answer < 600:
            self.send_error(answer)
            return
        content = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content if answer == 200 else content[:answer])

    def log_message(self, *args: object) -> None:
        pass


@pytest.fixture
def served(shards) -> Iterator[tuple[str, type[Server]]]:
    handler = type("Handler", (Server,), {"folder": shards, "plan": [], "asked": []})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", handler
        server.shutdown()


def test_shards_come_over_http(served):
    url, _ = served
    fetched = StreamedPairs(f"{url}/{{000..006}}.tar", 16, captions={"txt": 1})
    fetched.probe()
    assert sorted(prompts(take(fetched, TOTAL))) == list(range(TOTAL))


def test_a_connection_that_breaks_is_opened_again_after_ever_longer_pauses(served, shards):
    """Cut in the middle, cut where a header would follow (which looks like the archive's end), and server errors.

    What arrives in between makes the pauses start anew.
    """
    url, handler = served
    with tarfile.open(shards / "002.tar") as tar:
        boundary = tar.getmembers()[4].offset
    handler.plan[:] = [503, 700, 500, 429, boundary]
    fetched = StreamedPairs(f"{url}/002.tar", 16, captions={"txt": 1}, pause=0.05)
    assert sorted(prompts(take(fetched, 7))) == list(range(4, 11))
    assert len(handler.asked) == 6
    pauses = np.diff(handler.asked)
    for pause, doubled in zip(pauses, (1, 2, 4, 8, 1), strict=True):
        assert pause > 0.05 * doubled / 2 - 1e-3


def test_a_shard_that_is_not_there_is_not_asked_for_again(served):
    url, handler = served
    with pytest.raises(UserError, match=r"gone\.tar cannot be read to its end"):
        take(StreamedPairs(f"{url}/gone.tar", 16), 1)
    assert len(handler.asked) == 1


def test_samples_of_several_shards_are_mixed_within_bounds(tmp_path):
    """Of eight shards with eight samples: neighbours come from different shards, and little is read ahead."""
    write(tmp_path, (8,) * 8)
    size = len(next(iter(stream(tmp_path, 7)._samples(str(tmp_path / "000.tar"))))["image"])

    def read_ahead(**kwargs) -> tuple[list[int], int]:
        mixed, read = stream(tmp_path, 7, **kwargs), 0
        samples = mixed._samples

        def counted(url: str) -> Iterator[dict]:
            nonlocal read
            for sample in samples(url):
                read += 1
                yield sample

        mixed._samples, most, shards = counted, 0, []
        for n, item in enumerate(itertools.islice(mixed, 64)):
            most = max(most, read - n)
            shards.append(int(item["prompt"]) // 8)
        return shards, most

    shards, most = read_ahead(mix=4, buffer=5)
    assert most == 5
    assert len(set(shards[:32])) == len(set(shards[32:])) == 4  # by groups
    assert len(set(shards[:10])) >= 3
    shards, most = read_ahead(mix=1, buffer=1000)
    assert most == 8 and shards == np.repeat(shards[::8], 8).tolist()
    _, most = read_ahead(mix=4, buffer=1000, buffer_mb=6.5 * size / 1e6)
    assert most <= 8


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
