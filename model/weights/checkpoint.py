"""Weight files: reading every layout that published or trained weights come in, and writing them whole.

A file is opened as a `WeightFile`, which knows names and shapes and reads values a few at a time. What a network takes
from it depends on the network's role in the pipeline (`ROLES`), because most published files hold several networks.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffbir.model.weights.diffusers_layout import Source, current, find_component, is_diffusers, sources, unused
from diffbir.model.weights.places import beside, best, places, shared
from diffbir.model.weights.published import where_to_get
from diffbir.model.weights.weight_file import BOUNDARY, CheckpointError, WeightFile
from diffbir.utils.config import project_path

log = logging.getLogger(__name__)

DERIVED = (".attn_mask", ".relative_position_index")  # SwinIR files carry them; they are computed
# What compiling, sharding and checkpointing put into the names of the modules that they wrap, anywhere.
WRAPPERS = re.compile(r"_orig_mod\.|_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.")

# Parts of the keys of an RRDBNet as BasicSR (Real-ESRGAN) names them -> ours, which are those of ESRGAN and BSRGAN.
BASICSR = {
    "body": "RRDB_trunk",
    **{f"rdb{i}": f"RDB{i}" for i in (1, 2, 3)},
    "conv_body": "trunk_conv",
    "conv_up1": "upconv1",
    "conv_up2": "upconv2",
    "conv_hr": "HRconv",
}


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Every tensor of a file, as stored.

    Raises:
        CheckpointError: missing, damaged, or holding anything other than tensors.
    """
    file = WeightFile.open(find_weights(path))
    return {
        name: value.clone() for name, (value,) in zip(file.shapes, file.read([n] for n in file.shapes), strict=True)
    }


def find_weights(path: str | Path, role: str | None = None) -> Path:
    """The file that a path stands for: itself, or the part for `role` of a diffusers folder.

    Raises:
        CheckpointError: it is missing; the message says where to get it.
    """
    path = project_path(path)
    if role and path.is_dir():
        path = find_component(path, role)
    if not path.is_file():
        raise CheckpointError(f"weights not found: {path}; {where_to_get(path)}")
    return path


def contents(file: WeightFile, role: str | None, own: Mapping[str, Tensor]) -> dict[str, Source]:
    """What each key of a network with the state `own` and the given role is made of in the file.

    The network is where most of its keys are, under whatever prefix, in our layout or in that of diffusers. What else
    the file holds is left out (and logged); keys at that place which the network cannot use remain.

    Raises:
        CheckpointError: several places in the file fit.
    """
    names = {WRAPPERS.sub("", name): name for name in file.shapes if not name.endswith(DERIVED)}
    stored = {key: file.shapes[name] for key, name in names.items()}
    shapes = {key: tuple(value.shape) for key, value in own.items()}
    place = best(file.path, places(names, own), stored, shapes, role)
    if len(place.found) < len(own):
        renamed = best(file.path, places(names, own, _from_basicsr), stored, shapes, role)
        place = renamed if len(renamed.found) > len(place.found) else place
    theirs: Mapping[str, Source] = {}
    if role and len(place.found) < len(own) and is_diffusers(role, names):
        theirs = sources(role, own)
        keys = dict.fromkeys(key for source in theirs.values() for key in source.keys)
        other = best(file.path, places(names, keys, partial(current, role)), stored, keys, role)
        if len(other.found) > len(place.found):
            place, theirs = other, sources(role, own, other.found)
        else:
            theirs = {}

    prefix = place.prefix if place.found else shared(names)
    used = set(place.found.values())
    rest = [
        name
        for name in names
        if name.startswith(prefix) and name not in used and not beside(name.removeprefix(prefix), stored[name])
    ]
    others = Counter(BOUNDARY.split(name, 1)[0] for name in names.keys() - used - set(rest))
    if others:
        log.info("%s: %s is taken, and left out: %s", file.path, place, _counts(others))
    if role == "text_encoder" and theirs:
        rest = []  # layers that are never used; what else is left over doesn't belong to this network
    found = {
        key: replace(source, keys=tuple(names[place.found[k]] if k in place.found else prefix + k for k in source.keys))
        for key, source in theirs.items()
    } or {key: Source((names[name],), stored[name]) for key, name in place.found.items()}
    return found | {name.removeprefix(prefix): Source((names[name],), stored[name]) for name in rest}


def _from_basicsr(name: str) -> str:
    return ".".join(BASICSR.get(part, part) for part in name.split("."))


