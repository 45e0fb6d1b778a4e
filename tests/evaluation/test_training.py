"""From a training's log to the script, over a whole run: the same pictures get the same scores."""

import json
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from diffbir.utils.image import write_png
from scripts import evaluate
from tests.evaluation.pairs import damaged, photo
from tests.runs import run


def logged(run_dir: Path, name: str) -> float:
    (file,) = (run_dir / "logs").glob("events*")
    return EventAccumulator(str(file)).Reload().Scalars(name)[-1].value


def test_a_run_logs_what_the_script_says_of_its_weights(tmp_path):
    """Three pairs in batches of two: the mean is over pictures, not over batches."""
    for i, name in enumerate(("astronaut", "coffee", "chelsea")):
        clean = np.ascontiguousarray(photo(name)[:64, :64])
        write_png(tmp_path / f"hq/{i}.png", clean)
        write_png(tmp_path / f"lq/{i}.png", damaged(clean, i))
    pairs = {"hq": str(tmp_path / "hq"), "lq": str(tmp_path / "lq")}
    source = {"target": "dataset.sources.pairs.PairFolders", "params": pairs}
    changes = ["data.params.val.params.crop_size=64", "data.params.val.params.limit=3"]
    changes += ["data.params.val_batch_size=2", "data.params.val.params.degradation=null"]
    changes += [f"val_photos={json.dumps(source)}", "trainer.params.precision=32-true"]
    run("stage1", tmp_path / "run", 2, *changes)

    arguments = ["--preset", tmp_path / "run/config.yaml", "--stage", "1", "--input", tmp_path / "lq"]
    arguments += ["--reference", tmp_path / "hq", "--output", tmp_path / "out", "--device", "cpu"]
    assert evaluate.main([*map(str, arguments), "--metrics", "psnr", "ssim", "lpips"]) == 0
    (method,) = json.loads((tmp_path / "out/report.json").read_text())["methods"].values()
    for name, entry in method["summary"].items():
        # Exported weights are half precision.
        assert logged(tmp_path / "run", f"val/{name}") == pytest.approx(entry["mean"], rel=1e-3)
        scores = [row["scores"][name] for row in method["images"]]
        of_batches = (sum(scores[:2]) / 2 + scores[2]) / 2
        assert abs(of_batches - entry["mean"]) > 2e-3 * entry["mean"]
