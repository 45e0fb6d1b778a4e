"""scripts/evaluate.py from end to end, on small pictures; and what a training logs against what it says."""

import csv
import hashlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffbir.evaluation import datasets
from diffbir.evaluation.datasets import DATASETS, Dataset
from diffbir.evaluation.metrics import build_set
from diffbir.evaluation.protocols import PROTOCOLS
from diffbir.evaluation.report import from_json, to_json
from diffbir.model.training.base import Trainable
from diffbir.utils.image import read_rgb, to_tensor, write_png
from diffbir.utils.metrics import LPIPS, psnr, ssim
from scripts import evaluate
from tests.evaluation.pairs import damaged, photo
from tests.test_start_up import HEAVY, answer, loaded

NAMES = ("astronaut", "coffee", "chelsea")
FAST = ["--metrics", "psnr", "ssim", "lpips"]


@pytest.fixture
def folders(tmp_path) -> Path:
    """hr/ with three photos, noise/ and blur/ with damaged ones called as programs call them; 40 x 56."""
    for i, name in enumerate(NAMES):
        y = np.ascontiguousarray(photo(name)[i : 40 + i, :56])
        write_png(tmp_path / "hr" / f"{name}.png", y)
        write_png(tmp_path / "noise" / f"{name}_x4.png", damaged(y, 0))
        write_png(tmp_path / "blur" / f"{name}_LR4.png", damaged(y, 1))
    return tmp_path


def run(folder: Path, *arguments: object) -> int:
    return evaluate.main([*map(str, arguments), "--output", str(folder / "out"), "--device", "cpu"])


def report(folder: Path) -> dict:
    return json.loads((folder / "out" / "report.json").read_text())


def pictures(folder: Path, name: str) -> Tensor:
    paths = [next((folder / name).glob(f"{picture}*")) for picture in sorted(NAMES)]
    return torch.stack([to_tensor(read_rgb(path)) for path in paths])


