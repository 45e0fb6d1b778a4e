"""Tar shards that can only be read from front to back: URLs and commands."""

import copy
import io
import itertools
import logging
import random
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import IterableDataset, get_worker_info

from diffbir.dataset.crops import Crop
from diffbir.dataset.fetch import check_url, is_final, is_remote, open_shard, read_samples
from diffbir.dataset.order import shuffled
from diffbir.dataset.pairs import Degradation, Item, make_item
from diffbir.dataset.sources.files import Sample
from diffbir.dataset.sources.shards import expand_braces, parse_texts
from diffbir.dataset.sources.tables import Captions
from diffbir.utils.cli import UserError
from diffbir.utils.image import SUFFIXES, ImageError, read_rgb

log = logging.getLogger(__name__)


class StreamedPairs(IterableDataset):
    """Pairs from shards in the WebDataset layout, endlessly, while they arrive.

    Shards on a disk are better served by `dataset.sources.shards.Shards`. What can be promised without random access:

    - An epoch deals out the shards, in an order of its own, to the loader processes of all ranks; so it has no sample
      twice. Processes go on to their next epoch without waiting for each other: every rank always has a next batch.
    - The pair that a sample gives in an epoch depends on the seed, the epoch and the sample's key and shard alone.
      Which batch it comes in depends on the number of ranks and workers.
    - A run resumed with the same numbers of ranks and workers goes on with the batches that would have come. What it
      has used is read again, undecoded, except for whole groups of shards if `per_shard` is known. Samples that were
      skipped shift it.

    A shard from elsewhere that breaks off is read again, up to the sample where it did, after ever longer pauses.

    Args:
        source: `https://host/{000..999}.tar`, a path, or a shell command `pipe:command {000..999}.tar`, whose output is
            the shard. Commands must be allowed (`--allow-pipes` of a training, DIFFBIR_ALLOW_PIPES=1 elsewhere). One or
            several.
        mix: shards that a process reads at the same time; their samples are mixed.
        buffer: samples that a process reads ahead and draws from.
        buffer_mb: how much of them it holds at most, MB; with large images it holds fewer.
        retries: failures in a row after which a shard is given up; each doubles the `pause`, seconds.
        per_shard: samples in every shard, if all have the same number.
        captions: see `dataset.sources.tables.Captions`.
        on_error: 'fail', or 'skip': unreadable images and the rest of broken shards are logged and left out.
        crop_size, degradation, crop, flip, seed, short_side, target, defer: as those of `dataset.pairs.ImagePairs`.
    """

    def __init__(
        self,
        source: str | list[str],
        crop_size: int,
        degradation: Degradation | None = None,
        crop: str = "random",
        flip: bool = True,
        seed: int = 0,
        short_side: int | None = None,
        target: Callable[[NDArray], NDArray] | None = None,
        on_error: str = "fail",
        captions: Mapping[str, float] | None = None,
        mix: int = 4,
        buffer: int = 1000,
        buffer_mb: float = 256,
        retries: int = 5,
        pause: float = 1.0,
        per_shard: int | None = None,
        defer: bool = False,
    ):
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error must be 'fail' or 'skip', not '{on_error}'")
        self.urls = [url for name in ([source] if isinstance(source, str) else source) for url in expand_braces(name)]
        for url in self.urls:
            check_url(url)
        self.crop, self.flip = Crop(crop_size, crop, short_side), flip
        self.target, self.degradation, self.defer = target, degradation, defer
        self.seed, self.on_error, self.captions = seed, on_error, Captions(captions)
        self.mix, self.buffer, self.buffer_mb, self.per_shard = mix, buffer, buffer_mb, per_shard
        self.retries, self.pause, self.skipped = retries, pause, 0
        self.rank, self.ranks, self.used, self.batch_size = 0, 1, 0, 1

    def share(self, rank: int, ranks: int, used: int, batch_size: int) -> "StreamedPairs":
        """What one rank reads, from after the `used` batches that it has had."""
        part = copy.copy(self)
        part.rank, part.ranks, part.used, part.batch_size = rank, ranks, used, batch_size
        return part

    def probe(self) -> None:
        """Looks whether all shards on a disk are there, and makes the first item of the first and the last shard.

        Raises:
            ImageError: a shard is missing or cannot be fetched, or has no readable image; whatever `on_error` is.
        """
        local = [url for url in self.urls if not is_remote(url)]
        missing = [url for url in local if not Path(url).is_file()]
        if missing:
            raise ImageError(f"{missing[0]} does not exist ({len(missing)} of {len(self.urls)} shards); check the path")
        strict = copy.copy(self)
        strict.on_error = "fail"
        for url in dict.fromkeys([self.urls[0], self.urls[-1]]):
            sample = next(strict._samples(url), None)
            if sample is None:
                raise ImageError(f"no images in {url}; looked for members {', '.join(SUFFIXES)}")
            strict._item(sample, 0)

    def __iter__(self) -> Iterator[Item]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        # Loaders ask their workers in turn, from the first: after a stop, that is the one whose turn it was.
        worker = (worker + self.used) % workers
        used = len(range(worker, self.used, workers)) * self.batch_size
        reader, readers = self.rank * workers + worker, self.ranks * workers
        if readers > len(self.urls):
            raise UserError(f"{readers} loader processes share {len(self.urls)} shards; make more shards or use fewer")
        empty = set()
        for epoch in itertools.count():
            positions = range(reader, len(self.urls), readers)
            for start in range(0, len(positions), self.mix):
                group = [shuffled(i, len(self.urls), self.seed, epoch) for i in positions[start : start + self.mix]]
                if self.per_shard and used >= self.per_shard * len(group):
                    used -= self.per_shard * len(group)
                    continue
                empty.update(group)
                for sample in self._mixed([self.urls[i] for i in group], epoch):
                    empty.clear()
                    if used:
                        used -= 1
                        continue
                    try:
                        yield self._item(sample, epoch)
                    except ImageError as error:
                        self._skip(error)
                if len(empty) == len(self.urls):
                    raise UserError(f"no images in any of the shards {self.urls[0]} ...; check what they hold")

    def _mixed(self, urls: Sequence[str], epoch: int) -> Iterator[dict]:
        """Samples of several shards, drawn from a buffer that is filled from all of them by turns."""
        rng, readers = self._rng(epoch, " ".join(urls)), [self._samples(url) for url in urls]
        buffer, held = [], 0
        while readers or buffer:
            while readers and len(buffer) < self.buffer and held < self.buffer_mb * 1e6:
                turn = int(rng.integers(len(readers)))
                sample = next(readers[turn], None)
                if sample is None:
                    del readers[turn]
                else:
                    buffer.append(sample)
                    held += len(sample["image"])
            if buffer:
                i = int(rng.integers(len(buffer)))
                buffer[i], buffer[-1] = buffer[-1], buffer[i]
                sample = buffer.pop()
                held -= len(sample["image"])
                yield sample

    def _samples(self, url: str) -> Iterator[dict]:
        """Samples of one shard with an image, undecoded, in their order; read again after a failure."""
        done, failures = 0, 0
        while True:
            try:
                with open_shard(url) as file:
                    for sample in itertools.islice(read_samples(file), done, None):
                        done, failures = done + 1, 0
                        yield {"name": f"{url}: {sample['key']}", **sample}
                return
            except UserError:
                raise
            except Exception as error:  # commands, network and tar files fail in ways of their own
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                if not is_remote(url) or is_final(error) or failures == self.retries:
                    self._skip(ImageError(f"{url} cannot be read to its end ({reason}); check that it can be fetched"))
                    return
                # Not all processes at once, should it be the server that is overloaded.
                pause = self.pause * 2**failures * random.uniform(0.5, 1)
                failures += 1
                log.warning("%s: %s; once more in %.1f s", url, reason, pause)
                time.sleep(pause)

    def _item(self, sample: dict, epoch: int) -> Item:
        rng = self._rng(epoch, sample["name"])
        (captions,) = rng.spawn(1)
        image = read_rgb(io.BytesIO(sample["image"]), sample["name"])
        prompt = ""
        if self.captions.names:
            prompt = self.captions.draw(parse_texts(sample["txt"], sample["json"], sample["name"]), captions)
        return make_item(Sample(image, prompt), rng, self.crop, self.flip, self.target, self.degradation, self.defer)

    def _rng(self, epoch: int, name: str) -> np.random.Generator:
        return np.random.default_rng((self.seed, epoch, zlib.crc32(name.encode())))

    def _skip(self, error: ImageError) -> None:
        if self.on_error == "fail":
            raise error
        self.skipped += 1
        log.warning("skipped (%d so far in this loader process): %s", self.skipped, error)
