"""What a run does: which images, under which names, in which batches, in which process."""

import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffbir.folder import manifest
from diffbir.folder.inputs import Source
from diffbir.folder.manifest import DONE, PENDING, REFUSED, Line
from diffbir.folder.names import result_names
from diffbir.folder.prompts import Prompts
from diffbir.folder.sizes import Size, Target, enlarged, header_size
from diffbir.folder.writing import ending_of

BATCH_PIXELS = 8 * 512**2  # of results that are computed at once on a GPU
HEADERS = 8  # files that are opened at once

TODO = "to do"


@dataclass(frozen=True)
class Settings:
    """What decides what results look like, apart from the seed and an image's own prompt.

    Args:
        model: preset, task, stage 1, additions, precision and changes to the preset.
        options: fields of `Options`; `upscale` gives way to the target.
        exif: keep or drop.
        captioner: what adds to the prompt of images that have none of their own; None for nothing.
    """

    model: dict[str, Any]
    options: dict[str, Any]
    target: Target = field(default_factory=Target)
    format: str = "png"
    quality: int = 95
    suffix: str = ""
    exif: str = "keep"
    captioner: str | None = None

    def line(self, prompt: tuple[str, str]) -> Line:
        """As the manifest has it."""
        target = {k: v for k, v in (("long_side", self.target.long_side), ("size", self.target.box)) if v}
        target = {k: list(v) if isinstance(v, tuple) else v for k, v in target.items()}
        options = {**self.options, "prompt": prompt[0], "negative_prompt": prompt[1], **target}
        del options["seed"]
        if target:
            del options["upscale"]
        options |= {"format": self.format, "quality": self.quality, "exif": self.exif, "captioner": self.captioner}
        return {**self.model, **options}


@dataclass
class Item:
    """An image of a run.

    Args:
        output: path of the result, relative to the output folder.
        size: by the header; None if that is damaged.
        state: to do, done (by an earlier run) or refused.
        differs: settings of the existing result that are others today: name -> (then, now).
    """

    source: Source
    output: str
    size: Size | None
    prompt: tuple[str, str]
    state: str = TODO
    reason: str = ""
    differs: dict[str, tuple[Any, Any]] = field(default_factory=dict)

    def result_size(self, settings: Settings) -> Size | None:
        if self.size is None:
            return None
        return enlarged(self.size, settings.target.factor(self.size, settings.options["upscale"]))


@dataclass
class Plan:
    """Args:
    lines: the output folder's manifest before the run.
    batches: indices of items that are computed together; only those with something to do.
    """

    items: list[Item]
    lines: dict[str, Line]
    batches: list[list[int]]
    settings: Settings

    @property
    def todo(self) -> list[Item]:
        return [item for item in self.items if item.state == TODO]


def make_plan(
    sources: Sequence[Source],
    output: Path,
    settings: Settings,
    prompts: Prompts,
    overwrite: bool = False,
    batch: int = 1,
) -> Plan:
    """Compares the inputs with what earlier runs left in the output folder; writes nothing.

    Batches depend on the inputs alone and not on what is done, because rounding depends on what is computed together.

    Args:
        overwrite: redoes what is done, and replaces files that no run has written.
        batch: most images of equal size that are computed at once; 0 is as many as a GPU has room for.
    """
    lines = manifest.read(output)

    def owner(name: str, source: Source) -> bool | None:
        line = lines.get(name)
        if line is None or line["status"] == REFUSED:
            return None
        return line.get("input") == source.path or manifest.unchanged(line, source.path)

    names = result_names(sources, lambda source: ending_of(source.path, settings.format, settings.suffix), owner)
    with ThreadPoolExecutor(HEADERS) as pool:
        sizes = list(pool.map(header_size, [source.path for source in sources]))
    items = [
        Item(source, name, size, prompts.of(source)) for source, name, size in zip(sources, names, sizes, strict=True)
    ]
    inputs = {source.path for source in sources}
    for item in items:
        look_back(item, lines.get(item.output), output, settings, overwrite, inputs)
    batches = make_batches(items, settings, batch)
    return Plan(items, lines, [b for b in batches if any(items[i].state == TODO for i in b)], settings)


def look_back(
    item: Item, line: Line | None, output: Path, settings: Settings, overwrite: bool, inputs: set[str]
) -> None:
    """Finds out whether an image is done already, or would replace a file that isn't ours."""
    path = output / item.output
    if not path.exists():
        return
    ours = line is not None and line["status"] != REFUSED
    if os.path.abspath(path) in inputs or path.is_dir():
        item.state, item.reason = REFUSED, f"{path} is an input or a folder; give another --output, or a --suffix"
    elif not ours and not overwrite:
        item.state = REFUSED
        item.reason = f"{path} exists, and {output / manifest.NAME} has no run that wrote it; --overwrite replaces it"
    elif ours and not overwrite and line["status"] == DONE and manifest.unchanged(line, item.source.path):
        item.state = DONE
        then = {"exif": "keep", **line.get("settings", {}), "seed": line.get("seed")}
        now = {**settings.line(item.prompt), "seed": settings.options["seed"]}
        item.differs = {k: (then.get(k), v) for k, v in now.items() if then.get(k) != v}


def make_batches(items: Sequence[Item], settings: Settings, most: int) -> list[list[int]]:
    """Images of equal size and prompt, in the order of the first of each batch; damaged ones alone."""
    batches: list[list[int]] = []
    open_batch: dict[Any, list[int]] = {}
    for i, item in enumerate(items):
        if item.state == REFUSED:
            continue
        key = (item.size, item.prompt)
        found = open_batch.get(key)
        if item.size is None or found is None or len(found) >= (most or room_for(item.result_size(settings))):
            batches.append([i])
            open_batch[key] = batches[-1]
        else:
            found.append(i)
    return batches


def room_for(size: Size) -> int:
    return max(1, BATCH_PIXELS // (size[0] * size[1]))


def split(plan: Plan, processes: int) -> list[list[list[int]]]:
    """The batches of each process: the largest first, each to the process with the fewest pixels so far."""
    shares: list[list[list[int]]] = [[] for _ in range(processes)]
    load = [0] * processes
    pixels = [sum(pixels_of(plan.items[i], plan.settings) for i in batch) for batch in plan.batches]
    for k in sorted(range(len(pixels)), key=lambda k: -pixels[k]):
        least = load.index(min(load))
        shares[least].append(plan.batches[k])
        load[least] += pixels[k]
    return [sorted(share) for share in shares]


def pixels_of(item: Item, settings: Settings) -> int:
    size = item.result_size(settings)
    return size[0] * size[1] if size else 1


def pending(items: Iterable[Item]) -> list[Line]:
    """Lines for the manifest before anything is computed."""
    lines = []
    for item in items:
        if item.state != DONE:
            line = {"output": item.output, "input": item.source.path, "status": PENDING}
            lines.append({**line, "status": REFUSED, "error": item.reason} if item.state == REFUSED else line)
    return lines
