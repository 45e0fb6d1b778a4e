"""Several processes make of a folder what one makes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import inference
from diffbir.folder.processes import device_of
from tests.folder import mixed
from tests.folder.test_run import files, manifest
from tests.forks import Running

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}  # as torchrun has it; rounding depends on it
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]


def command(photos: Path, out: Path, *flags: str, by: list[str] = ()) -> list[str]:
    args = ["--input", photos, "--output", out, "--device", "cpu", "--steps", "2", "--batch", "2", *flags]
    return [sys.executable, *by, "inference.py", *map(str, args)]


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    """A folder `in` with a damaged image, and what one process makes of it."""
    folder = tmp_path_factory.mktemp("one")
    (folder / "in" / "deep").mkdir(parents=True)
    for i in range(5):
        (folder / "in" / "deep" / f"{i}.png").write_bytes(mixed.encoded(mixed.crop(i, 16 + 8 * (i == 2)), "PNG"))
    (folder / "in" / "bad.png").write_bytes(b"\x89PNG")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    assert inference.main(command(folder / "in", folder / "out")[2:]) == 1
    torch.set_num_threads(threads)
    return folder


@pytest.mark.parametrize("by, flags", [(TORCHRUN, []), ([], ["--devices", "2"])], ids=["torchrun", "devices"])
def test_two_processes_give_the_bytes_of_one(one, tmp_path, by, flags):
    args = command(one / "in", tmp_path / "out", *flags, by=by)
    run = subprocess.run(args, cwd=ROOT, env=ENV, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert run.stderr.count("error: ") == 1 and "bad.png" in run.stderr
    assert "5 of 6 images restored" in run.stdout
    assert files(tmp_path / "out") == files(one / "out")
    assert manifest(tmp_path / "out") == manifest(one / "out")


def test_what_stops_a_process_is_said_once_and_leaves_the_rest_to_the_next_run(one, tmp_path):
    args = command(one / "in", tmp_path / "out", "--devices", "2")[1:]
    with Running(*args, "weights.stage1=no.safetensors") as process:
        assert process.wait() == 1
        assert process.output.count("error: ") == 1 and "weights not found" in process.output
    with Running(*args) as process:
        while not list((tmp_path / "out").rglob("*.png")):
            assert process.poll() is None, process.output
            time.sleep(0.005)
        process.send_signal(signal.SIGTERM)
        assert process.wait() in (143, 1), process.output  # 1: it was done just then
        assert "Traceback" not in process.output
    assert len(manifest(tmp_path / "out")) == 6


def test_gpus_are_taken_in_turn(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert [device_of("auto", rank) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    assert [device_of("cpu", 1), device_of("cuda:1", 0)] == ["cpu", "cuda:1"]