def test_the_report_says_what_was_measured_and_how(folders, capsys):
    arguments = [
        f"noise={folders / 'noise'}",
        folders / "blur",
        "--reference",
        folders / "hr",
        "--protocol",
        "classical",
    ]
    assert run(folders, *arguments, *FAST, "--compare", "noise", "blur", "--batch", 2) == 0
    found = report(folders)
    assert found["protocol"] | {"description": "", "used_by": ""} == {
        **{"name": "classical", "channel": "y", "crop": 4, "centre": 0, "description": "", "used_by": ""}
    }
    x, y = pictures(folders, "noise"), pictures(folders, "hr")
    scores = [row["scores"] for row in found["methods"]["noise"]["images"]]
    expected = {"psnr": psnr(x, y, 4, "y"), "ssim": ssim(x, y, 4, "y"), "lpips": LPIPS()(x, y)}
    for name, values in expected.items():
        assert [row[name] for row in scores] == pytest.approx(values.tolist(), rel=1e-5)
        entry = found["methods"]["noise"]["summary"][name]
        assert entry["mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert entry["error"] == pytest.approx(values.std().item() / math.sqrt(3), rel=1e-4)
    assert found["metrics"]["psnr"]["variant"] == "Y of BT.601 (16 to 235), border crop 4"
    assert next(iter(found["metrics"]["lpips"]["weights"].values())).startswith("efc2a86299ad1a")
    (row, *_) = found["methods"]["blur"]["images"]
    assert row["result_sha256"] == hashlib.sha256((folders / "blur/astronaut_LR4.png").read_bytes()).hexdigest()
    assert {"torch", "torchmetrics"} <= found["versions"].keys()
    assert found["comparisons"][0]["differences"]["psnr"]["mean"] == pytest.approx(
        (expected["psnr"] - psnr(pictures(folders, "blur"), y, 4, "y")).mean().item(), rel=1e-4
    )

    text = (folders / "out/report.md").read_text()
    assert "| | pictures | PSNR-Y ↑ | SSIM-Y ↑ | LPIPS ↓ |" in text
    assert f"| noise | 3 | {expected['psnr'].mean():.2f} ± " in text
    assert (
        "protocol `classical`" in text and "4 pixels of each border left out" in text and "--compare noise blur" in text
    )
    assert "blur is better" in text
    assert text.strip() in capsys.readouterr().out
    rows = list(csv.DictReader((folders / "out/scores.csv").open()))
    assert len(rows) == 6 and rows[0]["method"] == "noise"
    assert float(rows[0]["psnr"]) == pytest.approx(expected["psnr"][0].item(), rel=1e-5)
    for name in ("distributions.png", "plane.png"):
        assert Image.open(folders / "out" / name).size[0] > 400
    assert evaluate.main(["--compare", *[str(folders / "out/report.json")] * 2]) == 0
    assert "no certain difference" in capsys.readouterr().out


def test_unpaired_damaged_and_differently_sized_pictures_are_named(folders, capsys):
    (folders / "noise/coffee_x4.png").write_bytes(b"nothing")
    write_png(folders / "noise/chelsea_x4.png", np.zeros((10, 14, 3), np.uint8))
    write_png(folders / "noise/alone.png", np.zeros((40, 56, 3), np.uint8))
    write_png(folders / "hr/missing.png", np.zeros((40, 56, 3), np.uint8))
    assert run(folders, folders / "noise", "--reference", folders / "hr", "--metrics", "psnr", "niqe") == 1
    method = report(folders)["methods"]["noise"]
    assert method["count"] == 1
    assert method["lone_results"] == ["alone.png"] and method["lone_references"] == ["missing.png"]
    text = capsys.readouterr()
    assert "NOTE: 1 results without a reference: alone.png" in text.out
    assert "coffee_x4.png is not an image" in text.err
    assert "14 x 10 pixels and" in text.err and "restore at the size of the reference" in text.err
    assert "no NIQE: Images of 40 x 56 are too small" in text.err
    assert method["summary"]["niqe"]["count"] == 0 and method["images"][0]["scores"]["niqe"] is None


def test_what_cannot_be_had_is_left_out_and_says_how_to_get_it(folders, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("diffbir.evaluation.metrics.INCEPTION_WEIGHTS", tmp_path / "inception.pth")
    monkeypatch.setattr("diffbir.utils.naturalness.BRISQUE_WEIGHTS", tmp_path / "brisque.safetensors")
    metrics = ["psnr", "brisque", "fid", "pyiqa:no-such-metric"]
    assert run(folders, folders / "noise", "--reference", folders / "hr", "--metrics", *metrics) == 0
    skipped = report(folders)["skipped"]
    assert list(report(folders)["metrics"]) == ["psnr"]
    assert "convert_weights.py --brisque" in skipped["brisque"]
    assert "download_weights.py inception.pth" in skipped["fid"]
    assert "pyiqa" in skipped["pyiqa:no-such-metric"]
    assert "left out, brisque: weights not found" in capsys.readouterr().out
    assert run(folders, folders / "noise", "--metrics", "psnr") == 1
    assert "none is given" in capsys.readouterr().err
    assert run(folders, folders / "noise", "--reference", folders / "hr", "--metrics", "pnsr") == 1
    assert "there is no metric 'pnsr'; there are psnr, ssim" in capsys.readouterr().err


def test_a_preset_restores_first(folders, tmp_path):
    arguments = ["--preset", "mini", "--stage", "1", "--input", folders / "noise", "--reference", folders / "hr"]
    assert run(folders, *arguments, "--metrics", "psnr", "--centre", 32) == 0
    restored = folders / "out/restored/mini"
    assert sorted(path.name for path in restored.glob("*.png")) == sorted(f"{name}_x4.png" for name in NAMES)
    found = report(folders)
    assert found["protocol"]["name"] == "rgb, changed" and found["protocol"]["centre"] == 32
    x = to_tensor(read_rgb(restored / "astronaut_x4.png"))[None, :, 4:36, 12:44]
    y = to_tensor(read_rgb(folders / "hr/astronaut.png"))[None, :, 4:36, 12:44]
    first = found["methods"]["mini"]["images"][0]
    assert first["name"] == "astronaut.png" and (first["width"], first["height"]) == (32, 32)
    assert first["scores"]["psnr"] == pytest.approx(psnr(x, y).item(), rel=1e-5)


def test_datasets_know_their_folders_size_and_source(folders, monkeypatch, capsys):
    assert run(folders, folders / "noise", "--dataset", "realsr", "--data", folders / "sets") == 1
    text = capsys.readouterr().err
    assert f"unpack the folder RealSRVal_crop128 of StableSR_testsets.zip as {folders}/sets/RealSRVal_crop128" in text
    assert "huggingface.co/datasets/Iceclear/StableSR-TestSets" in text
    small = Dataset("Small", 4, "lq", "hr", (64, 56), 1, "y", "https://example.org", "make it")
    monkeypatch.setitem(DATASETS, "realsr", (".", small))
    (folders / "lq").mkdir()
    assert run(folders, folders / "noise", "--dataset", "realsr", "--data", folders, "--metrics", "psnr") == 0
    found = report(folders)
    assert found["protocol"]["name"] == "y" and found["dataset"]["source"] == "https://example.org"
    assert found["warnings"] == [
        "Small has 4 pictures, and 3 are here",
        "Small has pictures of 64 x 56, and 3 here differ, such as 56 x 40",
    ]


@pytest.mark.parametrize("name", DATASETS)
def test_every_dataset_is_complete(name):
    _, dataset = DATASETS[name]
    assert dataset.protocol in PROTOCOLS and dataset.source.startswith("https://") and dataset.count > 0
    size = dataset.size or (1, 1)
    assert datasets.faults(dataset, [size] * dataset.count) == []


def test_fid_and_kid_are_those_of_their_formulas():
    """Features are the mean of each channel. FID of Gaussians with diagonal covariance is a sum over the axes."""

    class Means(nn.Module):
        num_features = 3

        def forward(self, x: Tensor) -> Tensor:
            return x.float().mean(dim=(2, 3)) / 255

    generator = torch.Generator().manual_seed(0)
    x, y = (
        torch.rand(400, 3, 1, 1, generator=generator).expand(-1, -1, 4, 4) * s + o for s, o in ((0.5, 0), (0.8, 0.2))
    )
    scores = {}
    for name in ("fid", "kid"):
        metric = build_set(name, len(x), torch.device("cpu"), Means())
        metric.update(x, False)
        metric.update(y, True)
        scores[name] = metric.compute()
    distance = 3 * ((0.25 - 0.6) ** 2 + (0.5 / math.sqrt(12) - 0.8 / math.sqrt(12)) ** 2)
    assert scores["fid"] == pytest.approx(distance, rel=0.05)
    u, v = (Means()(a.mul(255).round().byte()).double() for a in (x, y))
    k = [(a @ b.T / 3 + 1) ** 3 for a, b in ((u, u), (v, v), (u, v))]
    off = [(m.sum() - m.trace()) / (400 * 399) for m in k[:2]]
    assert scores["kid"] == pytest.approx(1000 * (off[0] + off[1] - 2 * k[2].mean()).item(), rel=1e-3)


def test_a_training_logs_what_the_script_says(folders):
    """On pictures that were not rounded to 8 bits yet."""
    y = pictures(folders, "hr")
    x = (y + 0.1 * torch.randn(y.shape, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    logged: dict[str, Tensor] = {}

    class Module(Trainable):
        def log_means(self, batch, **values) -> None:
            logged.update({f"val/{name}": value.mean() for name, value in values.items()})

    Module({}, {}, optimizer=None).log_scores({"hq": y}, x)
    for name, image in zip(sorted(NAMES), x, strict=True):
        rgb = image.permute(1, 2, 0).mul(255).round().byte().numpy()
        write_png(folders / "mine" / f"{name}.png", rgb)
    assert run(folders, folders / "mine", "--reference", folders / "hr", *FAST) == 0
    for name, entry in report(folders)["methods"]["mine"]["summary"].items():
        assert logged[f"val/{name}"].item() == pytest.approx(entry["mean"], rel=1e-5)


def test_json_keeps_what_it_has_no_number_for(tmp_path):
    found = {
        "protocol": {},
        "metrics": {},
        "methods": {},
        "warnings": [],
        "a": {"b": math.inf, "c": math.nan, "d": 1.5},
    }
    (tmp_path / "report.json").write_text(to_json(found))
    assert json.loads(to_json(found))["a"] == {"b": "inf", "c": None, "d": 1.5}
    back = from_json(tmp_path / "report.json")["a"]
    assert back["b"] == math.inf and math.isnan(back["c"]) and back["d"] == 1.5


@pytest.mark.parametrize(
    "flags, code, words",
    [
        (["--help"], 0, "--protocol"),
        (["x", "--solver", "none"], 2, "invalid choice: 'none'"),
        (["--preset", "mini", "--stepps", "4", "--input", "x"], 2, "unrecognized arguments: --stepps"),
    ],
)
def test_help_and_wrong_flags_are_answered_without_torch(flags, code, words):
    done = answer("-X", "importtime", "scripts/evaluate.py", *flags)
    assert done.returncode == code
    assert words in done.stdout + done.stderr
    assert not loaded(done) & HEAVY
