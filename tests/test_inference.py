"""The command line, as a person uses it."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from diffbir.utils.image import read_rgb

FAST = ["--steps", "2"]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Crops of a real photo: two folders, an upper-case suffix, an odd size."""
    rgb = read_rgb(Path("inputs/demo/village-phone.jpg"))
    folder = tmp_path / "in"
    (folder / "trip").mkdir(parents=True)
    Image.fromarray(rgb[:40, :51]).save(folder / "a.png")
    Image.fromarray(rgb[50:90, 50:98]).save(folder / "trip" / "b.JPG", quality=40)
    return folder


def run(*args) -> int:
    return inference.main([str(a) for a in args])


def test_a_folder_is_restored_end_to_end(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--input", photos, "--output", out, "--save-stages", *FAST) == 0
    assert read_rgb(out / "a.png").shape == (40, 51, 3)
    assert read_rgb(out / "trip" / "b.png").shape == (40, 48, 3)
    stages = read_rgb(out / "stages" / "a.png")
    assert stages.shape[1] > 3 * 51
    assert np.array_equal(stages[-40:, :51], read_rgb(photos / "a.png"))
    assert np.array_equal(stages[-40:, -51:], read_rgb(out / "a.png"))
    assert "2 of 2 images restored" in capsys.readouterr().out


def test_results_do_not_depend_on_what_else_is_in_the_folder(photos, tmp_path):
    assert run("--input", photos, "--output", tmp_path / "all", *FAST, "--solver", "ddpm") == 0
    assert run("--input", photos / "trip" / "b.JPG", "--output", tmp_path / "one", *FAST, "--solver", "ddpm") == 0
    assert np.array_equal(read_rgb(tmp_path / "all" / "trip" / "b.png"), read_rgb(tmp_path / "one" / "b.png"))


def test_a_truncated_file_is_named_and_the_others_are_restored(photos, tmp_path, capsys):
    whole = (photos / "a.png").read_bytes()
    (photos / "broken.png").write_bytes(whole[: len(whole) // 2])
    assert run("--input", photos, "--output", tmp_path / "out", *FAST) == 1
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1
    assert "broken.png" in errors[0]
    assert (tmp_path / "out" / "a.png").exists()
    assert (tmp_path / "out" / "trip" / "b.png").exists()
    assert not (tmp_path / "out" / "broken.png").exists()
    assert "2 of 3 images restored" in captured.out


def test_running_again_into_a_folder_inside_the_input_ignores_earlier_results(photos, capsys):
    for _ in range(2):
        assert run("--input", photos, "--output", photos / "out", "--stage", "1") == 0
    assert "2 of 2 images restored" in capsys.readouterr().out.splitlines()[-1]


def test_same_names_with_other_suffixes_do_not_overwrite_each_other(photos, tmp_path):
    Image.fromarray(read_rgb(photos / "a.png")).save(photos / "a.jpg")
    assert run("--input", photos, "--output", tmp_path / "out", "--stage", "1") == 0
    assert sorted(p.name for p in (tmp_path / "out").glob("*.png")) == ["a.jpg.png", "a.png.png"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["--input", "{tmp}/nothing"], "does not exist"),
        (["--input", "{tmp}/empty"], "no images in"),
        (["--input", "{in}", "weights.unet=missing.safetensors"], "weights not found"),
        (["--input", "{in}", "weights.unt=x"], "unknown key 'weights.unt'"),
        (["--input", "{in}", "--preset", "{tmp}/typo.yaml"], "unknown key 'networks.stage1.params.embed_dimm'"),
        (["--input", "{in}", "--preset", "{tmp}/none.yaml"], "no configuration file"),
        (["--input", "{in}", "--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--input", "{in}", "--steps", "0"], "steps must be at least 1"),
    ],
)
def test_bad_input_gives_one_clear_sentence(args, words, photos, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    preset = Path("configs/inference/mini.yaml").resolve()
    (tmp_path / "typo.yaml").write_text(f"include: {preset}\nnetworks: {{stage1: {{params: {{embed_dimm: 3}}}}}}\n")
    args = [a.format(tmp=tmp_path, **{"in": photos}) for a in args]
    assert run(*args, "--output", tmp_path / "out") == 1
    captured = capsys.readouterr()
    (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert words in line
    assert not (tmp_path / "out").exists()
