"""Two processes on the CPU, with the environment that torchrun gives: gradients, uneven data, errors and signals."""

import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from diffbir.dataset.sources.shards import write_shard
from diffbir.model.training.checkpointing import find_checkpoint
from diffbir.model.training.command import main
from diffbir.model.training.sharding import ON_CPU
from tests.forks import CONTEXT
from tests.runs import PHOTOS, ROOT, N, as_shipped, assert_equal, run, scalars, settings, state

SHARDED = pytest.mark.skipif(not ON_CPU, reason="needs torch 2.9")
STRATEGIES = {"ddp": "ddp", "fsdp": "{target: model.training.sharding.FSDP}"}
ENDLESS = ["lr_schedule=null", "validate_every=1000000"]
LIMIT = 300  # seconds after which a test counts as hanging


def train(rank: int, port: int, argv: list[str], output: Path) -> None:
    os.environ |= {
        "TORCHELASTIC_RUN_ID": "test",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
    }
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = output.open("w", buffering=1)
    for descriptor in (1, 2):  # also what C++ says before it aborts
        os.dup2(sys.stdout.fileno(), descriptor)
    faulthandler.enable()
    sys.exit(main("", "", argv))


class Ranks:
    """Two processes with the environment that torchrun gives, each writing its output to a file of its own."""

    def __init__(self, folder: Path, stage: str, *args, strategy: str = "ddp"):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        self.files = [folder / f"rank{rank}.txt" for rank in range(2)]
        spread = {"accelerator": "cpu", "devices": 2, "strategy": STRATEGIES[strategy]}
        overrides = [*settings(stage, *args), *(f"trainer.params.{k}={v}" for k, v in spread.items())]
        argv = ["--config", str(ROOT / f"configs/train/mini/{stage}.yaml"), *overrides]
        self.processes = [CONTEXT.Process(target=train, args=(rank, port, argv, self.files[rank])) for rank in range(2)]
        for process in self.processes:
            process.start()

    def wait(self) -> list[int]:
        """Exit statuses."""
        deadline = time.monotonic() + LIMIT
        for process in self.processes:
            process.join(max(0, deadline - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, self.output
        return [process.exitcode for process in self.processes]

    def wait_for(self, run_dir: Path, step: int) -> None:
        """Until there is a checkpoint of this step."""
        while not (run_dir / "checkpoints" / f"{step:07d}.ckpt").exists():
            assert all(process.is_alive() for process in self.processes), self.output
            time.sleep(0.01)

    @property
    def output(self) -> str:
        return "\n".join(file.read_text() for file in self.files)


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=SHARDED)])
def test_two_half_batches_give_the_gradient_of_the_whole_one(strategy, tmp_path):
    """After one step of SGD at rate 1, weights before - weights after."""
    options = [
        *as_shipped("stage1"),
        "module.params.loss=l2",
        "optimizer={target: torch.optim.SGD, partial: true, params: {lr: 1.0}}",
        "module.params.lr_schedule=null",
        "trainer.params.gradient_clip_val=null",
        "trainer.params.precision=32-true",
    ]
    ranks = Ranks(tmp_path, "stage1", tmp_path / "two", 1, *options, "data.params.batch_size=2", strategy=strategy)
    assert ranks.wait() == [0, 0], ranks.output
    run("stage1", tmp_path / "one", 1, *options, "data.params.batch_size=4")
    before = {f"trained.stage1.{k}": v.float() for k, v in load_file(ROOT / "weights/mini/stage1.safetensors").items()}
    one, two = (state(tmp_path / name, 1)["state_dict"] for name in ("one", "two"))
    gradients = [before[k] - one[k] for k in one]
    assert max(g.abs().max() for g in gradients) > 1e-3
    for k in one:
        assert_close(one[k], two[k], rtol=0, atol=1e-6)


