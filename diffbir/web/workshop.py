"""Where the pictures of all visitors are restored, as the command line would, and what is told on the way."""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image
from torch import Tensor

from diffbir.folder.restorers import AUTO
from diffbir.folder.sizes import enlarged, header_size
from diffbir.folder.work import Opened, read
from diffbir.folder.writing import WriteError, write, write_result
from diffbir.model.restorer import Cancelled, resize
from diffbir.utils.cli import UserError
from diffbir.utils.image import to_uint8
from diffbir.utils.memory import is_out_of_memory
from diffbir.web.models import Models
from diffbir.web.uploads import new_place
from diffbir.web.wish import Wish

INPUT, STAGE1, RESULT, NOW = "input", "stage 1", "result", "now"
SIDE, QUALITY = 1600, 92  # of pictures that are shown: pixels of the longer side, and of JPEG
LOOKING = 0.2  # share of the time of a chain that may go into decoding previews of it
SUFFIX = "_restored.png"


@dataclass(frozen=True)
class News:
    """Where the restoration of a picture stands.

    Args:
        text: a sentence.
        share: of the work that is done, from 0 to 1.
        pictures: JPEG files to show, equally large: INPUT, and STAGE1, NOW (on the way) and RESULT once they are there.
        result: the restored picture in full, at the end.
    """

    text: str
    share: float
    pictures: dict[str, Path] = field(default_factory=dict)
    result: Path | None = None


class Workshop:
    """Args:
    folder: of uploads, results and previews.
    megapixels: of a picture and of a result, at most.
    concurrency: pictures that are restored at the same time.
    """

    def __init__(
        self,
        models: Models,
        folder: Path,
        megapixels: float = 16,
        concurrency: int = 1,
    ):
        self.models, self.folder, self.megapixels = models, folder, megapixels
        self.pool = ThreadPoolExecutor(concurrency, "workshop")

    def look(self, path: Path) -> Path:
        """A picture to show of an upload.

        Raises:
            UserError: it can't be read, or is too large.
        """
        return show(self._open(path, 1.0, auto=False).images, new_place(self.folder), INPUT)

    def restore(self, path: Path, wish: Wish) -> Iterator[News]:
        """Restores an upload as soon as there is room, and tells of it; the last news has the result.

        Closing the iterator ends the work within a step.

        Raises:
            UserError: it can't be restored.
        """
        news: queue.SimpleQueue[News | None] = queue.SimpleQueue()
        gone = threading.Event()
        work = self.pool.submit(self._restore, path, wish, news.put, gone)
        work.add_done_callback(lambda _: news.put(None))
        try:
            while (item := news.get()) is not None:
                yield item
            work.result()
        finally:
            gone.set()

    def close(self) -> None:
        self.pool.shutdown(cancel_futures=True)

    def _restore(self, path: Path, wish: Wish, tell: Callable[[News], None], gone: threading.Event) -> None:
        report = Report(path.name, new_place(self.folder), tell, gone)
        start = time.perf_counter()
        defaults = self.models.defaults(wish.offer, **wish.options())  # so that a wrong option is refused at once
        opened = self._open(path, defaults.upscale, wish.task == AUTO)
        if not self.models.is_loaded(wish.offer):
            report.say(f"the model {wish.offer.name} is loaded first")
        task = opened.task or wish.chosen_task
        restorer = self.models.restorer(wish.offer, task)
        options = restorer.options(**wish.options())
        whole = self.models.with_faces(wish.offer, task, wish.options()) if wish.faces else restorer
        steps = 0 if options.stage == "1" else options.steps
        size = enlarged(opened.images.shape[-2:], options.upscale)
        report.begin(resize(opened.images, size), steps)

        def look(z_0: Tensor) -> Tensor:
            return restorer.preview(z_0, size, options)

        try:
            result = whole.restore(
                opened.images, options, on_step=lambda i, z_0: report.step(i, z_0, look), on_stage1=report.stage1
            )
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(f"{path.name} needs more memory than there is here; choose a smaller upscale") from error
        picture = opened.back(result.image)
        file = report.place / (path.stem + SUFFIX)
        try:
            write_result(file, picture)
        except WriteError as error:
            raise UserError(str(error)) from error
        report.end(result.image, file, time.perf_counter() - start)

    def _open(self, path: Path, upscale: float, auto: bool) -> Opened:
        """Raises:
        UserError: it can't be read, or is too large.
        """
        if size := header_size(str(path)):
            for what, (width, height) in (("", size), ("the result of ", enlarged(size, upscale))):
                if width * height > self.megapixels * 1e6:
                    raise UserError(
                        f"{what}{path.name} would be {width}x{height}, and this page takes {self.megapixels:g} "
                        "megapixels at most; make it smaller"
                    )
        opened = read(str(path), auto)
        if isinstance(opened, str):
            raise UserError(opened.replace(str(path), path.name))
        return opened


