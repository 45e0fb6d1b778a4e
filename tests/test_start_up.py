"""Help and a wrong flag are answered before torch is loaded, which takes more than a second."""

import resource
import subprocess
import sys
from pathlib import Path
from statistics import median

import pytest

from diffbir.model.sampling import solvers
from diffbir.utils import choices, color, precision

ROOT = Path(__file__).parents[1]
COMMANDS = {"inference.py": ["inference.py"], "python -m diffbir": ["-m", "diffbir"]}
FLAGS = {"--help": (0, "--guidance-scale"), "--stepps": (2, "unrecognized arguments"), "--solver=x": (2, "ddpm")}
TRAININGS = ["train_stage1.py", "train_stage2.py", "scripts/train_autoencoder.py", "scripts/train_prior.py"]
HEAVY = {"torch", "torchvision", "cv2", "PIL.Image", "pytorch_lightning"}


def answer(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


def processor_seconds() -> float:
    """Of all processes that were started here and have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def loaded(run: subprocess.CompletedProcess) -> set[str]:
    """The modules that a process with `-X importtime` says it imported."""
    return {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if line.startswith("import time:")}


@pytest.mark.parametrize("flag", FLAGS)
@pytest.mark.parametrize("command", COMMANDS)
def test_the_command_line_answers_by_its_name_without_torch(command, flag):
    run = answer("-X", "importtime", *COMMANDS[command], flag, "--input", "x", "--output", "y")
    code, words = FLAGS[flag]
    assert run.returncode == code
    assert words in run.stdout + run.stderr
    assert f"usage: {command} [" in run.stdout + run.stderr
    assert "diffbir.model.options" in loaded(run)
    assert not loaded(run) & HEAVY


@pytest.mark.parametrize("script", TRAININGS)
@pytest.mark.parametrize("flag, code, words", [("--help", 0, "resume=auto"), ("--dry-rn", 2, "unrecognized arguments")])
def test_the_trainings_answer_without_torch(script, flag, code, words):
    run = answer("-X", "importtime", script, flag)
    assert run.returncode == code
    assert words in run.stdout + run.stderr
    assert "diffbir.model.training.command" in loaded(run)
    assert not loaded(run) & HEAVY


@pytest.mark.parametrize("command", [["scripts/webui.py"], ["-m", "diffbir", "web"]])
@pytest.mark.parametrize("flag, code, words", [("--help", 0, "--password-file"), ("--shar=1", 2, "usage:")])
def test_the_page_answers_without_torch_and_gradio(command, flag, code, words):
    run = answer("-X", "importtime", *command, flag)
    assert run.returncode == code
    assert words in run.stdout + run.stderr
    assert "diffbir.web.command" in loaded(run)
    assert not loaded(run) & (HEAVY | {"gradio"})


@pytest.mark.parametrize("script", ["inference.py", "train_stage1.py", "scripts/webui.py"])
def test_help_comes_within_a_second(script):
    """Median of five, in time of the processor: on a busy machine, others' work is not counted."""
    seconds = []
    for _ in range(5):
        start = processor_seconds()
        answer(script, "--help")
        seconds.append(processor_seconds() - start)
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
