"""The contract with published checkpoints: every network has exactly their keys and shapes."""

import json
from pathlib import Path

import pytest
import torch

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.control import LatentBranch
from diffbir.model.networks.rrdbnet import RRDBNet
from diffbir.model.networks.scunet import SCUNet
from diffbir.model.networks.swinir import SwinIR
from diffbir.model.networks.text import OpenClipTextEncoder
from diffbir.model.networks.unet import UNet

MANIFEST = json.loads((Path(__file__).parents[2] / "golden/state_dict_keys.json").read_text())
DERIVED = (".attn_mask", ".relative_position_index")  # files may carry them; the network computes them


def small_swinir(**head) -> SwinIR:
    return SwinIR(embed_dim=24, depths=[2, 2], num_heads=[2, 2], **head)


NETWORKS = {
    "swinir": lambda: SwinIR(unshuffle_scale=8),
    "swinir_small_pixelshuffle": lambda: small_swinir(upsampler="pixelshuffle", sf=4),
    "swinir_small_pixelshuffledirect": lambda: small_swinir(upsampler="pixelshuffledirect", sf=4),
    "swinir_small_nearest_conv": lambda: small_swinir(upsampler="nearest+conv", sf=4),
    "swinir_small_denoise": lambda: small_swinir(upsampler="", sf=1),
    "swinir_small_3conv": lambda: small_swinir(upsampler="nearest+conv", sf=4, resi_connection="3conv"),
    "bsrnet": RRDBNet,
    "scunet": SCUNet,
    "unet": UNet,
    "vae": AutoencoderKL,
    "clip": OpenClipTextEncoder,
    "controlnet": LatentBranch,
}


def test_every_published_network_is_covered():
    assert NETWORKS.keys() == MANIFEST.keys()


@pytest.mark.parametrize("name", NETWORKS)
def test_keys_and_shapes_are_the_published_ones(name):
    with torch.device("meta"):
        state = NETWORKS[name]().state_dict()
    published = {key: shape for key, shape in MANIFEST[name].items() if not key.endswith(DERIVED)}
    assert {key: list(value.shape) for key, value in state.items()} == published
