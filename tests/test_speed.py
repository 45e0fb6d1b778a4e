"""The runner of timings and the kit for a GPU, rehearsed on the CPU with small networks."""

import json
import time
from pathlib import Path

import pytest
import torch

from benchmarks.speed import kit, report, timing
from benchmarks.speed.__main__ import CASES, main
from diffbir.model.training.sharding import ON_CPU

CPU = torch.device("cpu")


def test_ways_take_turns_and_medians_are_theirs():
    order = []

    def way(name, seconds):
        def run():
            order.append(name)
            time.sleep(seconds)
            return torch.ones(3)

        return run

    timings, outputs = timing.interleave({"a": way("a", 0.002), "b": way("b", 0.02)}, CPU, repeats=3)
    assert order[-6:] == ["a", "b"] * 3
    assert 0.002 <= timings["a"].fastest <= timings["a"].seconds
    assert 0.02 <= timings["b"].fastest <= timings["b"].seconds
    assert timings["b"].cpu_seconds < 0.02  # asleep
    assert torch.equal(outputs["a"], torch.ones(3))


@pytest.mark.skipif(not (timing.PROC / "clear_refs").exists(), reason="the peak is read from /proc")
def test_memory_is_that_of_the_call_alone():
    held = torch.ones(2**25)  # 134 MB, before the call
    n = 2**24
    assert timing.working_bytes(lambda: held[:n] + 1, CPU) == pytest.approx(4 * n, rel=0.1)
    assert timing.working_bytes(lambda: None, CPU) < 2**22


def test_the_difference_is_relative_to_the_reference():
    reference = [torch.tensor([3.0, -3.0]), None]
    assert timing.difference([torch.tensor([3.0, -2.7]), None], reference) == pytest.approx(0.1)


def run(tmp_path, capsys, *flags: str) -> list[dict]:
    file = tmp_path / "records.json"
    assert main([*flags, "--device", "cpu", "--tiny", "--repeats", "1", "--json", str(file)]) == 0
    records, shown = [json.loads(line) for line in file.read_text().splitlines()], capsys.readouterr().out
    assert all(report.table(record) in shown for record in records)
    return records


def test_both_sides_of_every_comparison_compute_the_same(tmp_path, capsys):
    records = run(tmp_path, capsys, "--case", "denoiser", "swinir", "encode", "decode")
    records += run(tmp_path / "cfg", capsys, "--case", "denoiser", "--cfg", "--part", "branch")
    for record in records:
        ours, other = record["rows"]
        assert ours["difference"] < 1e-4, record["case"]
        assert other["ratio"] == 1 and ours["ratio"] == pytest.approx(other["seconds"] / ours["seconds"])
        assert 0.5 < ours["weight_bytes"] / other["weight_bytes"] < 1.5 and record["flops"] > 1e6


def test_training_steps_lose_the_same(tmp_path, capsys):
    for record in run(tmp_path, capsys, "--case", "train_stage1", "train_stage2"):
        assert record["rows"][0]["difference"] < 1e-4, record["case"]


def test_every_case_is_described_and_every_item_of_the_kit_is_a_case(tmp_path):
    assert all(make.__doc__ for make in CASES.values())
    named = {word for item in kit.plan("cuda", False, tmp_path) for word in item.command if word in CASES}
    assert named == set(CASES)


def test_the_kit_fits_ten_minutes_in_its_order(tmp_path):
    """What it is for comes within the time even if every item before takes all that it may."""
    items = list(kit.plan("cuda", False, tmp_path))
    needed = [i for i, item in enumerate(items) if item.title in ("4K in 8 GB", "DDP on one card", "FSDP on one card")]
    assert sum(item.seconds for item in items[: max(needed) + 1]) <= 600


def test_the_kit_reports_what_passes_fails_and_finds_no_time(tmp_path, capsys):
    arguments = ["--output", str(tmp_path), "--device", "cpu", "--tiny"]
    assert kit.main([*arguments, "--only", "what"]) == 0
    (peak,) = json.loads((tmp_path / "results.json").read_text())
    assert peak["status"] == "passed" and peak["records"][0]["case"] == "peak"
    assert "**peak**" in (tmp_path / "performance.md").read_text()
    (tmp_path / "wrong.py").write_text("raise SystemExit('no such card')")
    outcome = kit.carry_out(kit.Item("wrong", [str(tmp_path / "wrong.py")]), 60, tmp_path)
    assert outcome.status == "failed" and "no such card" in kit.markdown([outcome])
    (tmp_path / "slow.py").write_text(
        "import pathlib, subprocess, time\n"
        "pathlib.Path(__file__).with_suffix('.pid').write_text(str(subprocess.Popen(['sleep', '60']).pid))\n"
        "time.sleep(60)"
    )
    assert kit.carry_out(kit.Item("slow", [str(tmp_path / "slow.py")]), 2, tmp_path).status == "out of time"
    child = Path("/proc", (tmp_path / "slow.pid").read_text(), "stat")  # ended with what started it
    assert not child.exists() or child.read_text().split()[2] == "Z"
    assert kit.main([*arguments, "--minutes", "0", "--only", "what"]) == 0
    assert {o["status"] for o in json.loads((tmp_path / "results.json").read_text())} == {"not begun"}


@pytest.mark.slow
def test_the_whole_kit_is_rehearsed(tmp_path):
    status = kit.main(["--output", str(tmp_path), "--device", "cpu", "--tiny", "--minutes", "30"])
    outcomes = json.loads((tmp_path / "results.json").read_text())
    failed = [outcome["title"] for outcome in outcomes if outcome["status"] != "passed"]
    assert failed == ([] if ON_CPU else ["FSDP on one card"]), (tmp_path / "performance.md").read_text()
    assert status == bool(failed)
