"""Configuration: YAML files in, objects out.

A YAML may name others under `include:` (paths relative to itself); they are merged first, in order. `${a.b}` reuses a
value, so that no number is written twice. `key=value` overrides from a command line are merged last. A node with a
`target` (a dotted Python name) and optional `params` becomes an object; `partial: true` leaves it a callable.
"""

import difflib
import functools
import importlib
import inspect
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from diffbir.utils import moved
from diffbir.utils.cli import UserError

ROOT = Path(__file__).resolve().parents[1]

# A YAML from a stranger is code: it may only build the classes of this project and those that these modules document.
# Functions and deeper modules are left out: pytorch_lightning.cli or torch.utils.data.datapipes would run anything.
NAMESPACE = "diffbir"
OWN = ("model", "dataset", "utils")  # its folders; `model.x.Y` is short for `diffbir.model.x.Y`
LIBRARIES = (
    "torch.nn",
    "torch.optim",
    "torch.optim.lr_scheduler",
    "torch.utils.data",
    "torchvision.transforms.v2",
    "pytorch_lightning",
    "pytorch_lightning.callbacks",
    "pytorch_lightning.loggers",
    "pytorch_lightning.strategies",
    "bitsandbytes.optim",
)

# Keys whose values are paths, wherever they stand; so are all below `weights`.
PATHS = (
    *("photos", "val_photos", "run_dir", "resume", "weights", "source", "path", "root", "hq", "lq", "folder"),
    *("lora", "start"),
)


class ConfigError(UserError):
    """A configuration that cannot be used; the message names the file or the key's full path."""


def project_path(path: str | Path) -> Path:
    """A path as given if it exists there, else below the project's root (so presets work from any folder)."""
    path = Path(path).expanduser()
    return path if path.is_absolute() or path.exists() else ROOT / path


def load_config(path: str | Path, overrides: Iterable[str] = ()) -> DictConfig:
    """Reads a YAML with its includes, applies `key=value` overrides and resolves every `${...}`; see `apply_overrides`.

    Raises:
        ConfigError: the file or an include is missing or is not YAML, or includes form a circle.
    """
    return apply_overrides(read_config(path), overrides, path)


def read_config(path: str | Path) -> DictConfig:
    """Reads a YAML with its includes."""
    return _read(project_path(path), ())


