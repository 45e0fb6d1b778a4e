"""The private folder that uploads and results lie in, and what is let in and thrown out there."""

import os
import secrets
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from diffbir.utils.cli import UserError

VARIABLE = "GRADIO_TEMP_DIR"  # where Gradio keeps uploads
UPLOADS = "uploads"


@contextmanager
def private_folder(keep: float) -> Iterator[Path]:
    """A folder that only this user can read, deleted in the end; in its folder `UPLOADS`, which is Gradio's too, what
    is older than `keep` seconds is deleted before.

    Gradio's own `delete_cache` leaves behind what a broken upload or a cancelled job left.
    """
    before, over = os.environ.get(VARIABLE), threading.Event()
    with tempfile.TemporaryDirectory(prefix="diffbir-web-", ignore_cleanup_errors=True) as name:
        folder = Path(name).resolve()
        uploads = folder / UPLOADS
        uploads.mkdir()
        os.environ[VARIABLE] = str(uploads)

        def tidy() -> None:
            while not over.wait(min(60.0, keep / 2)):
                sweep(uploads, keep)

        sweeper = threading.Thread(target=tidy, name="sweeper", daemon=True)
        sweeper.start()
        try:
            yield folder
        finally:
            over.set()
            sweeper.join()
            if before is None:
                del os.environ[VARIABLE]
            else:
                os.environ[VARIABLE] = before


def sweep(folder: Path, keep: float) -> None:
    """Deletes files that nobody has changed for `keep` seconds, and folders that have been empty for as long."""
    limit = time.time() - keep
    for place, folders, files in os.walk(folder, topdown=False):
        for name in files:
            path = os.path.join(place, name)
            with suppress(OSError):
                if os.lstat(path).st_mtime < limit:
                    os.unlink(path)
        for name in folders:
            path = os.path.join(place, name)
            with suppress(OSError):  # it isn't empty
                if os.lstat(path).st_mtime < limit:
                    os.rmdir(path)


def new_place(folder: Path) -> Path:
    """A folder in it, whose name nobody can guess: whoever knows the address of a file may see it."""
    place = folder / secrets.token_hex(16)
    place.mkdir()
    return place


def uploaded(path: str, folder: Path) -> Path:
    """The path of a file that was uploaded; Gradio checks it too, and this is the second lock.

    Raises:
        UserError: it lies elsewhere, or isn't there any more.
    """
    real = Path(path).resolve()
    if not real.is_relative_to(folder):
        raise UserError("only uploaded pictures are opened; upload yours")
    if not real.is_file():
        raise UserError(f"{real.name} was deleted after a while; upload it again")
    return real
