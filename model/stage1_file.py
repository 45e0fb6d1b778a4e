"""Any weight file as stage 1: our own networks by their keys, others through spandrel (MIT, an extra)."""

import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from diffbir.model.networks.layers import pad_to_multiple
from diffbir.model.weights.checkpoint import CheckpointError, WeightFile, contents, find_weights
from diffbir.model.weights.foreign import read_foreign, tensors
from diffbir.utils.cli import UserError
from diffbir.utils.config import ROOT, instantiate, load_config

OWN = ("swinir", "rrdbnet", "scunet", "mini/swinir")  # in configs/model/


class SpandrelNetwork(nn.Module):
    """A network that spandrel recognises by its weights: SwinIR of any shape, HAT, DAT, NAFNet, Compact, ...

    Args:
        file: of weights, in any nesting; code in it is never run.

    Raises:
        UserError: spandrel is missing or doesn't know the network, or the network is no restorer of photos.
    """

    def __init__(self, file: str):
        super().__init__()
        try:
            import spandrel
        except ImportError as error:
            raise UserError(f"{file} as stage 1 needs the package spandrel; pip install 'diffbir[stage1]'") from error
        state = tensors(read_foreign(file))
        try:
            found = spandrel.ModelLoader().load_from_state_dict(dict(state))
        except (spandrel.UnsupportedModelError, RuntimeError, KeyError, AssertionError) as error:
            raise UserError(
                f"{file} is no network that spandrel knows; give a restorer's or upscaler's file"
            ) from error
        channels, size = {found.input_channels, found.output_channels}, found.size_requirements
        restores = isinstance(found, spandrel.ImageModelDescriptor) and found.purpose in ("SR", "Restoration")
        if not restores or size.square or channels not in ({1}, {3}):
            raise UserError(
                f"{file} holds {found.architecture.name} ({found.purpose}, {found.input_channels} channels); "
                "stage 1 is a restorer or upscaler of whole pictures"
            )
        self.network, self.scale, self.supports_half = found.model, found.scale, found.supports_half
        self._found, self._grey, self._minimum, self._padded = found, channels == {1}, size.minimum, size.multiple_of
        window = getattr(found.model, "window_size", 1)
        self.multiple = math.lcm(size.multiple_of, window if isinstance(window, int) else 1)

    def forward(self, image: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1], any size -> (B, 3, scale H, scale W) in [0, 1]; a grey network sees each channel."""
        B, _, H, W = image.shape
        x = pad_to_multiple(image, self._padded if min(H, W) >= self._minimum else self._minimum)
        y = self._found(x.flatten(0, 1)[:, None]).unflatten(0, (B, 3))[:, :, 0] if self._grey else self._found(x)
        return y[..., : H * self.scale, : W * self.scale]


def stage1_config(path: str | Path) -> dict:
    """What `networks` and `weights` of a preset say for a file as stage 1.

    Raises:
        UserError: the file is missing.
    """
    file = find_weights(path)
    for name in OWN:
        node, own = own_network(name)
        if fits(file, own):
            return {"networks": {"stage1": node}, "weights": {"stage1": str(file)}}
    node = {"target": "model.stage1_file.SpandrelNetwork", "params": {"file": str(file)}}
    return {"networks": {"stage1": node}, "weights": {"stage1": None}}


@cache
def own_network(name: str) -> tuple[DictConfig, dict[str, Tensor]]:
    """Node and state, on the meta device, of one of our own."""
    node = load_config(ROOT / "configs" / "model" / f"{name}.yaml").networks.stage1
    with torch.device("meta"):
        return node, instantiate(node).state_dict()


def fits(file: Path, own: Mapping[str, Tensor]) -> bool:
    """Whether a file holds exactly the weights of a state."""
    try:
        opened = WeightFile.open(file)
        found = contents(opened, "stage1", own)
    except CheckpointError:  # what is wrong with it is said when it is read
        return False
    shapes = {key: opened.shapes.get(source.keys[0]) for key, source in found.items()}
    return shapes == {key: tuple(value.shape) for key, value in own.items()}
