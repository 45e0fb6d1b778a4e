"""The whole full-size path: a published preset with randomly filled files of the published layouts."""

import pytest

from benchmarks import full_size


@pytest.mark.slow
def test_a_published_preset_restores_an_image(tmp_path, capfd):
    """BSRNet, Stable Diffusion and the branch, loaded from files of 3.4 GB, two steps of a small image."""
    assert not full_size.main(["--folder", str(tmp_path), "--size", "64", "--device", "cpu", "--half-files"])
    assert "v2, 64 x 64, 2 steps" in capfd.readouterr().out
    assert (tmp_path / "out" / "noise.png").exists()
