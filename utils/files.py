"""Files and folders that appear whole or not at all."""

import errno
import itertools
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
COUNT = itertools.count()


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A name beside `path` to write a file or folder to; it becomes `path` at the end, or vanishes with an error.

    An existing file is replaced; an existing folder must be empty.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Processes and threads may be writing the same file; the name of a file may be as long as the system allows.
    part = path.with_name(f".{path.name[:40]}.{os.getpid()}.{next(COUNT)}.part")
    try:
        yield part
        os.replace(part, path)
    finally:
        if part.is_dir():
            shutil.rmtree(part)
        else:
            part.unlink(missing_ok=True)


def no_room(error: BaseException | None) -> str | None:
    """What the system said if an error comes from a full disk, a quota or a limit of file sizes; else None.

    torch and safetensors raise errors of their own then, with the system's number behind or in them.
    """
    while error is not None:
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else getattr(error, "errno", None)
        if code in NO_ROOM:
            return os.strerror(code)
        error = error.__cause__ or error.__context__
    return None
