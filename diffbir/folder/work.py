"""One process's share of a run: while a batch is computed, the next are read and the last are written."""

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor, cat
from tqdm import tqdm

from diffbir.faces.restorer import FaceRestorer, FacesResult, RestoredFace
from diffbir.folder import manifest, previews
from diffbir.folder.inputs import HEIC, pi_heif
from diffbir.folder.manifest import DONE, FAILED, Journal, Line
from diffbir.folder.plan import TODO, Item, Settings
from diffbir.folder.report import printable
from diffbir.folder.task import choose_task
from diffbir.folder.writing import WriteError, to_pil, write, write_result
from diffbir.model.options import Options
from diffbir.model.restorer import Restorer, Result
from diffbir.utils.cli import UserError
from diffbir.utils.image import side_by_side, to_uint8
from diffbir.utils.memory import is_out_of_memory
from diffbir.utils.pictures import Back, open_picture
from diffbir.utils.versions import versions

READERS, WRITERS = 2, 2
AHEAD = 2  # batches that are read while one is computed
WAITING = 8  # results that wait to be written, at most
NO_MEMORY = "it needs more memory than there is; try --tile 256, --offload or --precision fp16"
PACKAGES = ("diffbir", "torch", "pillow")

LARGEST = next(option.metadata["high"] for option in fields(Options) if option.name == "upscale")

T = TypeVar("T")
U = TypeVar("U")


@dataclass
class Opened:
    """An image that has been read.

    Args:
        images: (1, 3, H, W) float32 RGB in [0, 1].
        back: turns a result into the picture that is written.
        facts: what identifies the file.
        task: what `--task auto` takes for it; None where the task is fixed.
        caption: what a captioner says; None where none is asked.
    """

    images: Tensor
    back: Back
    facts: Line
    task: str | None
    caption: str | None = None


@dataclass
class Share:
    """What a process needs to know.

    Args:
        output: folder of the results.
        items: all images of the run.
        batches: indices of those that are computed together.
        auto: whether each image gets the task that suits it.
        stages, compare, faces: folders below `output` for labelled pictures, for previews and for faces; None for none.
    """

    output: Path
    items: list[Item]
    batches: list[list[int]]
    settings: Settings
    auto: bool = False
    stages: str | None = None
    compare: str | None = None
    faces: str | None = None


def work(
    share: Share,
    restorer_for: Callable[[str | None], Restorer],
    rank: int = 0,
    quiet: bool = False,
    going_on: Callable[[], bool] = lambda: True,
    captioner: Callable[[Tensor], str] | None = None,
) -> None:
    """Restores every image of the share that is to do, and tells the manifest of each.

    Args:
        restorer_for: the restorer of a task; None is the preset's.
        going_on: asked before every batch; False ends the work.
        captioner: (1, 3, H, W) -> what stands before the prompt of images that have no prompt of their own.

    Raises:
        UserError: results can't be written any more, or the captioner can't be loaded.
    """
    number = sum(share.items[i].state == TODO for batch in share.batches for i in batch)
    reading = ahead(share.batches, lambda batch: [read(share.items[i].source.path, share.auto) for i in batch])
    with (
        Journal(share.output, rank) as journal,
        Writer(share, journal) as writer,
        tqdm(total=number, unit="image", desc="restoring", disable=quiet) as bar,
        closing(reading) as batches,
    ):
        for batch, opened in batches:
            if not going_on():
                return
            items = [share.items[i] for i in batch]
            for item, one in zip(items, opened, strict=True):
                if isinstance(one, str):
                    writer.fail(item, one)
                elif captioner and item.prompt[0] == share.settings.options["prompt"]:
                    one.caption = captioner(one.images)
            for group in alike(opened):
                bar.set_postfix_str(printable(items[group[0]].source.name))
                restorer = restorer_for(opened[group[0]].task)
                start = time.perf_counter()
                results = restore(share.settings, items[group[0]], restorer, [opened[i] for i in group], quiet)
                seconds = (time.perf_counter() - start) / len(group)
                for i, result in zip(group, results, strict=True):
                    if isinstance(result, str):
                        writer.fail(items[i], f"{items[i].source.path}: {result}")
                    elif items[i].state == TODO:
                        writer.write(items[i], opened[i], result, seconds, str(restorer.device))
            bar.update(sum(item.state == TODO for item in items))


