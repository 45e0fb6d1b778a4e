"""Help and a wrong flag are answered before torch is loaded, which takes more than a second."""

import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import pytest

from diffbir.model.sampling import solvers
from diffbir.utils import choices, color, precision

ROOT = Path(__file__).parents[1]
COMMANDS = {"script": ["inference.py"], "module": ["-m", "diffbir"]}
FLAGS = {"--help": (0, "--guidance-scale"), "--stepps": (2, "unrecognized arguments"), "--solver=x": (2, "ddpm")}


def answer(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_answers_without_torch(command, flag):
    run = answer("-X", "importtime", *COMMANDS[command], flag, "--input", "x", "--output", "y")
    code, words = FLAGS[flag]
    assert run.returncode == code
    assert words in run.stdout + run.stderr
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}
    assert "diffbir.model.options" in loaded
    assert not loaded & {"torch", "torchvision", "cv2", "PIL.Image", "pytorch_lightning"}


def test_help_comes_within_a_second():
    """Median of five."""
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        answer("inference.py", "--help")
        seconds.append(time.perf_counter() - start)
    assert median(seconds) < 1


def test_importing_the_package_loads_nothing_until_the_object_is_asked_for():
    script = (
        "import sys, diffbir; assert 'torch' not in sys.modules; from diffbir import Restorer; Restorer.from_preset"
    )
    assert answer("-c", script).returncode == 0


def test_every_name_that_is_offered_means_something():
    assert tuple(precision.PRECISIONS) == choices.PRECISIONS
    assert tuple(color.ALIGNMENTS) == choices.ALIGNMENTS
    assert {solver.spacing for solver in solvers.SOLVERS.values()} <= set(solvers.SPACINGS)
