"""Builds the networks that a configuration names and fills them from its weight files."""

from omegaconf import DictConfig
from torch import nn

from utils.checkpoint import load_weights
from utils.config import ConfigError, instantiate


def build_networks(config: DictConfig) -> dict[str, nn.Module]:
    """Every entry of `networks`, by name, with `weights.<name>` loaded where it is given.

    Raises:
        ConfigError: `weights` names a network that isn't there, or a network cannot be built.
        CheckpointError: a weight file is missing or does not fit.
    """
    weights = config.get("weights") or {}
    for name in weights:
        if name not in config.networks:
            raise ConfigError(f"unknown key 'weights.{name}'; the networks are {', '.join(config.networks)}")
    networks = {name: instantiate(node, f"networks.{name}") for name, node in config.networks.items()}
    for name, path in weights.items():
        if path is not None:
            load_weights(networks[name], path)
    return networks
