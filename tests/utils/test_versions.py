"""Versions of packages, whatever build of them is installed."""

import sys

import numpy

from diffbir.utils.versions import versions


def test_versions_are_those_of_the_modules():
    assert versions(["numpy", "no-such-package"]) == {"numpy": numpy.__version__, "no-such-package": "unknown"}


def test_another_build_of_opencv_is_known_by_its_own_name(tmp_path, monkeypatch):
    """An environment with the headless build alone, as on a server."""
    metadata = tmp_path / "opencv_python_headless-4.9.0.80.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: opencv-python-headless\nVersion: 4.9.0.80\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    assert versions(["opencv-python"]) == {"opencv-python-headless": "4.9.0.80"}
