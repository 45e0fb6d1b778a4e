"""The file that a run is resumed from."""

import json
import os

from diffbir.folder import manifest
from diffbir.folder.manifest import Journal


def line(output: str, status: str = "done", **more) -> dict:
    return {"output": output, "status": status, **more}


def test_the_last_line_counts_and_a_torn_one_does_not(tmp_path):
    manifest.rewrite(tmp_path, [line("b.png", "pending"), line("a.png", "pending")])
    with open(tmp_path / manifest.NAME, "ab") as file:
        file.write(b'{"output": "b.png", "stat')  # where a kill cut it off
    with Journal(tmp_path) as journal, Journal(tmp_path, 1) as other:
        journal.write(line("a.png", seconds=2))
        other.write(line("b.png", "failed"))
    found = manifest.read(tmp_path)
    assert found == {"a.png": line("a.png", seconds=2), "b.png": line("b.png", "failed")}
    manifest.rewrite(tmp_path, found.values())
    assert os.listdir(tmp_path) == [manifest.NAME]
    text = (tmp_path / manifest.NAME).read_text().splitlines()
    assert [json.loads(one)["output"] for one in text] == ["a.png", "b.png"]


def test_names_that_are_no_unicode_come_back(tmp_path):
    manifest.rewrite(tmp_path, [line("\udcff.png")])
    assert list(manifest.read(tmp_path)) == ["\udcff.png"]


def test_what_is_no_manifest_is_passed_over(tmp_path):
    (tmp_path / manifest.NAME).write_bytes(b'\xff\x00\n[1]\n{"output": 3, "status": "done"}\n{"output": "a"}\n\n')
    assert manifest.read(tmp_path) == {}


def test_an_input_is_known_by_its_content_even_where_its_name_and_time_have_changed(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"abc")
    known = line("a.png", input=str(path)) | manifest.facts(path)
    assert manifest.unchanged(known, str(path))
    os.utime(path, (0, 0))
    assert manifest.unchanged(known, str(path))
    path.rename(tmp_path / "b.png")
    assert manifest.unchanged(known, str(tmp_path / "b.png"))
    (tmp_path / "b.png").write_bytes(b"abd")
    assert not manifest.unchanged(known, str(tmp_path / "b.png"))
    assert not manifest.unchanged(known, str(path))