def alike(opened: Sequence[Opened | str]) -> list[list[int]]:
    """Indices of those that were read, by size, task and caption: headers may be wrong, and have only the first."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for i, one in enumerate(opened):
        if isinstance(one, Opened):
            groups[one.images.shape, one.task, one.caption].append(i)
    return list(groups.values())


def read(path: str, auto: bool = False) -> Opened | str:
    """An image, or why it can't be read; with `auto`, also the task that suits it."""
    try:
        facts = manifest.facts(path)
        images, back = open_picture(path)
        return Opened(images, back, facts, choose_task(images) if auto else None)
    except FileNotFoundError:
        return f"{path} does not exist; correct the list"
    except UserError as error:
        if path.lower().endswith(HEIC) and pi_heif is None:
            return f"{path} is HEIC, which needs another package: pip install 'diffbir[heic]'"
        return str(error)
    except OSError as error:
        return f"{path} cannot be read ({error.strerror or error}); make it readable"
    except MemoryError:
        return f"{path} does not fit into memory; make it smaller"
    except Exception as error:  # decoders raise whatever they like on damaged bytes
        return f"{path} is damaged ({type(error).__name__}: {error}); replace or remove it"


def restore(
    settings: Settings, item: Item, restorer: Restorer | FaceRestorer, opened: Sequence[Opened], quiet: bool
) -> list[Result | str]:
    """Results of images of one size and one prompt, or why there is none; one by one if memory asks for it."""
    try:
        options = options_of(settings, item, opened[0])
        steps = 0 if options.stage == "1" else options.steps
        with tqdm(total=steps, unit="step", leave=False, disable=quiet) as bar:
            images = cat([one.images for one in opened])
            result = restorer.restore(images, options, on_step=lambda i, z_0: bar.update(i + 1 - bar.n))
        values = [getattr(result, f.name) for f in fields(result)]
        return [type(result)(*(x[i : i + 1] for x in values)) for i in range(len(opened))]
    except UserError as error:
        return [str(error)] * len(opened)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    # Not in the handler, where the traceback would keep the tensors of the failed attempt alive.
    if len(opened) == 1:
        return [NO_MEMORY]
    return [restore(settings, item, restorer, [one], quiet)[0] for one in opened]


def options_of(settings: Settings, item: Item, opened: Opened) -> Options:
    """Raises:
    UserError: the size asked for is out of range.
    """
    height, width = opened.images.shape[-2:]
    upscale = settings.target.factor((width, height), settings.options["upscale"])
    if upscale > LARGEST:
        raise UserError(f"it would become {upscale:.0f} times as large, and {LARGEST} times is the most; ask for less")
    prompt, negative = item.prompt
    prompt = ", ".join(filter(None, (opened.caption, prompt)))
    return Options(**{**settings.options, "upscale": upscale, "prompt": prompt, "negative_prompt": negative})


