"""Lists, tables and shards as other programs write them."""

import csv
import io
import json
import logging
import os
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest

from diffbir.dataset.sources.files import Files
from diffbir.dataset.sources.shards import Shards, write_shard
from diffbir.dataset.sources.tables import Table, read_table
from diffbir.utils.cli import UserError
from diffbir.utils.image import list_images, write_png

RNG = np.random.default_rng(0)
PICTURE = np.zeros((4, 4, 3), np.uint8)


def png() -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(PICTURE).save(buffer, "png")
    return buffer.getvalue()


def make(folder: Path, *names: str) -> list[Path]:
    for name in names:
        write_png(folder / name, PICTURE)
    return [folder / name for name in names]


# Lists


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
def test_a_list_in_any_encoding(tmp_path, encoding, newline):
    expected = make(tmp_path, "a b.png", "café.png", "c.png")
    (tmp_path / "list.txt").write_bytes(newline.join(p.name for p in expected).encode(encoding))
    assert list_images(tmp_path / "list.txt") == expected
    assert Files(tmp_path / "list.txt").read(1, RNG).hq.shape == (4, 4, 3)


def test_names_of_other_systems_keep_their_bytes(tmp_path):
    """An archive of Windows, unpacked on Linux, has names in Latin-1, as its list."""
    name = os.fsdecode("café.png".encode("latin-1"))
    try:
        make(tmp_path, name)
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    (tmp_path / "list.txt").write_bytes("café.png\n".encode("latin-1"))
    assert list_images(tmp_path / "list.txt") == [tmp_path / name]


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b", "\x0c", "\x1c", "\x1e", "\u3000"])
@pytest.mark.parametrize("name", ["a{}b.png", "{}a.png"])
def test_unusual_separators_belong_to_the_name(tmp_path, separator, name):
    expected = make(tmp_path, name.format(separator), "z.png")
    (tmp_path / "list.txt").write_text("".join(f"{p.name}\n" for p in expected), encoding="utf-8")
    assert list_images(tmp_path / "list.txt") == expected


