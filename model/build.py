"""Builds the networks that a configuration names and fills them from its weight files."""

import copy
from collections.abc import Container, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import nn

from diffbir.model.networks.lora import merge_lora
from diffbir.model.networks.packed import pack
from diffbir.model.weights.checkpoint import find_weights, load_weights
from diffbir.model.weights.lora_file import ADVICE, read_lora
from diffbir.utils.cli import UserError
from diffbir.utils.config import ConfigError, instantiate, locate


def weight_files(config: DictConfig) -> dict[str, str]:
    """Network -> its file. `weights` names one for each network, or is a single file that holds all of them.

    Raises:
        ConfigError: `weights` names a network that isn't there.
    """
    weights = config.get("weights") or {}
    if isinstance(weights, str):
        return dict.fromkeys(config.networks, weights)
    for name in weights:
        if name not in config.networks:
            raise ConfigError(f"unknown key 'weights.{name}'; the networks are {', '.join(config.networks)}")
    return {name: path for name, path in weights.items() if path is not None}


def build_networks(
    config: DictConfig,
    only: Container[str] | None = None,
    dtypes: Mapping[str, torch.dtype] | None = None,
) -> dict[str, nn.Module]:
    """Every entry of `networks` but the empty ones, by name, with its weights where `weights` gives some.

    Files of low-rank additions under `lora`, each FILE or FILE:scale, are merged into them.

    Args:
        only: names of the networks to build; all if None.
        dtypes: type of the weights of each network that is loaded from a file; float32 if not given.

    Raises:
        ConfigError: `weights` names a network that isn't there, or a network cannot be built.
        CheckpointError: a weight file is missing or does not fit.
    """
    files = weight_files(config)
    nodes = {name: node for name, node in config.networks.items() if node is not None}
    nodes = {name: node for name, node in nodes.items() if only is None or name in only}
    for name in nodes:
        if name in files:
            find_weights(files[name], name)  # before anything slow
    networks = {}
    for name, node in nodes.items():
        if "target" in node:
            locate(node.target, f"networks.{name}.target")  # torchvision, up to 0.21, can't be imported on "meta"
        # A network that gets its weights from a file needs no memory, and no initial values, before.
        with torch.device("meta") if name in files else nullcontext():
            network = instantiate(node, f"networks.{name}")
        if name in files and any(True for _ in network.parameters()):
            load_weights(network, files[name], name, (dtypes or {}).get(name))
        networks[name] = network
    lora = config.get("lora") or []
    others = dict.fromkeys(name for name in config.networks if name not in networks)
    for spec in [lora] if isinstance(lora, str) else lora:
        with_additions({**networks, **others}, *file_and_scale(spec))
    return networks


def file_and_scale(spec: str) -> tuple[str, float]:
    """FILE or FILE:scale -> both; the scale is 1 if none is given."""
    file, _, scale = spec.rpartition(":")
    try:
        return (file, float(scale)) if file else (spec, 1.0)
    except ValueError:  # a colon of the path
        return spec, 1.0


def with_additions(
    networks: dict[str, nn.Module | None], path: str | Path, scale: float = 1.0, copied: bool = False
) -> dict[str, nn.Module | None]:
    """Networks with the additions of low rank in a file merged in place; see `model.weights.lora_file`.

    Args:
        copied: leaves them as they are; those that the file has additions for are copied, the others are the same.

    Raises:
        UserError: the file can't be read, or does not fit.
    """
    additions, replaced = read_lora(path, networks)
    networks = {name: copy.deepcopy(n) if copied and name in additions else n for name, n in networks.items()}
    for name, own in additions.items():
        try:
            for key, value in replaced.get(name, {}).items():
                networks[name].get_parameter(key).data.copy_(value)
            merge_lora(networks[name], own, scale)
        except (ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"{path}: {error}; {ADVICE}") from error
    return networks


def compile_network(network: nn.Module, options: Mapping[str, Any]) -> None:
    """Compiles what a network is called by, in place, so that no name of a weight changes.

    Args:
        options: of `torch.compile`.
    """
    methods = getattr(network, "entry_points", ())
    if not methods:
        network.compile(**options)
    for method in methods:
        setattr(network, method, torch.compile(getattr(network, method), **options))


def for_inference(
    network: nn.Module, device: str | torch.device, compiled: Mapping[str, Any] | None = None
) -> nn.Module:
    """A network in the layout that it computes fastest in, in place.

    On a CPU it can't be trained or saved any more; see `model.networks.packed`.

    Args:
        compiled: options of `torch.compile`, if it is to be compiled, on its first call.
    """
    network.requires_grad_(False).eval().to(memory_format=torch.channels_last)
    if compiled is not None:
        compile_network(network, compiled)
    elif torch.device(device).type == "cpu":
        for part in network.modules():
            if getattr(part, "packs", False):
                pack(part)
    return network