def test_processes_that_lightning_starts_itself_go_on_from_the_checkpoint(tmp_path):
    """Without torchrun: they come when the first one has long looked for the checkpoint."""
    run("stage1", tmp_path, 1, "data.params.batch_size=2")
    spread = {"accelerator": "cpu", "devices": 2, "strategy": "ddp"}
    overrides = [*settings("stage1", tmp_path, 2, "data.params.batch_size=1", "resume=auto"), "lr_schedule=null"]
    argv = ["train_stage1.py", *overrides, *(f"trainer.params.{k}={v}" for k, v in spread.items())]
    settled = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": LIMIT}
    done = subprocess.run([sys.executable, *argv], **settled, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MEMBER: 2/2" in done.stderr and f"going on from {tmp_path}" in done.stderr
    assert state(tmp_path, 2)["global_step"] == 2


def test_ranks_share_a_validation_set_that_does_not_divide(tmp_path):
    """Five images, three of one rank and two of the other: the figures of one process, in batches of other sizes."""
    strategy = "fsdp" if ON_CPU else "ddp"  # the former also hangs where ranks take unequal numbers of steps
    options = ["lr=0", "data.params.val.params.limit=5", "ema_decay=0"]
    ranks = Ranks(tmp_path, "stage2", tmp_path / "two", 1, *options, "data.params.val_batch_size=2", strategy=strategy)
    assert ranks.wait() == [0, 0], ranks.output
    run("stage2", tmp_path / "one", 1, *options, "data.params.val_batch_size=4")
    one, two = (
        {name: points[0][1] for name, points in scalars(tmp_path / run_dir).items() if name.startswith("val/")}
        for run_dir in ("one", "two")
    )
    assert one.keys() == {"val/loss", "val/psnr", "val/ssim", "val/lpips"}
    assert two == pytest.approx(one, rel=1e-3)


def write_shards(folder: Path, *counts: int) -> None:
    photo = (Path(PHOTOS) / "hedgehog-small.jpg").read_bytes()
    for number, count in enumerate(counts):
        write_shard(folder / f"{number}.tar", [(f"{number}{i}", {"jpg": photo}) for i in range(count)])


@pytest.mark.parametrize("read", ["at random", "as a stream"])
def test_uneven_shards_do_not_hang(read, tmp_path):
    """One rank's shard is read five times while the other's is read once."""
    write_shards(tmp_path / "shards", 5, 1)
    options = [f"photos={tmp_path}/shards"]
    if read == "as a stream":
        urls = f"'{tmp_path}/shards/{{0..1}}.tar'"
        params = f"{{source: {urls}, crop_size: 32, degradation: '${{degradation}}'}}"
        options.append(f"data.params.train={{target: dataset.streams.StreamedPairs, params: {params}}}")
        options.append(f"val_photos={PHOTOS}")
    ranks = Ranks(tmp_path, "stage2", tmp_path / "run", 4, *options)
    assert ranks.wait() == [0, 0], ranks.output
    assert state(tmp_path / "run", 4)["global_step"] == 4


def test_an_error_in_a_loader_of_one_rank_ends_all_with_its_message(tmp_path):
    """An image is cut short while the training runs; whichever rank's loader reads it next finds it."""
    photos = tmp_path / "photos"
    photos.mkdir()
    for i in range(8):
        (photos / f"{i}.jpg").write_bytes((Path(PHOTOS) / "hedgehog-small.jpg").read_bytes())
    ranks = Ranks(tmp_path, "stage1", tmp_path / "run", 100000, f"photos={photos}", f"val_photos={PHOTOS}", *ENDLESS)
    ranks.wait_for(tmp_path / "run", N)
    broken = photos / "3.jpg"
    broken.write_bytes(broken.read_bytes()[:-2000])
    assert all(ranks.wait()), ranks.output
    messages = [line for line in ranks.output.splitlines() if line.startswith("error:")]
    assert messages and all(str(broken) in line for line in messages), ranks.output
    assert find_checkpoint(tmp_path / "run", "auto")


def test_a_signal_to_one_rank_stops_all_with_a_checkpoint(tmp_path):
    ranks = Ranks(tmp_path, "stage1", tmp_path / "run", 100000, *ENDLESS)
    ranks.wait_for(tmp_path / "run", N)
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait() == [128 + signal.SIGTERM] * 2, ranks.output
    assert int(find_checkpoint(tmp_path / "run", "auto").stem) > N


@SHARDED
def test_a_sharded_training_goes_on_bit_for_bit_and_also_in_one_process(tmp_path):
    """Its checkpoints are whole, those of any other training."""
    constant = ["lr_schedule=null", f"validate_every={N - 1}"]

    def steps(name: str, n: int, *options: str) -> Path:
        options = [*constant, *options]
        ranks = Ranks(tmp_path / "out", "stage2", tmp_path / name, n, *options, strategy="fsdp")
        assert ranks.wait() == [0, 0], ranks.output
        return tmp_path / name

    straight = steps("straight", 2 * N)
    first = f"resume={straight}/checkpoints/{N:07d}.ckpt"
    resumed = steps("resumed", 2 * N, first)
    a, b = (state(run_dir, 2 * N) for run_dir in (straight, resumed))
    assert_equal(a["state_dict"], b["state_dict"], "weights")
    assert_equal(a["optimizer_states"], b["optimizer_states"], "optimizer")
    assert_equal(a["callbacks"]["EMA"], b["callbacks"]["EMA"], "average")

    run("stage2", tmp_path / "one", 2 * N, *constant, first)
    assert state(tmp_path / "one", 2 * N)["global_step"] == 2 * N
