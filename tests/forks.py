"""Processes of their own, forked from one that has imported what they need, which else takes seconds.

It has computed nothing yet. What forks from the tests themselves inherits the locks and the heap that thousands of them
leave, and has crashed in there.
"""

import multiprocessing
import os
import runpy
import signal
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["diffbir.restore", "diffbir.model.training.command"])


def begin(output: Path) -> None:
    """In the new process: all that it says goes into a file, and Ctrl-C is heard."""
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 1)
    os.dup2(1, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells leave it out for what runs in the background


def script(output: Path, command: list[str]) -> None:
    begin(output)
    os.chdir(ROOT)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


class Running:
    """What `subprocess.Popen` would give for `python SCRIPT ARGS`, from the checkout."""

    def __init__(self, *command: object):
        self.file = Path(tempfile.mkstemp(suffix=".log")[1])
        self.process = CONTEXT.Process(target=script, args=(self.file, list(map(str, command))))
        self.process.start()

    def __enter__(self) -> "Running":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.join()
        self.file.unlink()

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def output(self) -> str:
        return self.file.read_text()

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        return self.process.exitcode

    def wait(self, seconds: float = 120) -> int:
        """Exit status; negative is the signal that killed it."""
        self.process.join(seconds)
        assert self.process.exitcode is not None, self.output
        return self.process.exitcode
