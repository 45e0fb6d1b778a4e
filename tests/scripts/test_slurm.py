"""The jobs of a cluster, with commands in place of SLURM's that write down how they are called."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from diffbir.utils.config import ROOT


@pytest.fixture
def cluster(tmp_path: Path) -> dict[str, str]:
    """Environment of a job; a training ends with $STATUS, with $WARNED not before it was told."""
    commands = {
        "srun": 'echo "srun cpus=$SRUN_CPUS_PER_TASK $@" >>"$CALLS"\n'
        'case "$*" in *--overlap*) ;; *)\n'
        'while [ -n "$WARNED" ] && ! grep -q "overlap.*pkill" "$CALLS"; do sleep 0.02; done; exit "$STATUS";; esac',
        "scontrol": 'case "$1" in show) echo node1;; *) echo "scontrol $@" >>"$CALLS";; esac',
    }
    for name, body in commands.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "STATUS": "0",
        "WARNED": "",
        "SLURM_JOB_ID": "4711",
        "SLURM_CPUS_PER_TASK": "13",
        "SLURM_NTASKS_PER_NODE": "8",
        "SLURM_NNODES": "2",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }


def calls(cluster: dict[str, str]) -> str:
    return Path(cluster["CALLS"]).read_text()


@pytest.mark.parametrize("status, requeued", [(0, False), (1, False), (128 + signal.SIGUSR1, True)])
def test_a_job_whose_training_took_the_warning_is_queued_again(cluster, status, requeued):
    script = ROOT / "scripts/slurm/train.sbatch"
    run = subprocess.run(["bash", script, "train.py"], env=cluster | {"STATUS": str(status)})
    assert run.returncode == status
    assert ("scontrol requeue 4711" in calls(cluster)) == requeued
    assert "srun cpus=13 " in calls(cluster) and "train.py resume=auto" in calls(cluster)


@pytest.mark.parametrize("job", [4711, 24710])
def test_trainings_of_torchrun_are_told_of_the_warning_and_the_job_is_queued_again(cluster, job):
    script, cluster = ROOT / "scripts/slurm/torchrun.sbatch", cluster | {"SLURM_JOB_ID": str(job), "WARNED": "1"}
    with subprocess.Popen(["bash", script, "train.py"], env=cluster) as running:
        while not catches(running.pid, signal.SIGUSR1):
            assert running.poll() is None
            time.sleep(0.01)
        running.send_signal(signal.SIGUSR1)
        running.wait(60)
    assert f"scontrol requeue {job}" in calls(cluster)
    assert f"--rdzv-endpoint=node1:{20000 + job % 20000} " in calls(cluster)  # two jobs of a node don't share one
    assert calls(cluster).count("srun cpus=13 ") == 2


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for a signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text())
    return bool(int(caught[1], 16) >> number - 1 & 1)
