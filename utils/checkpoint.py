"""Weight files: the only place that knows their layouts."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from utils.cli import UserError
from utils.config import project_path


class CheckpointError(UserError):
    """Weights that cannot be used; the message names the file."""


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Reads a `.safetensors` or a torch file of tensors (bare or under `state_dict`); never runs code from it.

    Raises:
        CheckpointError: missing, damaged, or holding anything other than tensors.
    """
    path = project_path(path)
    if not path.is_file():
        raise CheckpointError(f"weights not found: {path}; check `weights` in the configuration")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with path.open("rb") as file:
            mmap = file.read(4) == b"PK\x03\x04"  # files of torch before 1.6 cannot be mapped
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        raise CheckpointError(f"{path} is damaged or not a weight file; fetch or train it again") from error
    except Exception as error:  # pickle raises what it likes; weights_only turns code into an UnpicklingError
        raise CheckpointError(f"{path} holds more than tensors and is refused; save plain weights") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not state or not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(f"{path} does not hold a state dict of tensors")
    return state


def load_weights(module: nn.Module, path: str | Path) -> nn.Module:
    """Loads a file into a module, strictly, and returns the module.

    Raises:
        CheckpointError: the file cannot be read, or its keys or shapes are not those of the module.
    """
    state, own = read_state_dict(path), module.state_dict()
    derived = (".attn_mask", ".relative_position_index")  # SwinIR files carry them; they are computed
    missing = [k for k in own if k not in state]
    extra = [k for k in state if k not in own and not k.endswith(derived)]
    shapes = [k for k in own if k in state and own[k].shape != state[k].shape]
    if missing or extra or shapes:
        parts = [
            f"{len(keys)} {what} (first: {keys[0]})"
            for what, keys in (("missing", missing), ("unexpected", extra), ("of another shape", shapes))
            if keys
        ]
        raise CheckpointError(
            f"{path} does not fit {type(module).__name__}: {', '.join(parts)}; use the matching configuration"
        )
    module.load_state_dict(state)
    return module


def save_weights(state: dict[str, Tensor], path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes tensors as `.safetensors`; the file appears whole or not at all.

    Args:
        dtype: what floating-point tensors are stored as; as they are if None.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    cast = {k: (v.to(dtype) if dtype and v.is_floating_point() else v) for k, v in state.items()}
    try:
        # .clone() also undoes channels_last: safetensors stores contiguous tensors only.
        save_file({k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in cast.items()}, part)
        part.chmod(0o644)  # safetensors creates its files unreadable to others
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
