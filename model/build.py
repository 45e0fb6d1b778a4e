"""Builds the networks that a configuration names and fills them from its weight files."""

from collections.abc import Container, Mapping
from contextlib import nullcontext

import torch
from omegaconf import DictConfig
from torch import nn

from diffbir.model.weights.checkpoint import find_weights, load_weights
from diffbir.utils.config import ConfigError, instantiate


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
        # A network that gets its weights from a file needs no memory, and no initial values, before.
        with torch.device("meta") if name in files else nullcontext():
            network = instantiate(node, f"networks.{name}")
        if name in files and any(True for _ in network.parameters()):
            load_weights(network, files[name], name, (dtypes or {}).get(name))
        networks[name] = network
    return networks
