"""The benchmarks that restore photos run as they are documented, and share what they are asked and what they report."""

import pytest
import torch

from benchmarks import arguments, few_steps, guidance, machine, peak_memory, quality
from benchmarks.pairs import synthetic_pairs
from diffbir.model.presets import load_preset
from diffbir.utils.metrics import psnr

PHOTOS = ["--input", "inputs/demo", "--count", "1", "--size", "64", "--preset", "mini"]


def cells(text: str, title: str) -> list[str]:
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {title} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def test_the_table_of_quality_holds_what_the_pairs_give(capsys):
    assert quality.main([*PHOTOS, "--steps", "1"]) == 0
    out = capsys.readouterr().out
    hq, lq = synthetic_pairs("inputs/demo", 64, 1)
    assert cells(out, "degraded (bicubic)")[1] == f"{psnr(lq, hq)[0]:.2f}"
    assert f"torch {torch.__version__.partition('+')[0]}" in out
    args = arguments.parser("")
    arguments.add_preset(args)
    i_reg = arguments.restorer(args.parse_args([])).restore(lq).stage1
    assert cells(out, "stage 1")[1] == f"{psnr(i_reg, hq)[0]:.2f}"


@pytest.mark.parametrize("benchmark, row", [(guidance, "`ddim`"), (few_steps, "`ddim`")])
def test_grids_of_solvers_and_steps_run(benchmark, row, capsys):
    scales = ["--scales", "0", "1e5"] if benchmark is guidance else []
    assert benchmark.main([*PHOTOS, "--solvers", "ddim", "--steps", "1", *scales]) == 0
    assert cells(capsys.readouterr().out, row)[1] == "1"


def test_the_table_of_memory_holds_what_a_process_took(capsys):
    assert peak_memory.main(["--sizes", "32", "--precisions", "fp32", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert 0.2 < float(cells(out, "32x32")[1]) < 3  # GB, of which Python and torch take most
    weights = sum(peak_memory.sizes_of_weights(load_preset("mini")).values())
    assert f"weights in fp32: {4 * weights / 1e9:.2f} GB" in out


def test_the_machine_is_named(tmp_path, monkeypatch):
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Some CPU @ 3 GHz\n")
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "cpuinfo")
    assert machine.processor() == "Some CPU @ 3 GHz"
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "none")
    assert machine.processor()