def apply_overrides(config: DictConfig, overrides: Iterable[str], path: str | Path) -> DictConfig:
    """Applies `key=value` overrides to a configuration from `path` and resolves every `${...}`, in place.

    Raises:
        ConfigError: an override names a key that does not exist, or a value is left open (`???`) or cannot be resolved.
    """
    for override in overrides:
        key, sep, value = override.partition("=")
        if not sep or not key:
            raise ConfigError(
                f"'{override}' is not of the form key=value; write for example trainer.params.max_steps=100"
            )
        _check_exists(config, key)
        try:
            OmegaConf.update(config, key, _path(value) if _is_path(key) else _value(value), merge=False)
        except (OmegaConfBaseException, YAMLError) as error:
            raise ConfigError(f"'{override}': {_first_line(error)}") from error
    missing = list(_open_keys(OmegaConf.to_container(config)))
    if missing:
        raise ConfigError(f"{path}: {missing[0]} has no value; give it on the command line as {missing[0]}=...")
    try:
        OmegaConf.to_container(config, resolve=True)  # names the key; `resolve` of OmegaConf 2.3 doesn't
        OmegaConf.resolve(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{path}: {error.full_key or 'a key'}: {_first_line(error)}") from error
    for key, value in _leaves(OmegaConf.to_container(config)):
        if _is_path(key) and not (value is None or isinstance(value, str)):
            raise ConfigError(f"{path}: {key} is read as {value!r} and not as a path; put the path in quotes")
    return config


def _value(text: str) -> Any:
    return OmegaConf.from_dotlist([f"value={text}"]).value


def _is_path(key: str) -> bool:
    first, last = key.partition(".")[0], key.rpartition(".")[2]
    return first == "weights" or last in PATHS


def _path(text: str) -> Any:
    """The text as it stands: names such as 2024, 1e3, [2019] or `Trip: Rome` mean something else in YAML.

    Only null, text in quotes, a list of texts, and keys with values in braces are what YAML makes of them, unless there
    is a file or folder of that name.
    """
    if text == "null":
        return None
    if text[:1] not in ("'", '"', "[", "{") or os.path.exists(text) or os.path.exists(ROOT / text):
        return text
    try:
        value = _value(text)
    except (OmegaConfBaseException, YAMLError):
        return text
    inside = value.values() if isinstance(value, DictConfig) else value if isinstance(value, ListConfig) else ()
    plain = not isinstance(value, ListConfig) or all(isinstance(part, str) for part in inside)
    return value if plain and all(part is not None for part in inside) else text


def check_keys(config: DictConfig, required: Sequence[str], optional: Sequence[str] = ()) -> None:
    """Refuses unknown and missing top-level keys.

    Raises:
        ConfigError: naming the first offending key.
    """
    for key in config:
        if key not in (*required, *optional):
            raise ConfigError(f"unknown key '{key}'{hint(str(key), [*required, *optional])}")
    for key in required:
        if key not in config:
            raise ConfigError(f"missing key '{key}'; this command needs {', '.join(required)}")


def instantiate(node: Any, path: str = "") -> Any:
    """Builds the object that a configuration node describes, arguments first.

    Mappings without a `target` become dicts and lists become lists, with their values built.

    Args:
        node: a resolved configuration node, or any plain value (returned as it is).
        path: full key of `node`, for messages.

    Raises:
        ConfigError: a target that is not allowed or does not exist, or an unknown or missing parameter.
    """
    if isinstance(node, (DictConfig, ListConfig)):
        node = OmegaConf.to_container(node, resolve=True)
    if isinstance(node, list):
        return [instantiate(value, f"{path}[{i}]") for i, value in enumerate(node)]
    if not isinstance(node, dict):
        return node
    if "target" not in node:
        return {key: instantiate(value, _join(path, key)) for key, value in node.items()}

    for key in node:
        if key not in ("target", "params", "partial"):
            raise ConfigError(f"unknown key '{_join(path, key)}'; next to 'target' there can be 'params' and 'partial'")
    target = locate(node["target"], _join(path, "target"))
    params = node.get("params") or {}
    if not isinstance(params, dict):
        raise ConfigError(f"{_join(path, 'params')} must hold keys and values, not {params!r}")
    partial = bool(node.get("partial", False))
    _check_params(target, params, partial, _join(path, "params"))
    params = {key: instantiate(value, _join(path, f"params.{key}")) for key, value in params.items()}
    if partial:
        return functools.partial(target, **params)
    try:
        return target(**params)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{path or 'config'}: {node['target']}: {_first_line(error)}") from error


def _read(path: Path, parents: tuple[Path, ...]) -> DictConfig:
    path = path.resolve()
    if path in parents:
        raise ConfigError(f"{path} includes itself through {parents[-1]}; break the circle")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError as error:
        by = f" (included by {parents[-1]})" if parents else ""
        raise ConfigError(f"no configuration file {path}{by}; check the path") from error
    except (YAMLError, OmegaConfBaseException, OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a readable YAML file: {' '.join(str(error).split())}") from error
    if not isinstance(config, DictConfig):
        raise ConfigError(f"{path} must hold keys and values, not a list")
    includes = config.pop("include", None) or []
    includes = [includes] if isinstance(includes, str) else includes
    if not isinstance(includes, (list, ListConfig)) or not all(isinstance(name, str) for name in includes):
        raise ConfigError(f"{path}: include must be a path or a list of paths")
    return OmegaConf.merge(*(_read(path.parent / name, (*parents, path)) for name in includes), config)


def _check_exists(config: DictConfig, key: str) -> None:
    node, walked = config, ""
    for part in key.split("."):
        keys = [str(k) for k in node] if isinstance(node, DictConfig) else []
        if isinstance(node, ListConfig):
            keys = [str(i) for i in range(len(node))]
        if part not in keys:
            if walked.endswith("params") and f"{walked}.{part}" == key:
                return  # a parameter that the YAML leaves at its default; its constructor knows whether it exists
            raise ConfigError(f"unknown key '{_join(walked, part)}' in the override of '{key}'{hint(part, keys)}")
        walked = _join(walked, part)
        node = OmegaConf.select(config, walked, throw_on_missing=False)


def _open_keys(node: Any, path: str = "") -> Iterator[str]:
    """Full keys of `???`, without those that reuse one through `${...}`."""
    if node == "???":
        yield path
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield from _open_keys(value, _join(path, key))


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Full keys of the values that are no mappings, and these; items of a list have the key of the list."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, _join(path, key))
    elif isinstance(node, list):
        for value in node:
            yield from _leaves(value, path)
    else:
        yield path, node


def full_name(target: str) -> str:
    """`model.x.Y` -> `diffbir.model.x.Y`, where it is today if an older configuration names it."""
    target = moved.today(target.removeprefix(f"{NAMESPACE}."))
    return f"{NAMESPACE}.{target}" if target.partition(".")[0] in OWN else target


def locate(name: Any, path: str) -> type:
    """The class that a `target` names, which is imported; `path` is its key, for messages.

    Raises:
        ConfigError: it is not allowed or does not exist.
    """
    module_name, _, attribute = full_name(str(name)).rpartition(".")
    package = module_name.partition(".")[0]
    refusal = f"{path}: '{name}' is refused; it must be a class of this project or of {', '.join(LIBRARIES)}"
    if not module_name.startswith(tuple(f"{NAMESPACE}.{folder}." for folder in OWN)) and module_name not in LIBRARIES:
        raise ConfigError(refusal)
    try:
        found = getattr(importlib.import_module(module_name), attribute)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # the module is there, but not a package that it needs
        if error.name == package:
            raise ConfigError(f"{path}: '{name}' needs the package {package}; pip install {package}") from error
        raise ConfigError(f"{path}: there is no '{name}'; check the spelling") from error
    except AttributeError as error:
        raise ConfigError(f"{path}: there is no '{name}'; check the spelling") from error
    if not inspect.isclass(found) or found.__module__.partition(".")[0] != package:
        raise ConfigError(refusal)
    return found


def _check_params(target: type, params: dict, partial: bool, path: str) -> None:
    names = _parameters(target)
    for key in params if names is not None else ():
        if key not in names:
            raise ConfigError(f"unknown key '{_join(path, key)}' for {target.__qualname__}{hint(str(key), names)}")
    if not partial:
        for p in inspect.signature(target).parameters.values():
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in params:
                raise ConfigError(f"missing key '{_join(path, p.name)}': {target.__qualname__} needs it")


def _parameters(target: type) -> list[str] | None:
    """Names that a class's constructor takes, those that it hands on to its base by **kwargs included; None is any."""
    names: list[str] = []
    for cls in target.__mro__:
        if "__init__" not in vars(cls):
            continue
        _, *parameters = inspect.signature(vars(cls)["__init__"]).parameters.values()  # without self
        names += [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        if not any(p.kind == p.VAR_KEYWORD for p in parameters):
            return names
    return None


def hint(key: str, known: Sequence[str]) -> str:
    """The end of a sentence about an unknown key: what was probably meant, or what there is."""
    close = difflib.get_close_matches(key, known, n=1)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known here: {', '.join(known)}" if known else ""


def _join(path: str, key: Any) -> str:
    return f"{path}.{key}" if path else str(key)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
