"""Several processes, one a device, for one folder: started by `--devices N`, or by torchrun on one node or many.

The first plans and finishes; the others only compute their share. Nothing but the plan and an end passes between them.
"""

import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from diffbir.utils.cli import UserError

T = TypeVar("T")

FOREVER = timedelta(days=365)  # shares take as long as they take; torchrun ends the others where one dies


class Terminated(BaseException):
    """SIGTERM."""


@contextmanager
def stoppable() -> Iterator[None]:
    """SIGTERM raises `Terminated`, once, as Ctrl-C raises KeyboardInterrupt."""

    def receive(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not cut off what is being tidied up
        raise Terminated

    try:
        old = signal.signal(signal.SIGTERM, receive)
    except ValueError:  # not in the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


@dataclass
class Team:
    """The processes that torchrun has started; alone without it.

    Args:
        store: where they leave each other notes.
    """

    rank: int = 0
    size: int = 1
    store: Any = field(default=None, repr=False)

    def share(self, function: Callable[[], T]) -> T:
        """What the function returns in the first process, in all of them.

        Raises:
            UserError: the function did.
        """
        if self.store is None:
            return function()
        if self.rank == 0:
            try:
                value: Any = function()
            except UserError as error:
                self.store.set("plan", pickle.dumps(error))
                raise
            self.store.set("plan", pickle.dumps(value))
            return value
        value = pickle.loads(self.store.get("plan"))
        if isinstance(value, UserError):
            raise Silent(str(value))
        return value

    def gather(self, end: str) -> list[str]:
        """What every process had to say, in the first; the others wait until it has read it."""
        if self.store is None:
            return [end]
        self.store.set(f"end{self.rank}", end)
        if self.rank == 0:
            return [self.store.get(f"end{rank}").decode() for rank in range(self.size)]
        return []

    def leave(self, code: int) -> int:
        """The same exit status for all, at the same time: torchrun ends the others when one fails."""
        if self.store is None:
            return code
        if self.rank == 0:
            self.store.set("code", str(code))
        code = int(self.store.get("code"))
        self.store.set(f"left{self.rank}", "")
        if self.rank == 0:  # the store may live in this process
            for rank in range(self.size):
                self.store.get(f"left{rank}")
        return code


class Silent(UserError):
    """The first process says it."""


def team() -> Team:
    """Raises:
    UserError: torchrun's variables are incomplete.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or "RANK" not in os.environ:
        return Team()
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
    except (ValueError, dist.DistError) as error:
        raise UserError(f"WORLD_SIZE is set, but the processes don't meet ({error}); start them by torchrun") from error
    store = dist.PrefixStore("diffbir", store)
    store.set_timeout(FOREVER)
    return Team(rank, size, store)


def device_of(name: str, rank: int) -> str:
    """The device of one of several processes on a node: the GPUs in turn, unless a number is given."""
    if name == "auto" and torch.cuda.is_available():
        name = "cuda"
    return f"cuda:{rank % max(1, torch.cuda.device_count())}" if name == "cuda" else name


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def run_devices(function: Callable[..., None], shares: Sequence[tuple]) -> list[str]:
    """Calls `function(*share, rank)` in a process for each share, and waits.

    Returns:
        What went wrong, a sentence for each process that failed.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        notes = [os.path.join(folder, str(rank)) for rank in range(len(shares))]
        processes = [
            context.Process(target=_called, args=(function, share, rank, notes[rank]), name=f"diffbir-{rank}")
            for rank, share in enumerate(shares)
        ]
        try:
            for process in processes:
                process.start()
            for process in processes:
                process.join()
        except BaseException:
            for process in processes:
                if process.is_alive():
                    process.terminate()
            for process in processes:
                if process.pid is not None:
                    process.join()
            raise
        reasons = []
        for rank, process in enumerate(processes):
            if os.path.exists(notes[rank]):
                with open(notes[rank], encoding="utf-8") as file:
                    reasons.append(file.read())
            elif process.exitcode:
                reasons.append(f"process {rank} ended with status {process.exitcode}; the same command goes on")
        return list(dict.fromkeys(reasons))


def _called(function: Callable[..., None], share: tuple, rank: int, note: str) -> None:
    """In the process: a UserError goes into a note, and a signal ends it quietly."""
    try:
        with stoppable():
            function(*share, rank)
    except UserError as error:
        with open(note, "w", encoding="utf-8") as file:
            file.write(str(error))
        sys.exit(1)
    except (KeyboardInterrupt, Terminated):
        sys.exit(1)


def parent_lives() -> bool:
    parent = multiprocessing.parent_process()
    return parent is None or parent.is_alive()
