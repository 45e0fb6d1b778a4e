"""What is done in the output folder before the first image is computed."""

import os
import re
from contextlib import ExitStack, suppress
from pathlib import Path

from diffbir.folder import manifest
from diffbir.folder.plan import Plan, pending
from diffbir.folder.writing import failure
from diffbir.utils.cli import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LEFTOVER = re.compile(r"\..*\d+\.part")  # of `utils.files.replacing`, in a run that was killed


def begin(plan: Plan, output: Path, until_done: ExitStack, *side_folders: str | None) -> None:
    """Makes the folder, keeps other runs out of it until the end, tidies up after a killed run, and writes the plan.

    Args:
        side_folders: for other files than results.

    Raises:
        UserError: the folder can't be written to, or another run is writing to it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock(output, until_done)
        outputs = [Path(item.output) for item in plan.items]
        folders = {output / path.parent for path in outputs}
        folders |= {output / side / path.parent for path in outputs for side in side_folders if side}
        for folder in {output, *folders}:
            with suppress(OSError), os.scandir(folder) as entries:
                for entry in list(entries):
                    if LEFTOVER.fullmatch(entry.name):
                        os.unlink(entry.path)
        lines = plan.lines | {line["output"]: line for line in pending(plan.items)}
        manifest.rewrite(output, lines.values())
    except OSError as error:
        raise failure(error, output / manifest.NAME) from error


def lock(folder: Path, until_done: ExitStack) -> None:
    """Raises:
    UserError: another run holds it.
    """
    if fcntl is None:
        return
    handle = os.open(folder, os.O_RDONLY)
    until_done.callback(os.close, handle)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {folder}; wait for it, or give another --output") from error
    except OSError:  # some network file systems have no locks
        return


def free_name(name: str, plan: Plan) -> str:
    """A folder in the output folder that no result lies in."""
    tops = {item.output.partition("/")[0].casefold() for item in plan.items}
    while name.casefold() in tops:
        name += "_"
    return name
