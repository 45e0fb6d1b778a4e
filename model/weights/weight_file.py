"""Opening weight files: by what they hold and not by their names, in several parts too; code in a file is never run."""

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from diffbir.model.weights.refusals import describe, refused_entry
from diffbir.utils.cli import UserError

CHUNK = 32 * 2**20, 1 / 32  # a file is mapped anew after so many bytes or this part of it, lest pages read pile up
INSIDE = ": "  # between the name of a mapping in a file and the names in it; no name of a tensor holds it
BOUNDARY = re.compile(rf"\.|{INSIDE}")
INDEX = "weight_map"  # key of the JSON that says which part of a model in several files has which tensor


class CheckpointError(UserError):
    """Weights that cannot be used; the message names the file."""


@dataclass(frozen=True)
class WeightFile:
    """Tensors of a safetensors or torch file, or of the parts that an index names.

    Mappings in a torch file may be nested: one that is alone with tensors vanishes (`state_dict`), of several each
    comes before the names in it (`params_ema: conv.weight`). Whatever else a file holds is left out.

    Args:
        path: the file.
        shapes: name of every tensor -> its shape.
        sizes: name of every tensor -> its bytes.
        parts: name of every tensor -> the file that holds it.
    """

    path: Path
    shapes: dict[str, tuple[int, ...]]
    sizes: dict[str, int]
    parts: dict[str, Path]

    @classmethod
    def open(cls, path: Path) -> "WeightFile":
        """Reads names and shapes.

        Raises:
            CheckpointError: damaged, something else, or holding more than plain data.
        """
        file = cls(path, {}, {}, {})
        for part in _parts(path):
            for name, (shape, size) in _header(part).items():
                file.shapes[name], file.sizes[name], file.parts[name] = shape, size, part
        return file

    def read(self, groups: Iterable[Sequence[str]]) -> Iterator[list[Tensor]]:
        """Values of each group of names, in order; valid until the next is asked for."""
        chunk: list[Sequence[str]] = []
        size, limit = 0, max(CHUNK[0], CHUNK[1] * sum(self.sizes.values()))
        for names in groups:
            chunk.append(names)
            size += sum(self.sizes[name] for name in names)
            if size >= limit:
                yield from self._read_chunk(chunk)
                chunk, size = [], 0
        yield from self._read_chunk(chunk)

    def _read_chunk(self, groups: Sequence[Sequence[str]]) -> Iterator[list[Tensor]]:
        with ExitStack() as stack:
            needed = {self.parts[name] for names in groups for name in names}
            readers = {part: stack.enter_context(_reader(part)) for part in needed}
            yield from ([readers[self.parts[name]](name) for name in names] for names in groups)


def splits(name: str) -> Iterator[tuple[str, str]]:
    """Every prefix that a name may have, the empty one first, and what follows it."""
    for start in (0, *(match.end() for match in BOUNDARY.finditer(name))):
        yield name[:start], name[start:]


def _parts(path: Path) -> list[Path]:
    """The file itself, or those that it names if it is an index."""
    with path.open("rb") as file:
        if not file.read(1024).lstrip().startswith(b"{"):
            return [path]
    try:
        names = sorted({str(name) for name in json.loads(path.read_bytes())[INDEX].values()})
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not weights, and not an index of their parts; fetch it again") from error
    missing = [name for name in names if not (path.parent / name).is_file()]
    if missing or not names:
        raise CheckpointError(
            f"{path} names {len(names)} files, and {len(missing)} of them are missing ({', '.join(missing[:2])}); "
            "fetch them into its folder"
        )
    return [path.parent / name for name in names]


def _header(path: Path) -> dict[str, tuple[tuple[int, ...], int]]:
    """Name of every tensor of one file -> shape and bytes."""
    try:
        if is_safetensors(path):
            with safe_open(path, framework="pt") as file:
                shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            return {name: (shape, 4 * torch.Size(shape).numel()) for name, shape in shapes.items()}
        state = _torch_state(path)
    except (SafetensorError, RuntimeError, OSError, ValueError, EOFError) as error:
        what = describe(path)
        reason = f"{path} is {what}" if what else f"{path} is damaged or not a weight file; fetch or train it again"
        raise CheckpointError(reason) from error
    except Exception as error:  # pickle raises what it likes; weights_only turns code into an UnpicklingError
        raise CheckpointError(_refusal(path, error)) from error
    if not state:
        raise CheckpointError(f"{path} does not hold a state dict of tensors; save network.state_dict()")
    return {name: (tuple(value.shape), value.nbytes) for name, value in state.items()}


def _refusal(path: Path, error: Exception) -> str:
    """What to say of a torch file that pickle's restricted reader refuses."""
    found = re.search(r"GLOBAL (\S+) was not an allowed", str(error))
    if not found:
        return (
            f"{path} is {describe(path) or 'damaged or holds more than tensors; fetch it again, or save plain weights'}"
        )
    trail = refused_entry(path, found[1]) or ()
    holder = f"{path}: its entry '{'.'.join(trail)}'" if trail else str(path)
    keep = f"drop '{trail[0]}', torch.save the rest" if trail else "torch.save its state_dict()"
    return (
        f"{holder} holds {found[1]}, which is refused: to load it may run code. Save plain weights: where you trust "
        f"the file, load it with torch.load(FILE, weights_only=False), {keep}; write numbers as int or float"
    )


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one: with the length of its header, then JSON."""
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < 2**30


@contextmanager
def _reader(path: Path) -> Iterator[Callable[[str], Tensor]]:
    """Gives the tensors of one file by name while it is open."""
    if is_safetensors(path):
        with safe_open(path, framework="pt") as file:
            yield file.get_tensor
    else:
        yield _torch_state(path).__getitem__


def _torch_state(path: Path) -> dict[str, Tensor]:
    with path.open("rb") as file:
        head = file.read(4)
        if head != b"PK\x03\x04" and head[:1] != b"\x80":
            raise ValueError("neither a zip archive nor a pickle")
        # Files of torch before 1.6 cannot be mapped, and a path that ends in .safetensors is read as such.
        mmap = head[:1] == b"P" and path.suffix != ".safetensors"
        file.seek(0)
        source = path if mmap else file
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=mmap)
    return _flat(_unwrapped(content)) if isinstance(content, Mapping) else {}


def _unwrapped(content: Mapping) -> Mapping:
    """The innermost mapping that is alone with tensors in all that are around it."""
    inside = [value for key, value in content.items() if isinstance(key, str) and _flat({key: value})]
    return _unwrapped(inside[0]) if len(inside) == 1 and isinstance(inside[0], Mapping) else content


def _flat(content: Any, prefix: str = "") -> dict[str, Tensor]:
    """Every tensor of nested mappings by its name; a mapping whose keys are no texts (of an optimizer) is left out."""
    state: dict[str, Tensor] = {}
    for key, value in content.items():
        if isinstance(value, Tensor) and isinstance(key, str):
            state[prefix + key] = value
        elif isinstance(value, Mapping) and isinstance(key, str):
            state |= _flat(value, f"{prefix}{key}{INSIDE}")
    return state
