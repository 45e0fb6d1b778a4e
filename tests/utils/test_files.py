from pathlib import Path

import pytest

from diffbir.utils.files import replacing


def contents(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def test_a_file_appears_at_the_end_and_replaces_the_old_one(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with replacing(tmp_path / "a.txt") as part:
        part.write_text("new")
        assert (tmp_path / "a.txt").read_text() == "old"
    assert contents(tmp_path) == {"a.txt": "new"}


def test_a_folder_appears_whole(tmp_path):
    with replacing(tmp_path / "new" / "set") as part:
        (part / "x").mkdir(parents=True)
        (part / "x" / "a.txt").write_text("a")
        assert not (tmp_path / "new" / "set").exists()
    assert contents(tmp_path) == {"new/set/x/a.txt": "a"}


@pytest.mark.parametrize("folder", [False, True])
def test_an_error_leaves_what_was_there(tmp_path, folder):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "a.txt") as part:
        if folder:
            part.mkdir()
        (part / "b" if folder else part).write_text("half")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"a.txt": "old"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.txt"]
