"""The scripts around datasets, end to end, on the demo photos."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from omegaconf import OmegaConf
from PIL import Image

from diffbir.dataset.crops import resize_short
from diffbir.dataset.degradations.resize import resize
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.sources.pairs import PairFolders
from diffbir.dataset.sources.shards import Shards
from diffbir.utils.config import instantiate
from diffbir.utils.image import list_images, read_rgb, to_uint8, write_png

ROOT = Path(__file__).parents[2]
RECIPE = str(ROOT / "configs/dataset/codeformer.yaml")


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(name: str, *arguments: object) -> int:
    return script(name).main([str(argument) for argument in arguments])


@pytest.fixture
def photos(tmp_path) -> Path:
    """Crops of the demo photos, 96 x 80, and one of 20 x 20."""
    folder = tmp_path / "photos"
    for i, path in enumerate(list_images(ROOT / "inputs/demo")):
        write_png(folder / f"{i}.png", np.ascontiguousarray(read_rgb(path)[:80, :96]))
    write_png(folder / "sub" / "small.PNG", read_rgb(path)[:20, :20])
    return folder


def add_damaged(folder: Path) -> Path:
    path = folder / "9.png"
    path.write_bytes((folder / "0.png").read_bytes()[:2000])
    return path


@pytest.mark.parametrize("name", ["make_file_list", "make_shards", "make_testset", "check_dataset"])
def test_help_explains(name, capsys):
    with pytest.raises(SystemExit) as exit:
        run(name, "--help")
    assert exit.value.code == 0
    shown = capsys.readouterr().out
    assert "python scripts/" in shown
    assert script(name).__doc__.splitlines()[0] in shown


# File lists


def test_a_file_list_splits_by_seed_and_leaves_out_small_images(photos, tmp_path, capsys):
    lists = tmp_path / "train.txt", tmp_path / "val.txt"
    command = ["make_file_list", photos, "--output", lists[0], "--val-output", lists[1], "--val", 2, "--min-size", 64]
    assert run(*command) == 0
    train, val = (list_images(path) for path in lists)
    assert len(train) == 4
    assert len(val) == 2
    assert {p.resolve() for p in train + val} == {(photos / f"{i}.png").resolve() for i in range(6)}
    assert lists[0].read_text().startswith("photos/")  # relative: list and photos can move together
    assert "1 too small" in capsys.readouterr().out
    assert run(*command) == 0
    assert list_images(lists[1]) == val
    assert run(*command, "--seed", 1) == 0
    assert list_images(lists[1]) != val


def test_a_file_that_is_no_image_is_named_or_skipped_in_a_list(photos, tmp_path, capsys):
    (photos / "text.jpg").write_text("words")
    assert run("make_file_list", photos, "--output", tmp_path / "all.txt") == 1
    assert "text.jpg is not a readable image" in capsys.readouterr().err
    assert not (tmp_path / "all.txt").exists()
    assert run("make_file_list", photos, "--output", tmp_path / "all.txt", "--on-error", "skip") == 0
    assert len(list_images(tmp_path / "all.txt")) == 7
    assert "1 unreadable" in capsys.readouterr().out


def test_lists_are_the_same_from_several_processes(photos, tmp_path, capsys):
    (photos / "text.jpg").write_text("words")
    for workers in (1, 3):
        lists = ["--output", tmp_path / f"{workers}.txt", "--val-output", tmp_path / f"val{workers}.txt", "--val", 2]
        assert run("make_file_list", photos, *lists, "--on-error", "skip", "--workers", workers) == 0
        assert "5 images" in (out := capsys.readouterr()).out and "text.jpg" in out.err
    for name in ("{}.txt", "val{}.txt"):
        assert (tmp_path / name.format(1)).read_text() == (tmp_path / name.format(3)).read_text()
    assert run("make_file_list", photos, "--output", tmp_path / "no.txt", "--workers", 2) == 1
    assert "text.jpg is not a readable image" in capsys.readouterr().err


# Shards


def test_shards_are_the_same_from_several_processes(photos, tmp_path, capsys):
    """To the last byte; and what goes wrong in one of them is one sentence."""
    bad = add_damaged(photos)
    command = ["make_shards", photos, "--per-shard", 2, "--on-error", "skip", "--output"]
    for workers in (1, 3):
        assert run(*command, tmp_path / str(workers), "--workers", workers) == 0
        shown = capsys.readouterr()
        assert "7 images in 4 shards" in shown.out and "1 skipped" in shown.out and str(bad) in shown.err
    shards = sorted((tmp_path / "1").glob("*.tar"))
    assert len(shards) == 4
    for path in shards:
        assert path.read_bytes() == (tmp_path / "3" / path.name).read_bytes()
    assert run("make_shards", photos, "--per-shard", 2, "--output", tmp_path / "fail", "--workers", 3) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {bad} is damaged")


def test_shards_hold_large_images_shrunk_as_a_training_would(photos, tmp_path):
    """Those of 80 x 96 to a short side of 32; the small one keeps its bytes."""
    assert run("make_shards", photos, "--output", tmp_path / "s", "--resize", 32, "--quality", 98) == 0
    source, rng = Shards(tmp_path / "s"), np.random.default_rng(0)
    packed = {source.read(i, rng).hq.shape: source.read(i, rng).hq for i in range(len(source))}
    assert set(packed) == {(32, 38, 3), (20, 20, 3)}
    assert_array_equal(packed[20, 20, 3], read_rgb(photos / "sub" / "small.PNG"))
    expected = [resize_short(read_rgb(photos / f"{i}.png"), 32).astype(int) for i in range(6)]
    for i in range(len(source)):
        image = source.read(i, rng).hq
        if image.shape[0] == 32:
            assert min(np.abs(image - x).mean() for x in expected) < 1.5
    assert run("make_shards", photos, "--output", tmp_path / "no", "--quality", 0) == 1


def test_shards_hold_every_image_once_as_it_is(photos, tmp_path):
    assert run("make_shards", photos, "--output", tmp_path / "shards", "--per-shard", 3) == 0
    assert len(list((tmp_path / "shards").glob("*.tar"))) == 3
    source = Shards(tmp_path / "shards")
    rng = np.random.default_rng(0)
    packed = sorted(source.read(i, rng).hq.tobytes() for i in range(len(source)))
    assert packed == sorted(read_rgb(path).tobytes() for path in list_images(photos))


def test_shards_carry_captions(photos, tmp_path):
    rows = "".join(f"{i}.png,photo {i},a photo: Nr. {i} ü\n" for i in range(6))
    (photos / "table.csv").write_text(f"image,short,long\n{rows}", encoding="utf-8")
    assert run("make_shards", photos / "table.csv", "--captions", "short", "long", "--output", tmp_path / "s") == 0
    source = Shards(tmp_path / "s", {"long": 1})
    rng = np.random.default_rng(0)
    for i in range(6):
        sample = source.read(i, rng)
        number = int(sample.prompt.split()[3])
        assert sample.prompt == f"a photo: Nr. {number} ü"
        assert_array_equal(sample.hq, read_rgb(photos / f"{number}.png"))


def test_an_interrupted_packing_leaves_whole_shards_and_resumes(photos, tmp_path, capsys):
    bad, shards = add_damaged(photos), tmp_path / "shards"
    command = ["make_shards", photos, "--output", shards, "--per-shard", 2]
    assert run(*command) == 1
    assert str(bad) in capsys.readouterr().err
    assert not list(shards.glob(".*"))
    assert run(*command, "--resume", "--on-error", "skip") == 0
    assert "7 images in 4 shards" in capsys.readouterr().out
    assert run(*command) == 1
    assert "already holds shards" in capsys.readouterr().err


# Test sets


def test_a_test_set_is_pairs_that_can_be_made_again(photos, tmp_path):
    for name in ("a", "b"):
        assert (
            run("make_testset", photos, "--degradation", RECIPE, "--size", 48, "--seed", 5, "--output", tmp_path / name)
            == 0
        )
    pairs = ImagePairs(
        PairFolders(tmp_path / "a" / "hq", tmp_path / "a" / "lq"), None, crop="none", flip=False, shuffle=False
    )
    again = ImagePairs(
        PairFolders(tmp_path / "b" / "hq", tmp_path / "b" / "lq"), None, crop="none", flip=False, shuffle=False
    )
    facts = json.loads((tmp_path / "a" / "testset.json").read_text())
    assert len(pairs) == len(facts["items"]) == 7
    recipe = instantiate(OmegaConf.load(tmp_path / "a" / "recipe.yaml").degradation)
    made = ImagePairs(photos, 48, recipe, crop="centre", flip=False, shuffle=False, seed=facts["seed"])
    for n, item in enumerate(facts["items"]):
        assert Path(item["source"]) == made.source.paths[n]
        assert item["seed"] == [5, n]
        assert item["drawn"][0] == "Blur(kernel=41x41)"
        for key in ("hq", "lq"):
            assert_array_equal(to_uint8(pairs[n][key]), to_uint8(again[n][key]))
            assert_array_equal(to_uint8(pairs[n][key]), to_uint8(made[n][key]))


def test_random_crops_of_a_test_set_follow_from_the_seed_and_fewer_pairs_are_the_first(photos, tmp_path):
    """Each is where a dataset of the same seed cuts it; those of another seed are elsewhere."""
    sets = {"all": (5, 7), "few": (5, 3), "other": (6, 7)}
    for name, (seed, count) in sets.items():
        options = ["--crop", "random", "--seed", seed, "--count", count, "--output", tmp_path / name]
        assert run("make_testset", photos, "--degradation", RECIPE, "--size", 48, *options) == 0
    pictures = {name: [read_rgb(path) for path in list_images(tmp_path / name / "hq")] for name in sets}
    assert [len(found) for found in pictures.values()] == [7, 3, 7]
    made = ImagePairs(photos, 48, crop="random", flip=False, shuffle=False, seed=5)
    for n, picture in enumerate(pictures["all"]):
        assert_array_equal(picture, to_uint8(made[n]["hq"]))
    assert_array_equal(pictures["few"], pictures["all"][:3])
    moved = [not np.array_equal(*pair) for pair in zip(pictures["all"], pictures["other"], strict=True)]
    assert sum(moved) >= 5  # the small one is cut from end to end
    assert json.loads((tmp_path / "all" / "testset.json").read_text())["crop"] == "random"
    assert run("make_testset", photos, "--degradation", RECIPE, "--count", 0, "--output", tmp_path / "no") == 1


def test_a_test_set_is_whole_or_not_there_and_never_overwritten(photos, tmp_path, capsys):
    add_damaged(photos)
    command = ["make_testset", photos, "--degradation", RECIPE, "--size", 48, "--output", tmp_path / "set"]
    assert run(*command) == 1
    assert "9.png is damaged" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["photos"]
    assert run(*command, "--count", 2) == 0
    assert run(*command, "--count", 2) == 1
    assert "already exists" in capsys.readouterr().err


# The check


def test_a_check_reports_and_draws(photos, tmp_path, capsys):
    sheet = tmp_path / "sheet.png"
    options = ["--crop-size", 48, "--batch-size", 2, "--workers", 0, "--contact-sheet", sheet, "--need", 0.001]
    assert run("check_dataset", photos, "--degradation", RECIPE, *options) == 0
    shown = capsys.readouterr().out
    for words in (
        "7; 3.5 steps of 2",
        "unreadable   0",
        "1 below 48",
        "small.PNG",
        "64 to 127: 6",
        "pairs/s",
        "enough",
    ):
        assert words in shown
    assert "draw 7" in shown
    assert "Blur(kernel=41x41)" in shown
    with Image.open(sheet) as image:
        assert image.size == (2 * (2 * 48 + 4), 4 * (48 + 22))


def test_a_check_finds_unreadable_images_and_writes_a_list_without_them(photos, tmp_path, capsys):
    bad = add_damaged(photos)
    options = ["--crop-size", 48, "--batch-size", 16, "--workers", 2, "--good-list", tmp_path / "good.txt"]
    assert run("check_dataset", photos, *options) == 1
    shown = capsys.readouterr().out
    assert "unreadable   1" in shown
    assert str(bad) in shown
    assert "fewer than a batch" in shown
    assert len(list_images(tmp_path / "good.txt")) == 7
    assert run("check_dataset", tmp_path / "good.txt", "--crop-size", 48, "--batch-size", 2, "--workers", 0) == 0


def test_a_check_takes_the_arguments_of_a_training(photos, tmp_path, capsys):
    config = ["--config", ROOT / "configs/train/mini/stage1.yaml", f"photos={photos}", f"run_dir={tmp_path}"]
    sizes = ["data.params.train.params.crop_size=32", "data.params.batch_size=2", "data.params.num_workers=0"]
    assert run("check_dataset", *config, *sizes, "--fast") == 0
    assert "7; 3.5 steps of 2" in capsys.readouterr().out


def test_the_contact_sheet_shows_degradations_that_a_training_leaves_to_the_device(photos, tmp_path, capsys):
    config = ["--config", ROOT / "configs/train/mini/stage1.yaml", f"photos={photos}", f"run_dir={tmp_path}"]
    sizes = ["data.params.train.params.crop_size=32", "data.params.batch_size=2", "data.params.num_workers=0"]
    options = ["degrade_on_device=true", "--fast", "--contact-sheet", tmp_path / "sheet.png"]
    assert run("check_dataset", *config, *sizes, *options) == 0
    assert "Jpeg(quality=" in capsys.readouterr().out
    with Image.open(tmp_path / "sheet.png") as image:
        clean, degraded = (np.asarray(image)[22:54, left : left + 32].astype(int) for left in (0, 36))
    assert 2 < np.abs(clean - degraded).mean() < 80


def test_degraded_pictures_are_stored_at_their_own_size(photos, tmp_path, capsys):
    """Enlarged as the recipe does, they are what it gives; but for rounding to 8 bits in between."""
    recipe = str(ROOT / "configs/dataset/realesrgan.yaml")
    for scale in (1, 4):
        arguments = ["--degradation", recipe, "--size", 48, "--lq-scale", scale, "--output", tmp_path / str(scale)]
        assert run("make_testset", photos, *arguments) == 0
    for path in (tmp_path / "4/lq").iterdir():
        small, large = read_rgb(path), read_rgb(tmp_path / "1/lq" / path.name)
        assert small.shape == (12, 12, 3)
        enlarged = resize(small.astype(np.float32), 48, 48, "bicubic").clip(0, 255)
        assert np.abs(enlarged - large)[4:-4, 4:-4].mean() < 0.6
        assert_array_equal(read_rgb(tmp_path / "4/hq" / path.name), read_rgb(tmp_path / "1/hq" / path.name))
    assert (
        run("make_testset", photos, "--degradation", recipe, "--size", 50, "--lq-scale", 4, "--output", tmp_path / "x")
        == 1
    )
    assert "--lq-scale 4 must divide --size 50" in capsys.readouterr().err