class Report:
    """What is told of one restoration.

    Args:
        name: of the upload.
        place: folder for the pictures.
        gone: set when nobody listens any more.
    """

    def __init__(self, name: str, place: Path, tell: Callable[[News], None], gone: threading.Event):
        self.name, self.place, self.tell, self.gone = name, place, tell, gone
        self.pictures: dict[str, Path] = {}
        self.steps = self.looks = 0
        self.sampled = False  # the photo; what is sampled after it are its faces
        self.seen, self.cost = -math.inf, 0.0  # when a step was shown last, and the seconds that decoding it took

    def say(self, text: str, share: float = 0.0, result: Path | None = None) -> None:
        """Raises:
        Cancelled: nobody listens.
        """
        if self.gone.is_set():
            raise Cancelled(self.name)
        self.tell(News(f"{self.name}: {text}", share, dict(self.pictures), result))

    def begin(self, enlarged: Tensor, steps: int) -> None:
        self.steps = steps
        self.pictures[INPUT] = show(enlarged, self.place, INPUT)
        self.say("stage 1 removes noise, blur and blocks")

    def stage1(self, i_reg: Tensor) -> None:
        self.pictures[STAGE1] = self.pictures[NOW] = show(i_reg, self.place, STAGE1)
        what = "adds detail" if self.steps == 1 else f"samples in {self.steps} steps"
        self.say(f"stage 1 is done, stage 2 {what}", 1 / (self.steps + 2))

    def step(self, i: int, z_0: Tensor, look: Callable[[Tensor], Tensor]) -> None:
        """A step is done; its estimate is shown as often as that costs little beside the steps."""
        done, start = i + 1, time.monotonic()
        if self.sampled:
            self.say(f"faces, step {done} of {self.steps}", 1 - 1 / (self.steps + 2))
            return
        self.sampled = done == self.steps
        if not self.sampled and LOOKING * (start - self.seen) >= self.cost:
            self.looks += 1  # another name each time: browsers keep files
            self.pictures[NOW] = show(look(z_0), self.place, f"{NOW}{self.looks}")
            self.seen = time.monotonic()
            self.cost = self.seen - start
        self.say(f"step {done} of {self.steps}", (1 + done) / (self.steps + 2))

    def end(self, image: Tensor, file: Path, seconds: float) -> None:
        del self.pictures[NOW]
        self.pictures[RESULT] = show(image, self.place, RESULT)
        height, width = image.shape[-2:]
        self.say(f"{width}x{height} pixels in {seconds:.1f} s", 1.0, file)


def show(images: Tensor, place: Path, title: str) -> Path:
    """(1, 3, H, W) in [0, 1] -> a file for browsers; the picture in full is the one to download."""
    image = Image.fromarray(to_uint8(images[0]))
    image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
    path = place / f"{title.replace(' ', '')}.jpg"
    write(path, image, QUALITY)
    return path
