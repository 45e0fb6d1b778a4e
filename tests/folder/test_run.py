"""Whole runs over folders: of mixed trouble, stopped and resumed, into folders that can't be written to."""

import json
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import inference
from diffbir.utils.image import read_rgb
from tests.folder import mixed
from tests.forks import CONTEXT, begin

TIMES = ("seconds", "finished")
FAST = ["--stage", "1", "--device", "cpu"]


def run(*args: object) -> int:
    return inference.main([str(a) for a in (*args, *FAST)])


def quiet(path: Path, args: list[str], limit: int | None) -> None:
    """In a process of its own: the command line, with all that it says in a file."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    begin(path)
    sys.exit(inference.main(args))


def start(log: Path, *args: object, limit: int | None = None) -> multiprocessing.Process:
    process = CONTEXT.Process(target=quiet, args=(log, [str(a) for a in (*args, *FAST)], limit))
    process.start()
    return process


def manifest(folder: Path) -> dict[str, dict]:
    lines = [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]
    assert [line["output"] for line in lines] == sorted({line["output"] for line in lines})
    return {line["output"]: {k: v for k, v in line.items() if k not in TIMES} for line in lines}


def files(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "manifest.jsonl"
    }


def wait_for(log: Path, process: multiprocessing.Process, output: Path, results: int) -> None:
    """Until there are so many results."""
    deadline = time.monotonic() + 240
    while sum(1 for _ in output.rglob("*.png")) < results:
        assert process.is_alive() and time.monotonic() < deadline, log.read_text()
        time.sleep(0.002)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Three of equal size in two folders."""
    for i, name in enumerate(("a.png", "b.png", "trip/c.png")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(mixed.crop(i)).save(path)
    return tmp_path / "in"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A mixed folder `in`, and what an uninterrupted run makes of it: `out`, `log`."""
    folder = tmp_path_factory.mktemp("mixed")
    mixed.make(folder / "in")
    process = start(folder / "log", "--input", folder / "in", "--output", folder / "out", "--batch", 4)
    process.join()
    assert process.exitcode == 1, (folder / "log").read_text()
    return folder


def test_of_a_mixed_folder_every_image_has_a_result_or_a_reason(whole):
    log, lines = (whole / "log").read_text(), manifest(whole / "out")
    assert "Traceback" not in log
    assert log.splitlines()[-1] == f"181 of 201 images restored, in {whole}/out"
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    wrong = [line for line in lines.values() if line["status"] == "failed"]
    assert sorted(Path(line["input"]).relative_to(whole / "in").as_posix() for line in wrong) == sorted(
        mixed.troubles()
    )
    assert len(errors) == len(wrong) == 20
    for line in wrong:
        assert [f"error: {line['error']}"] == [e for e in errors if line["input"] in e]
        assert not (whole / "out" / line["output"]).exists()
    for line in lines.values():
        if line["status"] == "done":
            size = read_rgb(line["input"]).shape[:2] if "\udcff" not in line["input"] else (18, 20)
            assert Image.open(whole / "out" / line["output"]).size == size[::-1] == tuple(line["result_size"])
    assert {Path(line["output"]).parent for line in lines.values()} == {
        Path(path).parent.relative_to(whole / "in") for path in (line["input"] for line in lines.values())
    }
    assert len(files(whole / "out")) == 181


def test_killed_at_random_points_and_rerun_it_is_the_same_file_by_file(whole, tmp_path):
    """Batches too: what is computed with what depends on the inputs alone."""
    rng = random.Random(0)
    args = ("--input", whole / "in", "--output", tmp_path / "out", "--batch", 4)
    kills = [0, *sorted(rng.sample(range(1, 170), 4))]
    for results in kills:
        process = start(tmp_path / "log", *args)
        wait_for(tmp_path / "log", process, tmp_path / "out", results)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.png")}
    process = start(tmp_path / "log", *args)
    process.join()
    assert process.exitcode == 1
    assert files(tmp_path / "out") == files(whole / "out")
    assert manifest(tmp_path / "out") == manifest(whole / "out")
    kept = [path.stat().st_mtime_ns == then for path, then in before.items()]
    assert sum(kept) >= len(kept) - 8  # all but the results whose line was lost


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_it_with_a_manifest_in_order(whole, tmp_path, number, status):
    args = ("--input", whole / "in", "--output", tmp_path / "out")
    process = start(tmp_path / "log", *args)
    wait_for(tmp_path / "log", process, tmp_path / "out", 20)
    os.kill(process.pid, number)
    process.join()
    log = (tmp_path / "log").read_text()
    assert process.exitcode == status, log
    assert "Traceback" not in log
    assert log.splitlines()[-1] == "stopped; the same command goes on"
    lines = manifest(tmp_path / "out")
    done = {output for output, line in lines.items() if line["status"] == "done"}
    assert done == set(files(tmp_path / "out"))
    assert len(lines) == 201 and 20 <= len(done) < 181


def test_finished_images_are_left_alone_and_other_settings_are_told(photos, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("--input", photos, "--output", out) == 0
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert run("--input", photos, "--output", out) == 0
    told = capsys.readouterr()
    assert "3 images finished before; --overwrite" in told.err
    assert told.out.splitlines()[-1] == f"3 of 3 images restored (3 of them before), in {out}"
    assert run("--input", photos, "--output", out, "--upscale", 2) == 0
    assert "3 of them with other settings (upscale 1.0, now 2.0); --overwrite" in capsys.readouterr().err
    for path, then in before.items():
        if path.suffix == ".png":
            assert path.stat().st_mtime_ns == then
    assert run("--input", photos, "--output", out, "--upscale", 2, "--overwrite") == 0
    assert Image.open(out / "trip" / "c.png").size == (40, 36)
    assert manifest(out)["a.png"]["settings"]["upscale"] == 2.0


def test_an_input_that_has_changed_is_restored_again_and_no_other(photos, tmp_path):
    out = tmp_path / "out"
    assert run("--input", photos, "--output", out) == 0
    then = (out / "b.png").stat().st_mtime_ns
    Image.fromarray(mixed.crop(9, 5, 6)).save(photos / "a.png")
    (photos / "b.png").touch()
    assert run("--input", photos, "--output", out) == 0
    assert Image.open(out / "a.png").size == (6, 5)
    assert (out / "b.png").stat().st_mtime_ns == then


def test_files_that_no_run_wrote_and_results_of_other_folders_are_not_replaced(photos, tmp_path, capsys):
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    (out / "a.png").write_bytes(b"mine")
    assert run("--input", photos, "--output", out) == 1
    assert (out / "a.png").read_bytes() == b"mine"
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert run("--input", photos, "--output", out) == 1
    assert (out / "a.png").read_bytes() == b"mine"
    other.mkdir()
    Image.fromarray(mixed.crop(8)).save(other / "b.png")
    before = (out / "b.png").read_bytes()
    assert run("--input", other, "--output", out) == 0
    assert (out / "b.png").read_bytes() == before
    assert (out / "b.png.png").is_file()
    assert run("--input", photos, "--output", out, "--overwrite") == 0
    assert read_rgb(out / "a.png").shape == (18, 20, 3)


def test_results_can_stand_beside_the_inputs_but_not_in_their_place(photos, tmp_path):
    (tmp_path / "list.txt").write_text("".join(f"{path}\n" for path in photos.rglob("*.png")))
    before = files(photos)
    assert run("--input", photos, "--output", photos) == 1
    assert files(photos) == before


def test_a_second_run_into_the_same_folder_is_refused(whole, photos, tmp_path, capsys):
    process = start(tmp_path / "log", "--input", whole / "in", "--output", tmp_path / "out")
    wait_for(tmp_path / "log", process, tmp_path / "out", 2)
    assert run("--input", photos, "--output", tmp_path / "out") == 1
    assert "another run is writing to" in capsys.readouterr().err
    process.kill()
    process.join()
    assert run("--input", photos, "--output", tmp_path / "out") == 0


@pytest.mark.parametrize("output, words", [("/proc/out", "cannot be written to"), ("{tmp}/file/x", "is a file")])
def test_an_output_that_cannot_be_written_to_fails_before_the_model_is_loaded(photos, tmp_path, output, words, capsys):
    (tmp_path / "file").touch()
    assert run("--input", photos, "--output", output.format(tmp=tmp_path), "weights.stage1=no.safetensors") == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert words in line


def test_a_full_disk_ends_it_with_one_sentence(photos, tmp_path):
    """A limit of 9,000 bytes a file stands in for the disk: the manifest fits, and no result."""
    process = start(
        tmp_path / "log", "--input", photos, "--output", tmp_path / "out", "--upscale", 5, "--format", "bmp", limit=9000
    )
    process.join()
    log = (tmp_path / "log").read_text()
    assert process.exitcode == 1
    errors = [line for line in log.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and "the same command goes on" in errors[0], log
    assert "Traceback" not in log
    assert run("--input", photos, "--output", tmp_path / "out", "--upscale", 5, "--format", "bmp") == 0
    assert len(files(tmp_path / "out")) == 3


def test_a_dry_run_lists_sizes_and_writes_nothing(photos, tmp_path, capsys):
    out = tmp_path / "out"
    args = ("--input", photos, "--output", out, "--long-side", 50)
    assert run(*args, "--dry-run", "weights.stage1=no.safetensors") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"a.png  20x18 -> 50x45  {out}/a.png  restore"
    assert "time unknown" in lines[-1]
    assert not out.exists()
    assert run(*args) == 0
    assert Image.open(out / "a.png").size == (50, 45)
    Image.fromarray(mixed.crop(4)).save(photos / "d.png")
    capsys.readouterr()
    assert run(*args, "--dry-run") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[-1] for line in lines[:-1]] == ["finished", "finished", "restore", "finished"]
    assert re.fullmatch(r"1 of 4 images to restore: 0\.0 megapixels, about 0 MB, about \d+ s", lines[-1])


@pytest.mark.parametrize(
    "format, kind, ending", [("jpg", "JPEG", ".jpg"), ("webp", "WEBP", ".webp"), ("tiff", "TIFF", ".tif")]
)
def test_formats_suffix_and_size(photos, tmp_path, format, kind, ending):
    out = tmp_path / "out"
    args = ("--input", photos, "--output", out, "--format", format, "--suffix", "_new", "--size", "100x27")
    assert run(*args, "--quality", 100) == 0
    with Image.open(out / f"trip/c_new{ending}") as image:
        assert (image.format, image.size) == (kind, (30, 27))


@pytest.mark.parametrize("long_side, words", [(1, None), (30, None), (321, "16 times is the most")])
def test_a_long_side_is_exact_in_either_direction(tmp_path, long_side, words, capsys):
    (tmp_path / "in.png").write_bytes(mixed.encoded(mixed.crop(0), "PNG"))
    code = run("--input", tmp_path / "in.png", "--output", tmp_path / "out", "--long-side", long_side)
    assert code == (words is not None)
    if words is None:
        assert max(Image.open(tmp_path / "out" / "in.png").size) == long_side
    else:
        assert words in capsys.readouterr().err


def test_the_same_format_keeps_what_can_be_written(tmp_path):
    for name, kind in (("a.JPEG", "JPEG"), ("b.bmp", "BMP"), ("c.gif", "GIF")):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / "in" / name).write_bytes(mixed.encoded(mixed.crop(0), kind))
    assert run("--input", tmp_path / "in", "--output", tmp_path / "out", "--format", "same") == 0
    assert sorted(files(tmp_path / "out")) == ["a.jpeg", "b.bmp", "c.png"]


@pytest.mark.parametrize("exif", ["keep", "drop"])
def test_exif_is_kept_or_dropped(tmp_path, exif, capsys):
    """Looked for among the bytes of the files, so that no reader can miss it."""
    data = Image.Exif()
    data[0x010F], data[0x0112] = "a maker", 6
    for kind in ("JPEG", "PNG", "WEBP"):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(mixed.crop(0)).save(tmp_path / "in" / f"{kind}.{kind.lower()}", exif=data)
    for other in ("jpg", "png", "webp"):
        out = tmp_path / f"{exif}-{other}"
        assert run("--input", tmp_path / "in", "--output", out, "--format", other, "--exif", exif) == 0
        for path in out.glob(f"*.{other}"):
            assert (b"a maker" in path.read_bytes()) == (exif == "keep"), path
    assert run("--input", tmp_path / "in", "--output", out, "--format", other) == 0
    assert ("exif drop, now keep" in capsys.readouterr().err) == (exif == "drop")


def test_a_picture_over_the_limit_is_refused_with_the_flag_that_raises_it(photos, tmp_path, capsys):
    large = photos / "large.png"
    Image.fromarray(np.zeros((1001, 1000), np.uint8)).save(large)
    args = ["--input", large, "--output", tmp_path / "out", "--upscale", 0.1, "--max-megapixels"]
    assert run(*args, 1) == 1
    said = capsys.readouterr().err
    assert f"{large} has 1001000 pixels, and the limit is 1000000" in said and "--max-megapixels 2 " in said
    assert run(*args, 2) == 0
    assert "DIFFBIR_MAX_PIXELS" not in os.environ


def test_a_batch_makes_what_single_images_make(photos, tmp_path):
    for batch in (1, 3):
        assert run("--input", photos, "--output", tmp_path / str(batch), "--batch", batch) == 0
    for name in ("a.png", "b.png", "trip/c.png"):
        one, three = (read_rgb(tmp_path / batch / name).astype(int) for batch in ("1", "3"))
        assert np.abs(one - three).max() <= 1


def test_the_stages_of_an_input_folder_called_stages_lie_elsewhere(photos, tmp_path):
    (photos / "trip").rename(photos / "stages")
    assert run("--input", photos, "--output", tmp_path / "out", "--save-stages") == 0
    assert len(files(tmp_path / "out")) == 6
    assert Image.open(tmp_path / "out/stages/c.png").size == (20, 18)


def test_an_auto_task_is_chosen_for_each_image_and_recorded(photos, tmp_path, capsys):
    preset = tmp_path / "tasks.yaml"
    mini = Path("configs/inference/mini.yaml").resolve()
    preset.write_text(f"include: {mini}\ntasks: {{sr: mini, denoise: mini}}\n")
    noise = np.random.default_rng(0).normal(0, 25, (64, 64, 3))
    Image.fromarray((128 + noise).clip(0, 255).astype(np.uint8)).save(photos / "noise.png")
    Image.fromarray(np.full((64, 64, 3), 90, np.uint8)).save(photos / "flat.png")
    assert run("--input", photos, "--output", tmp_path / "out", "--preset", preset, "--task", "auto") == 0
    lines = manifest(tmp_path / "out")
    assert lines["noise.png"]["task"] == "denoise" and lines["flat.png"]["task"] == "sr"
    assert "tasks that were chosen: denoise " in capsys.readouterr().err
    assert run("--input", photos, "--output", tmp_path / "no", "--task", "auto") == 1
    assert "has no task" in capsys.readouterr().err


def test_heic_is_read_where_the_package_is(tmp_path):
    """`photo.heic` is a crop of the photo of these tests, of quality 80."""
    pytest.importorskip("pi_heif")
    photo = Path(__file__).with_name("photo.heic")
    assert run("--input", photo, "--output", tmp_path, "--save-stages") == 0
    stages = read_rgb(tmp_path / "stages" / "photo.png")
    assert np.abs(stages[-32:, :40].astype(int) - mixed.crop(3, 32, 40)).mean() < 8