def load_weights(
    module: nn.Module, path: str | Path, role: str | None = None, dtype: torch.dtype | None = None
) -> nn.Module:
    """Loads a file into a module, strictly, and returns the module.

    A module on the meta device gets its memory here, so that at no time much more than the final weights is held.

    Args:
        path: a file in any layout that is documented in weights/README.md, or a diffusers folder.
        role: key of `ROLES`: what to take from a file or folder that holds several networks.
        dtype: what floating-point weights of a module on the meta device become; as the module declares them if None.

    Raises:
        CheckpointError: the file cannot be read, or its keys or shapes are not those of the module.
    """
    file, own = WeightFile.open(find_weights(path, role)), module.state_dict()
    found = contents(file, role, own)
    idle = set(unused(role, own)) if role else set()
    idle = {key for key in idle if key in own and (key not in found or not set(found[key].keys) <= set(file.shapes))}
    _check_fit(type(module).__name__, file, own, found, idle)

    keys = [key for key in own if key not in idle]
    with torch.no_grad():
        for key, parts in zip(keys, file.read(found[key].keys for key in keys), strict=True):
            target = own[key]
            try:
                value = found[key].join(parts)
            except ValueError as error:
                raise CheckpointError(f"{file.path} does not fit {type(module).__name__}: {error}") from error
            if target.is_meta:
                _assign(module, key, value.to(dtype or target.dtype, copy=True))
            else:
                target.copy_(value)
        for key in idle:
            if own[key].is_meta:
                _assign(module, key, torch.zeros(own[key].shape, dtype=dtype or own[key].dtype))
    return module


def _assign(module: nn.Module, key: str, value: Tensor) -> None:
    """Gives a parameter or buffer that has no memory yet its value."""
    path, _, name = key.rpartition(".")
    owner = module.get_submodule(path)
    old = getattr(owner, name)
    setattr(owner, name, nn.Parameter(value, old.requires_grad) if isinstance(old, nn.Parameter) else value)


def _check_fit(
    name: str, file: WeightFile, own: Mapping[str, Tensor], found: Mapping[str, Source], idle: set[str]
) -> None:
    absent = {key for key, source in found.items() if not set(source.keys) <= set(file.shapes)}
    missing = [k for k in own if (k not in found or k in absent) and k not in idle]
    unexpected = [k for k in found if k not in own and k not in absent]
    shapes = [
        f"{k} {_shape(file, found[k])} instead of {tuple(own[k].shape)}"
        for k in own
        if k in found and k not in absent and _shape(file, found[k]) != tuple(own[k].shape)
    ]
    if not (missing or unexpected or shapes):
        return
    parts = [
        f"{len(keys)} {what} ({_groups(keys)})"
        for what, keys in (("missing", missing), ("unexpected", unexpected))
        if keys
    ]
    if shapes:
        more = f", and {len(shapes) - 3} more" if len(shapes) > 3 else ""
        parts.append(f"{len(shapes)} of another shape ({'; '.join(shapes[:3])}{more})")
    raise CheckpointError(f"{file.path} does not fit {name}: {', '.join(parts)}; use the matching configuration")


def _shape(file: WeightFile, source: Source) -> tuple[int, ...]:
    """Shape of what a source gives: its parts joined along the first axis, then reshaped if that is possible."""
    if type(source) is not Source:  # a special one knows how
        try:
            return tuple(source.join([torch.empty(file.shapes[key], device="meta") for key in source.keys]).shape)
        except (ValueError, RuntimeError):
            return file.shapes[source.keys[0]]
    first, *others = (file.shapes[key] for key in source.keys)
    if any(shape[1:] != first[1:] for shape in others):
        return first
    joined = (sum(file.shapes[key][0] for key in source.keys), *first[1:]) if others else first
    return source.shape if torch.Size(joined).numel() == torch.Size(source.shape).numel() else joined


def _groups(keys: Sequence[str]) -> str:
    """The one key, or how many there are in each module, a few modules at most."""
    if len(keys) == 1:
        return keys[0]
    return _counts(Counter(".".join(key.split(".")[:2]) if "." in key else key for key in keys))


def _counts(counter: Counter) -> str:
    few = ", ".join(f"{name}: {count}" for name, count in list(counter.items())[:5])
    return few + (f", and {len(counter) - 5} more modules" if len(counter) > 5 else "")


def save_weights(state: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype | None = None) -> None:
    """Writes tensors as `.safetensors`; the file appears whole or not at all.

    Args:
        dtype: what floating-point tensors are stored as; as they are if None.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    try:
        save_file(_storable(state, dtype), part)
        part.chmod(0o644)  # safetensors creates its files unreadable to others
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _storable(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """safetensors stores contiguous tensors that share no memory; what already is so isn't copied."""
    seen: set[int] = set()
    result = {}
    for key, value in state.items():
        value = value.detach().cpu()
        value = value.to(dtype) if dtype and value.is_floating_point() else value
        storage = value.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != value.nbytes or not value.is_contiguous():
            value = value.clone(memory_format=torch.contiguous_format)
        seen.add(value.untyped_storage().data_ptr())
        result[key] = value
    return result
