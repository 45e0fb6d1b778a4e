"""The private folder of uploads and results, and what a visitor can name."""

import json
import os
import stat
import time
from pathlib import Path

import pytest

from diffbir.utils.cli import UserError
from diffbir.web.addresses import names_address
from diffbir.web.uploads import UPLOADS, VARIABLE, new_place, private_folder, sweep, uploaded


def test_the_folder_is_private_is_gradios_and_is_gone_in_the_end(monkeypatch):
    monkeypatch.setenv(VARIABLE, "before")
    with private_folder(60) as folder:
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert os.environ[VARIABLE] == str(folder / UPLOADS)
        (folder / UPLOADS / "photo.png").write_bytes(b"x")
    assert not folder.exists()
    assert os.environ[VARIABLE] == "before"


def test_uploads_vanish_by_themselves():
    with private_folder(0.4) as folder:
        file = new_place(folder / UPLOADS) / "photo.png"
        file.write_bytes(b"x")
        deadline = time.monotonic() + 20
        while file.parent.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not file.parent.exists()
        assert (folder / UPLOADS).is_dir()


def test_only_what_is_old_is_swept(tmp_path):
    old, new = new_place(tmp_path), new_place(tmp_path)
    for place in (old, new):
        (place / "photo.png").write_bytes(b"x")
    os.utime(old / "photo.png", (0, 0))
    sweep(tmp_path, keep=100)
    assert not (old / "photo.png").exists()
    assert old.is_dir()  # an upload may be about to be moved there
    assert (new / "photo.png").exists()


def test_only_uploads_are_opened(tmp_path):
    folder, outside = (tmp_path / "uploads").resolve(), tmp_path / "secret.png"
    folder.mkdir()
    outside.write_bytes(b"x")
    (folder / "link.png").symlink_to(outside)
    (folder / "photo.png").write_bytes(b"x")
    assert uploaded(str(folder / "photo.png"), folder) == folder / "photo.png"
    for path in (outside, folder / ".." / "secret.png", folder / "link.png", Path("/etc/passwd"), folder.parent):
        with pytest.raises(UserError, match="only uploaded pictures"):
            uploaded(str(path), folder)
    with pytest.raises(UserError, match="upload it again"):
        uploaded(str(folder / "gone.png"), folder)


@pytest.mark.parametrize(
    "data, refused",
    [
        ([{"path": "http://example.com/a.png"}], True),
        ([[{"path": "HTTPS://example.com"}]], True),
        ([{"root": [{"path": "file:///etc/passwd"}]}], True),
        ([{"path": ["http://example.com"]}], True),
        ([{"path": "/tmp/uploads/a.png", "url": "http://localhost:7860/a.png"}], False),
        ([{"path": None}, "a http://text", 1], False),
    ],
)
def test_addresses_are_found_wherever_they_stand(data, refused):
    assert names_address(json.dumps({"data": data}).encode()) is refused
    escaped = json.dumps({"data": data}).replace("h", "\\u0068").encode()
    assert names_address(escaped.replace(b"pat\\u0068", b"path")) is refused
