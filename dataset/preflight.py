"""What is worth knowing about a dataset before a training spends days on it."""

import logging
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from omegaconf import DictConfig
from torch.utils.data import DataLoader
from tqdm import tqdm

from diffbir.dataset.degradations.recipes import Recipe, Step
from diffbir.dataset.latents import CachedLatents
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.parallel import computed
from diffbir.dataset.sources.files import Source
from diffbir.dataset.streams import StreamedPairs
from diffbir.utils.config import ConfigError, load_config
from diffbir.utils.image import ImageError

log = logging.getLogger(__name__)


@dataclass
class Scan:
    """Every image of a source, read once.

    Args:
        short: (N,) short side of each image, pixels; 0 if it cannot be read.
        unreadable: why those cannot be read, by number.
    """

    short: NDArray[np.int32]
    unreadable: dict[int, str] = field(default_factory=dict)

    @property
    def readable(self) -> NDArray[np.int64]:
        """Numbers of the images that can be read."""
        return np.flatnonzero(self.short)

    def below(self, side: int) -> NDArray[np.int64]:
        """Numbers of the images whose short side is smaller."""
        return np.flatnonzero((self.short > 0) & (self.short < side))

    def histogram(self, edges: Iterable[int] = (0, 64, 128, 256, 512, 768, 1024, 2048)) -> dict[str, int]:
        """How many images have a short side in each range, pixels."""
        edges = [*edges, np.inf]
        counts, _ = np.histogram(self.short[self.readable], edges)
        names = [f"{low} to {high - 1}" for low, high in pairwise(edges[:-1])]
        return dict(zip([*names, f"{edges[-2]} and more"], map(int, counts), strict=True))


def scan(source: Source, workers: int = 0) -> Scan:
    """Decodes every image of a source, in so many processes; only this finds truncated files."""

    def read(i: int) -> int | str:
        try:
            return min(source.read(i, np.random.default_rng(0)).hq.shape[:2])
        except ImageError as error:
            return str(error)

    found = Scan(np.zeros(len(source), np.int32))
    results = computed(read, range(len(source)), workers)
    for i, result in enumerate(tqdm(results, "reading", len(source), unit="image")):
        if isinstance(result, str):
            found.unreadable[i] = result
        else:
            found.short[i] = result
    return found


def read_recipe(path: str | Path) -> DictConfig:
    """The node `degradation` of a YAML.

    Raises:
        ConfigError: there is none.
    """
    config = load_config(path)
    if "degradation" not in config:
        raise ConfigError(f"{path} has no key 'degradation'; give a recipe such as those in configs/dataset")
    return config.degradation


class Recorded(Recipe):
    """A degradation that remembers what it drew for the last image, in `drawn`."""

    def __init__(self, recipe: Recipe):
        self.recipe = recipe
        self.drawn: list[str] = []

    def steps(self, size: tuple[int, int], rng: np.random.Generator) -> Iterator[Step | None]:
        self.drawn = []
        for step in self.recipe.steps(size, rng):
            if step is not None:
                self.drawn.append(describe(step))
            yield step


def describe(step: Step) -> str:
    """`Name(parameter=value, ...)`; of a kernel, its shape."""
    values = vars(step).items()
    shown = [f"{k}={'x'.join(map(str, v.shape)) if isinstance(v, np.ndarray) else _short(v)}" for k, v in values]
    return f"{type(step).__name__}({', '.join(shown)})"


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def quick_check(dataset: ImagePairs | StreamedPairs | CachedLatents, effective_batch: int, samples: int = 8) -> None:
    """The part that costs a training's start nothing: the size of the dataset, and a few images spread over it.

    Of a stream: whether the shards are there, and the first images of two of them.

    Raises:
        ImageError: one of those cannot be read, unless the dataset skips such.
    """
    if isinstance(dataset, StreamedPairs):
        log.info("%d shards, streamed", len(dataset.urls))
        try:
            dataset.probe()
        except ImageError as error:
            if dataset.on_error == "fail":
                raise
            log.warning("will be skipped: %s", error)
        return
    log.info("%d images, %.1f steps an epoch", len(dataset), len(dataset) / effective_batch)
    if len(dataset) < effective_batch:
        log.warning("the effective batch of %d shows some of the %d images twice", effective_batch, len(dataset))
    if isinstance(dataset, CachedLatents):
        return
    for i in np.linspace(0, len(dataset) - 1, min(samples, len(dataset))).astype(int):
        try:
            dataset.source.read(int(i), np.random.default_rng(0))
        except ImageError as error:
            if dataset.on_error == "fail":
                raise
            log.warning("will be skipped: %s", error)


def throughput(dataset: ImagePairs, batch_size: int, workers: int, batches: int = 8) -> float:
    """Items per second of a loader, its start left out."""
    # The first batch of every worker, and what was prefetched by then, would count the start or come for free.
    warm_up = max(2 * workers, 1)
    sampler = range(batch_size * (warm_up + batches))
    loader = DataLoader(
        dataset, batch_size, sampler=sampler, num_workers=workers, prefetch_factor=1 if workers else None
    )
    stream = iter(loader)
    for _ in islice(stream, warm_up):
        pass
    start = time.perf_counter()
    items = sum(len(batch["prompt"]) for batch in stream)
    return items / (time.perf_counter() - start)