class Writer:
    """Writes results, and then their lines, in threads of its own.

    Leaving the context waits for what has begun and, with an error, drops the rest.
    """

    def __init__(self, share: Share, journal: Journal):
        self.share, self.journal = share, journal
        self.pool = ThreadPoolExecutor(WRITERS)
        self.waiting: deque[Future] = deque()
        self.versions = versions(PACKAGES)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: type | None, *_: Any) -> None:
        self.pool.shutdown(cancel_futures=kind is not None)
        if kind is None:
            self._check(0)

    def write(self, item: Item, opened: Opened, result: Result, seconds: float, device: str) -> None:
        """Raises:
        UserError: an earlier result could not be written, and so none can.
        """
        self._check(WAITING)
        self.waiting.append(self.pool.submit(self._write, item, opened, result, seconds, device))

    def fail(self, item: Item, reason: str) -> None:
        if item.state == TODO:
            self.journal.write(self._line(item, FAILED) | {"error": reason})

    def _check(self, most: int) -> None:
        """Waits until at most so many results wait to be written."""
        while self.waiting and (len(self.waiting) > most or self.waiting[0].done()):
            self.waiting.popleft().result()

    def _line(self, item: Item, status: str) -> Line:
        return {"output": item.output, "input": item.source.path, "status": status}

    def _write(self, item: Item, opened: Opened, result: Result, seconds: float, device: str) -> None:
        share, settings = self.share, self.share.settings
        picture = opened.back(result.image)
        pictures = {"input": result.input, "stage 1": result.stage1, "result": result.image}
        try:
            # The result last, so that where it is, the others are too.
            if share.stages:
                named = {title: np.asarray(to_pil(opened.back(x)).convert("RGB")) for title, x in pictures.items()}
                path = share.output / share.stages / Path(item.output).with_suffix(".png")
                write(path, side_by_side(named))
            if share.compare:
                previews.write_previews(share.output / share.compare / item.output, pictures)
            faces = result.faces[0] if isinstance(result, FacesResult) else None
            if share.faces and faces:
                write_faces(share.output / share.faces / item.output, faces)
            if settings.exif == "drop":
                getattr(picture, "info", {}).pop("exif", None)
            write_result(share.output / item.output, picture, settings.quality)
        except WriteError as error:
            self.fail(item, str(error))
            return
        distance = (result.image - result.input).square().mean().sqrt().item() * 255
        line = self._line(item, DONE) | opened.facts
        line |= {"size": list(opened.images.shape[:1:-1]), "result_size": list(result.image.shape[:1:-1])}
        line |= {"seed": settings.options["seed"], "settings": settings.line(item.prompt)}
        line |= {"task": opened.task} if opened.task else {}
        line |= {"caption": opened.caption} if opened.caption is not None else {}
        line |= {} if faces is None else {"faces": [face_line(face) for face in faces]}
        line |= {"distance": round(distance, 3), "seconds": round(seconds, 3), "device": device}
        line |= {"finished": datetime.now(timezone.utc).isoformat(timespec="seconds"), "versions": self.versions}
        self.journal.write(line)


def write_faces(base: Path, faces: Sequence[RestoredFace]) -> None:
    """Writes photo.1.png, photo.1.input.png and so on, from left to right; only the latter where nothing was restored.

    Raises:
        WriteError, UserError: see `write`.
    """
    for i, face in enumerate(faces, 1):
        for ending, picture in ((".input.png", face.aligned), (".png", face.restored)):
            if picture is not None:
                write(base.with_name(f"{base.stem}.{i}{ending}"), to_uint8(picture))


def face_line(face: RestoredFace) -> Line:
    """As the manifest has it; the box is in pixels of the upright input."""
    box = [round(x, 1) for x in face.face.box]
    return {"box": box, "score": round(face.face.score, 4), "restored": face.restored is not None}


def ahead(tasks: Sequence[T], function: Callable[[T], U]) -> Iterator[tuple[T, U]]:
    """Each task with its result, in order; the next ones are under way in threads."""
    pool = ThreadPoolExecutor(READERS)
    try:
        started: deque[tuple[T, Future]] = deque()
        rest = iter(tasks)
        while True:
            while len(started) <= AHEAD and (task := next(rest, None)) is not None:
                started.append((task, pool.submit(function, task)))
            if not started:
                return
            task, future = started.popleft()
            yield task, future.result()
    finally:
        pool.shutdown(cancel_futures=True)