def test_quotes_comments_home_and_backslashes(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    expected = make(tmp_path, "a.png", "b c.png", "sub/d.png", "home/e.png", "sub/f g.png")
    lines = ["# photos", "", '"a.png"', "'b c.png'", "sub\\d.png", "~/e.png", '"sub\\f g.png"', "#end"]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert list_images(tmp_path / "list.txt") == expected
    assert "list.txt: 5 paths, 2 comments" in caplog.text


def test_a_file_that_has_such_a_name_is_meant(tmp_path):
    names = ["#1.png", "'q'.png", "~x.png", "a\\b.png", "'"]
    expected = [*make(tmp_path, "#1.png", "'q'.png", "~x.png", "a\\b.png"), tmp_path / "'"]
    (tmp_path / "list.txt").write_text("\n".join(names))
    assert list_images(tmp_path / "list.txt") == expected


def test_a_list_with_nul_bytes_is_named(tmp_path):
    (tmp_path / "list.txt").write_bytes(b"a.png\nb.png\0\0\nc.png\n")
    with pytest.raises(UserError, match=r"list.txt has NUL bytes"):
        list_images(tmp_path / "list.txt")


# Tables


def captions(path: Path) -> list[tuple[str, str]]:
    columns = read_table(path, ["image", "short"])
    return list(zip(columns["image"], columns["short"], strict=True))


ROWS = [("a.png", "a cat, sitting"), ("sub/b.png", 'the "café"; two\nlines'), ("c.png", "")]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32", "latin-1"])
@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv"])
def test_a_table_in_any_encoding_and_with_any_separator(tmp_path, encoding, separator, suffix):
    path = tmp_path / f"t{suffix}"
    with path.open("w", newline="", encoding=encoding) as file:
        csv.writer(file, delimiter=separator).writerows([("image", "other", "short"), *((a, "", b) for a, b in ROWS)])
    assert captions(path) == ROWS


def test_spaces_after_the_comma(tmp_path):
    (tmp_path / "t.csv").write_text('image, short , other\na.png, "a cat, sitting", 1\nb.png, a dog, 2\n')
    assert captions(tmp_path / "t.csv") == [("a.png", "a cat, sitting"), ("b.png", "a dog")]


def test_long_captions_are_whole_and_other_readers_keep_their_limit(tmp_path):
    limit = csv.field_size_limit()
    (tmp_path / "t.csv").write_text(f"image,short\na.png,{'word ' * 100_000}\n")
    assert captions(tmp_path / "t.csv") == [("a.png", "word " * 100_000)]
    assert csv.field_size_limit() == limit


@pytest.mark.parametrize(
    "content, problem",
    [
        (
            "image,short\na.png,a dog\nb.png,a cat, sitting\n",
            "line 3 has 3 cells, and the header 2; put a text with",
        ),
        ('image,short\na.png,"two\nlines"\nb.png\n', "line 4 has 1 cells, and the header 2"),
        ("image;short\na.png;a dog; brown\n", "line 2 has 3 cells, and the header 2; put a text with ';'"),
        ("image,short,short\na.png,a,b\n", "has 2 columns 'short'; rename all but one"),
        ('image,short\na.png,a\nb.png,"a cat\nc.png,a dog\n', "the row from line 3 on is not readable"),
        ('image,short\na.png,"Hello" she said\n', "the row from line 2 on is not readable"),
        ("image,short\na.png,a\0b\n", "has NUL bytes and is damaged"),
        ("image,caption\na.png,b\n", "has no column 'short'; its columns are image, caption"),
    ],
)
def test_rows_that_would_be_lost_or_cut_are_named(tmp_path, content, problem):
    (tmp_path / "t.csv").write_text(content)
    with pytest.raises(UserError, match=re.escape(str(tmp_path / "t.csv")) + ".*" + re.escape(problem)):
        captions(tmp_path / "t.csv")


def test_empty_lines_are_no_rows_and_the_rows_are_counted(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    make(tmp_path, "a.png", "sub/b.png")
    (tmp_path / "t.csv").write_text("image,short\n\na.png,x\n  \nsub\\b.png,y\n\n")
    table = Table(tmp_path / "t.csv", captions={"short": 1})
    assert [table.read(i, RNG).prompt for i in range(len(table))] == ["x", "y"]
    assert "t.csv: 2 rows" in caplog.text


def test_texts_of_parquet_that_are_none(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "t.parquet"
    images = ["a.png", "b.png"]
    parquet.write_table(pyarrow.table({"image": [b"a.png", b"b.png"], "short": [float("nan"), 1.5]}), path)
    assert captions(path) == [("a.png", ""), ("b.png", "1.5")]
    parquet.write_table(pyarrow.table({"image": images, "short": [["x"], ["y", "z"]]}), path)
    with pytest.raises(UserError, match=r"t.parquet has a column that holds no texts \(a list\)"):
        captions(path)
    columns = [pyarrow.array(column) for column in (images, ["x", "y"], ["z", "z"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, names=["image", "short", "short"]), path)
    with pytest.raises(UserError, match="has 2 columns 'short'"):
        captions(path)


# Shards


def shard(path: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_a_mark_is_no_part_of_a_caption(tmp_path, encoding):
    fields = json.dumps({"short": "café"}, ensure_ascii=False)
    write_shard(tmp_path / "s.tar", [("a", {"png": png(), "txt": "café".encode(encoding)})])
    write_shard(tmp_path / "t.tar", [("a", {"png": png(), "json": fields.encode(encoding)})])
    assert Shards(tmp_path / "s.tar", {"txt": 1}).read(0, RNG).prompt == "café"
    assert Shards(tmp_path / "t.tar", {"short": 1}).read(0, RNG).prompt == "café"


LAYOUT = "write NAME.png (or .jpg, ...) and then NAME.txt or NAME.json of each sample"


@pytest.mark.parametrize(
    "names, problem",
    [
        (["a.png", "b.png", "a.txt", "b.txt"], "the members of sample 'a' are not one after another"),
        (["a.txt", "b.txt", "a.png", "b.png"], "the members of sample 'a' are not one after another"),
        (["photo.v2.png", "photo.v2.txt"], "photo.v2.png counts as member 'v2.png' of sample 'photo'"),
        (["x/1.hq.png", "x/1.lq.png"], "1.hq.png counts as member 'hq.png' of sample '1'"),
        (["a.png", "a.jpg"], "a.jpg is the second of its kind in its sample"),
    ],
)
def test_other_layouts_are_refused_with_what_is_expected(tmp_path, names, problem):
    path = shard(tmp_path / "s.tar", *((name, png()) for name in names))
    with pytest.raises(UserError, match=re.escape(f"{path}: {problem}") + ".*" + re.escape(LAYOUT)):
        Shards(path)


def test_further_members_are_ignored_and_lonely_captions_counted(tmp_path, caplog):
    names = ["a.png", "a.mask.png", "a.cls", "b.txt", "c.txt", "d.cls", "e.png"]
    path = shard(tmp_path / "s.tar", *((name, png()) for name in names))
    assert len(Shards(path)) == 2
    assert "2 samples are left out, as they have captions and no image" in caplog.text
