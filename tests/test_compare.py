"""The comparison of methods, from a test set to its report, on small pictures."""

import json

import numpy as np
from numpy.testing import assert_array_equal
from PIL import Image

from benchmarks import compare
from diffbir.utils.image import read_rgb, side_by_side, write_png
from tests.evaluation.pairs import photo


def test_methods_are_restored_once_compared_and_shown(tmp_path, monkeypatch):
    for i, name in enumerate(("astronaut", "coffee")):
        clean = np.ascontiguousarray(photo(name)[:64, :48])
        write_png(tmp_path / f"hr/{i}.png", clean)
        write_png(tmp_path / f"lr/{i}.png", np.ascontiguousarray(clean[::4, ::4]))
    monkeypatch.setitem(compare.METHODS, "no such", ("nowhere.yaml", {"stage": "1"}))
    folders = ["--input", tmp_path / "lr", "--reference", tmp_path / "hr", "--output", tmp_path / "out"]
    arguments = [
        *map(str, folders),
        "--device",
        "cpu",
        "--crops",
        "3",
        "--crop-size",
        "40",
        "--metrics",
        "psnr",
        "lpips",
    ]
    arguments += ["--sheet", str(tmp_path / "sheet.jpg"), "--shown", "stage 1", "chain@0"]
    arguments += ["--methods", "bicubic", "stage 1", "chain@0", "no such", "--preset", "mini", "sampling.steps=2"]
    assert compare.main(arguments) == 0
    found = json.loads((tmp_path / "out/report.json").read_text())
    assert list(found["methods"]) == ["bicubic", "stage 1", "chain@0"]
    assert any(warning.startswith("no such is left out: ") for warning in found["warnings"])
    assert [(c["a"], c["b"]) for c in found["comparisons"]] == [("chain@0", "stage 1")]
    made = tmp_path / "out/results"
    results = {
        title: read_rgb(made / folder / "0.png")
        for title, folder in {"bicubic": "bicubic", "stage 1": "stage_1", "chain@0": "chain@0"}.items()
    }
    assert {picture.shape for picture in results.values()} == {(64, 48, 3)}
    assert len({picture.tobytes() for picture in results.values()}) == 3

    sheet = Image.open(tmp_path / "sheet.jpg")
    assert sheet.size == (40 * 3 + 4 * 2, 3 * (40 + 22))  # stage 1, chain and clean; gain, loss and what lies between

    del results["bicubic"]
    results["clean"] = read_rgb(tmp_path / "hr/0.png")
    (shown,) = (
        (tmp_path / "out/crops").glob("gain0_0.png")
        if gains(found) == "0.png"
        else [tmp_path / "out/crops/loss0_0.png"]
    )
    assert_array_equal(read_rgb(shown), side_by_side({t: p[12:52, 4:44] for t, p in results.items()}))

    written = (made / "chain@0/0.png").stat().st_mtime_ns
    (made / "stage_1/1.png").unlink()
    assert compare.main(arguments) == 0
    assert (made / "chain@0/0.png").stat().st_mtime_ns == written and (made / "stage_1/1.png").is_file()


def gains(found: dict) -> str:
    """The picture on which the full method gains most over stage 1."""
    full, stage1 = (
        {r["name"]: r["scores"]["lpips"] for r in found["methods"][t]["images"]} for t in ("chain@0", "stage 1")
    )
    return min(full, key=lambda name: full[name] - stage1[name])


def test_crops_show_gains_losses_and_what_lies_between():
    def method(*values: float) -> dict:
        return {"images": [{"name": f"{i}.png", "scores": {"lpips": v}} for i, v in enumerate(values)]}

    methods = {"chain@0": method(0.1, 0.2, 0.3, 0.4, 0.5), "stage 1": method(0.5, 0.25, 0.3, 0.3, 0.2)}
    found = {"metrics": {"lpips": {}}, "methods": methods}
    assert compare.chosen(found, [], 3) == [("gain0", "0"), ("between0", "2"), ("loss0", "4")]
    assert compare.chosen({"metrics": {}, "methods": {}}, ["a", "b", "c"], 2) == [("000", "a"), ("001", "b")]
