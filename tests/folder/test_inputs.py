"""What a command line's inputs mean."""

import os
from pathlib import Path

import pytest

from diffbir.folder.inputs import find_sources
from diffbir.utils.cli import UserError

TREE = ("b.PNG", "a/z.jpg", "a/deep/y.Webp", "c.JPEG", "d.avif", "e.HEIC", "notes.txt", "a/._z.jpg", ".a.png.12.0.part")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name in TREE:
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "in"


def names(*inputs: object, output: Path = Path("nowhere")) -> list[str]:
    return [source.name for source in find_sources(map(str, inputs), output)]


def test_a_folder_is_searched_whatever_the_case_of_suffixes(tree):
    assert names(tree) == ["a/deep/y.Webp", "a/z.jpg", "b.PNG", "c.JPEG", "d.avif", "e.HEIC"]


def test_results_are_no_inputs(tree):
    assert names(tree, output=tree / "a") == ["b.PNG", "c.JPEG", "d.avif", "e.HEIC"]
    with pytest.raises(UserError, match="other than results"):
        find_sources([str(tree)], tree)


def test_globs_and_several_inputs_share_a_tree(tree):
    assert names(f"{tree}/**/*.[jW]*") == ["a/deep/y.Webp", "a/z.jpg"]
    assert names(tree / "a/z.jpg", tree / "b.PNG", tree / "b.PNG") == ["a/z.jpg", "b.PNG"]
    assert names(tree / "a/z.jpg") == ["z.jpg"]
    with pytest.raises(UserError, match="no images match"):
        find_sources([f"{tree}/*.jp2"], "nowhere")


def test_a_name_with_brackets_is_a_name(tree):
    (tree / "[1].png").touch()
    assert names(tree / "[1].png") == ["[1].png"]


LINES = ["# of a trip", "a\\z.jpg", '"b.PNG"', "", "  'c.JPEG' ", "a/deep", "gone.png", "../out of it.png", "b.PNG"]
FOUND = ["a/z.jpg", "b.PNG", "c.JPEG", "a/deep/y.Webp", "gone.png", "out of it.png"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lists_of_any_editor(tree, encoding, end):
    """Backslashes, quotes, comments, empty lines, folders, missing files; no name leads out of the tree of results."""
    (tree / "list.txt").write_bytes(end.join(LINES).encode(encoding))
    assert names(tree / "list.txt") == FOUND


def test_a_line_is_taken_as_it_stands_if_there_is_such_a_file(tree):
    for name in ('"quoted".png', "back\\slash.png", "é ü.png"):
        (tree / name).touch()
    (tree / "list.txt").write_text('"quoted".png\nback\\slash.png\né ü.png\n', encoding="utf-8")
    assert names(tree / "list.txt") == ['"quoted".png', "back\\slash.png", "é ü.png"]


def test_a_list_in_latin_1_and_a_home_folder(tree, monkeypatch, caplog):
    (tree / "caf\u00e9.png").touch()
    monkeypatch.setenv("HOME", str(tree))
    (tree / "list.txt").write_bytes("caf\u00e9.png\n~/b.PNG\n".encode("latin-1"))
    assert names(tree / "list.txt") == ["caf\u00e9.png", "b.PNG"]
    assert "read as Latin-1" in caplog.text


@pytest.mark.parametrize(
    "content, words", [(b"", "is empty"), (b"\r\n \n", "is empty"), (b"\x00\xff\xfe\x80", "neither an image")]
)
def test_a_useless_list_is_named(tmp_path, content, words):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=words):
        find_sources([str(tmp_path / "list.txt")], "nowhere")


def test_links_in_a_circle_and_names_that_are_no_unicode(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    (tmp_path / "in" / "folder.png").mkdir()
    with open(os.fsencode(tmp_path / "in") + b"/\xff.png", "wb"):
        pass
    assert names(tmp_path / "in") == ["\udcff.png"]
