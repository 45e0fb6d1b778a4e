"""Datasets. An item is a dict: `hq` (3, S, S) float32 RGB in [0, 1], `lq` likewise, `prompt` a string; and `teacher`,
an image too, where the source has it.

Where the degradation is left to the accelerator, `seed` stands in place of `lq` (see `dataset.data_module`).
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset

from diffbir.dataset.crops import Crop
from diffbir.dataset.order import shuffled
from diffbir.dataset.sources.files import Files, Sample, Source
from diffbir.dataset.sources.shards import Shards, is_shards
from diffbir.dataset.sources.tables import TABLES, Table
from diffbir.dataset.transfer import IMAGES
from diffbir.utils.cli import UserError
from diffbir.utils.image import ImageError, to_tensor

log = logging.getLogger(__name__)

Degradation = Callable[[NDArray, np.random.Generator], NDArray]
Item = dict[str, torch.Tensor | str | int]


class ImagePairs(Dataset):
    """Clean crops and their degraded versions, made on the fly or ready-made.

    Item `n` depends on `n` and the seed alone, not on workers, ranks or what was drawn before: draws
    0 .. N-1 go through the N images in one random order, draws N .. 2N-1 in another, and so on without end.

    An image that cannot be read is never replaced by another one. With `on_error` 'skip' its place in the batch stays
    empty: the batch is smaller, all other items are what they are without it, and each loader process logs what it
    left out. Steps and draws are thus counted as ever. A batch of which nothing remains is an error, so small batches
    want a list without the unreadable files (scripts/check_dataset.py writes it).

    Args:
        source: where the images come from, or a path: a folder, a text file with one path a line, an image, a table
            without captions, or tar shards (see `open_source`). None waits for `use`.
        crop_size: side of the square crop, pixels; smaller images are enlarged to it first.
        degradation: `(hq, rng) -> lq` on (S, S, 3) float32 arrays; None leaves out `lq` unless the source has it.
        crop: 'random', 'centre', or 'none' (with `crop_size` None) for whole images of any size, in batches of one.
        flip: mirrors half of the crops.
        shuffle: False keeps the order of the source (for validation).
        limit: uses only so many images, spread evenly over the source.
        seed: what everything random follows from.
        short_side: what the short side is resized to before the crop; None keeps the image's size.
        target: makes the clean crop (S, S, 3) float32 in [0, 1] into what is to be learnt, such as a sharpened one; it
            becomes `hq`, and the degradation starts from it.
        on_error: 'fail' or 'skip', for images that cannot be read.
        defer: leaves the degradation to the data module, which applies it to whole batches on the accelerator.
        captions: what prompts are drawn from, where `source` is the path of a table or of shards; see
            `dataset.sources.tables.Captions`. Other paths have none: their prompts are empty, and the log says so.
    """

    def __init__(
        self,
        source: str | Path | Source | None,
        crop_size: int | None,
        degradation: Degradation | None = None,
        crop: str = "random",
        flip: bool = True,
        shuffle: bool = True,
        limit: int | None = None,
        seed: int = 0,
        short_side: int | None = None,
        target: Callable[[NDArray], NDArray] | None = None,
        on_error: str = "fail",
        defer: bool = False,
        captions: Mapping[str, float] | None = None,
    ):
        if on_error not in ("fail", "skip"):
            raise ValueError(f"on_error must be 'fail' or 'skip', not '{on_error}'")
        self.crop, self.crop_size, self.flip = Crop(crop_size, crop, short_side), crop_size, flip
        self.degradation, self.target, self.defer = degradation, target, defer
        self.shuffle, self.seed, self.limit = shuffle, seed, limit
        self.on_error, self.skipped = on_error, 0
        self.source: Source | None = None
        if isinstance(source, (str, Path)):
            source = open_source(source, captions)
        elif captions:
            raise ValueError("captions go with the path of a table or of shards; give them to the source itself")
        if source is not None:
            self.use(source)

    def use(self, source: Source) -> None:
        """Takes the images from another source."""
        if source.paired and self.degradation is not None:
            raise ValueError("the source has ready-made pairs; set degradation to null")
        self.source = source
        self.length = len(source) if self.limit is None else min(self.limit, len(source))

    def __len__(self) -> int:
        return self.length

    def number(self, n: int) -> int:
        """Which image of the source draw `n` shows."""
        epoch, i = divmod(n, len(self))
        i = shuffled(i, len(self), self.seed, epoch) if self.shuffle else i
        return i * len(self.source) // len(self)

    def __getitem__(self, n: int) -> Item:
        rng = np.random.default_rng((self.seed, n))
        (captions,) = rng.spawn(1)  # a generator of their own: captions do not change crops and degradations
        sample = self.source.read(self.number(n), captions)
        return make_item(sample, rng, self.crop, self.flip, self.target, self.degradation, self.defer)

    def __getitems__(self, numbers: Sequence[int]) -> list[Item]:
        """The items of one batch, without those that are skipped; loaders prefer this to `__getitem__`.

        Raises:
            ImageError: an image cannot be read, or, if such are skipped, none of the batch can.
        """
        return [item for item in self.try_items(numbers) if item is not None]

    def try_items(self, numbers: Sequence[int]) -> list[Item | None]:
        """The items of one batch, None in place of those that are skipped; raises as `__getitems__` does."""
        if self.on_error == "fail":
            return [self[n] for n in numbers]
        items: list[Item | None] = []
        for n in numbers:
            try:
                items.append(self[n])
            except ImageError as error:
                items.append(None)
                self.skipped += 1
                log.warning("skipped (%d so far in this loader process): %s", self.skipped, error)
                last = error
        if all(item is None for item in items):
            raise ImageError(
                f"none of the {len(numbers)} images of a batch can be read, the last one because: {last}; "
                "make a list without unreadable files (scripts/check_dataset.py --good-list) or a larger batch"
            ) from last
        return items


def make_item(
    sample: Sample,
    rng: np.random.Generator,
    crop: Crop,
    flip: bool,
    target: Callable[[NDArray], NDArray] | None,
    degradation: Degradation | None,
    defer: bool,
) -> Item:
    """Cuts a sample, mirrors half of the cuts if `flip`, makes the target, and degrades it unless there is an `lq`.

    Args:
        defer: draws the seed of the degradation instead of degrading.
    """
    given = {name: getattr(sample, name) for name in IMAGES if getattr(sample, name) is not None}
    cuts = crop(list(given.values()), rng)
    if flip and rng.random() < 0.5:
        cuts = [cv2.flip(cut, 1) for cut in cuts]
    images = {name: cut.astype(np.float32) / 255 for name, cut in zip(given, cuts, strict=True)}
    if target is not None:
        images["hq"] = target(images["hq"])
    item = {"prompt": sample.prompt, **{name: to_tensor(image) for name, image in images.items()}}
    if degradation is not None and defer:
        item["seed"] = int(rng.integers(2**63))
    elif degradation is not None:
        item["lq"] = to_tensor(degradation(images["hq"], rng))
    return item


def open_source(source: str | Path, captions: Mapping[str, float] | None = None) -> Source:
    """The source that a path means.

    Raises:
        UserError: it does not exist or holds no image, or has not these captions.
    """
    if str(source).startswith("pipe:") or "://" in str(source):
        raise UserError(f"{source} can only be streamed; make dataset.streams.StreamedPairs the target of the dataset")
    if Path(source).suffix.lower() in TABLES:
        return Table(source, captions=captions)
    if is_shards(source):
        return Shards(source, captions)
    if captions:
        log.warning("%s has no captions, so all prompts are empty; give a table or shards", source)
    return Files(source)
