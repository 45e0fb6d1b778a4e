"""A prompt for each image."""

import pytest

from diffbir.folder.inputs import Source
from diffbir.folder.prompts import read_prompts
from diffbir.utils.cli import UserError

DEFAULT = ("photo", "blurry")


def sources(folder) -> list[Source]:
    return [Source(f"{folder}/in/{name}", name) for name in ("a.png", "trip/b.png", "trip/c.png", "day/c.png")]


def prompts(folder, text: str, encoding: str = "utf-8"):
    (folder / "table.csv").write_bytes(text.encode(encoding))
    found = sources(folder)
    table = read_prompts(str(folder / "table.csv"), DEFAULT, found)
    return [table.of(source) for source in found], table.unused


def test_a_table_names_images_in_any_way(tmp_path):
    text = (
        'Path,PROMPT,negative_prompt\r\na.png,"a cat, grey",dog\r\nb.png,bridge,\r\n'
        f'trip\\c.png,,fog\r\n{tmp_path}/in/day/c.png,"two\nlines",\r\ngone.png,x,\r\n\r\n'
    )
    expected = [("a cat, grey", "dog"), ("bridge", "blurry"), ("photo", "fog"), ("two\nlines", "blurry")]
    assert prompts(tmp_path, text, "utf-8-sig") == (expected, ["gone.png"])


def test_paths_may_be_relative_to_the_table(tmp_path):
    assert prompts(tmp_path, "image,caption\nin/a.png,cat\n")[0][0] == ("cat", "blurry")


@pytest.mark.parametrize("separator", [";", "\t"])
def test_tables_as_spreadsheets_write_them(tmp_path, separator):
    text = f"Path{separator}Caption\na.png{separator}a cat, sitting\nb.png{separator}{'x' * 200_000}\n"
    found, _ = prompts(tmp_path, text, "utf-16")
    assert found[:2] == [("a cat, sitting", "blurry"), ("x" * 200_000, "blurry")]


@pytest.mark.parametrize(
    "text, words",
    [
        ("path,text\na.png,cat\n", "no column 'prompt'"),
        ("", "no column 'path'"),
        ("path,prompt\nc.png,cat\n", "means trip/c.png and day/c.png"),
        ("path,prompt\na.png,a cat, sitting\n", "line 2 has 3 cells, and the header 2"),
        ("path,prompt,prompt\na.png,cat,dog\n", "has 2 columns 'prompt'"),
    ],
)
def test_a_wrong_table_is_named(tmp_path, text, words):
    with pytest.raises(UserError, match=words):
        prompts(tmp_path, text)


def test_a_text_file_beside_an_image_holds_its_prompt(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.txt").write_text("\ufeff a cat\n on a roof\n", encoding="utf-8")
    table = read_prompts("sidecar", DEFAULT)
    assert [table.of(source) for source in sources(tmp_path)] == [("a cat on a roof", "blurry")] + [DEFAULT] * 3
