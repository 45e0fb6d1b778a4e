"""Files of other projects, as people hold them: nested as they may be, without running code in them."""

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from diffbir.model.weights.checkpoint import find_weights, read_state_dict
from diffbir.model.weights.weight_file import WeightFile, is_safetensors

log = logging.getLogger(__name__)

LICENCES = ("license", "licence", "modelspec.license")  # keys of metadata
NON_COMMERCIAL = re.compile(r"non-?\s?commercial|\bNC\b|research only", re.IGNORECASE)
NESTED = ("params_ema", "params", "state_dict", "model_state_dict", "model", "net")  # where the weights lie, best first


def read_foreign(path: str | Path) -> dict[str, Any]:
    """Whatever a file holds, which may be dicts in dicts; warns where its metadata name a non-commercial licence.

    Raises:
        CheckpointError: missing, damaged, or holding code.
    """
    path = find_weights(path)
    parts = set(WeightFile.open(path).parts.values())
    if parts == {path} and not is_safetensors(path):
        with path.open("rb") as file:  # by its path, torch reads what ends in .safetensors as such
            return torch.load(file, map_location="cpu", weights_only=True)
    for part in filter(is_safetensors, parts):
        with safe_open(part, framework="pt") as file:
            metadata = file.metadata() or {}
        for licence in (metadata[key] for key in LICENCES if key in metadata):
            if NON_COMMERCIAL.search(licence):
                log.warning("%s is not for commercial use: its licence is %s", part, licence)
    return read_state_dict(path)


def tensors(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The one network that a file holds, out of its nesting and without the prefix of parallel wrappers."""
    for name in NESTED:
        if isinstance(content.get(name), dict):
            return tensors(content[name])
    state = {key: value for key, value in content.items() if isinstance(value, Tensor)}
    while state and all(key.startswith("module.") for key in state):
        state = {key.removeprefix("module."): value for key, value in state.items()}
    return state
