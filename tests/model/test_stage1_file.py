"""Any weight file as stage 1: other people's networks through spandrel, and our own published layouts."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.testing import assert_close

import inference
from diffbir import Restorer
from diffbir.model.networks.rrdbnet import RRDBNet
from diffbir.model.networks.scunet import SCUNet
from diffbir.model.networks.swinir import SwinIR, relative_position_index
from diffbir.model.presets import load_preset
from diffbir.model.stage1_file import SpandrelNetwork
from diffbir.model.weights.checkpoint import save_weights
from diffbir.utils.cli import UserError
from diffbir.utils.config import instantiate, load_config
from diffbir.utils.image import read_rgb
from tests.golden.fill import fill

spandrel = pytest.importorskip("spandrel")


def compact():
    from spandrel.architectures.Compact import Compact

    return Compact(num_feat=16, num_conv=1, upscale=2), 2  # sees three pixels far


def nafnet():
    from spandrel.architectures.NAFNet import NAFNet

    return NAFNet(width=8, middle_blk_num=1, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]), 1


def dat():
    from spandrel.architectures.DAT import DAT

    split = dict(split_size=[4, 4], depth=[2], num_heads=[2], expansion_factor=2)
    return DAT(img_size=32, embed_dim=32, upscale=3, upsampler="pixelshuffledirect", **split), 3


def grey():
    from spandrel.architectures.SCUNet import SCUNet

    return SCUNet(in_nc=1, config=[1] * 7, dim=64), 1


def randomised(network: nn.Module) -> nn.Module:
    g = torch.Generator().manual_seed(0)
    for p in network.parameters():
        if p.ndim > 1 and p.numel():
            p.data = torch.randn(p.shape, generator=g) / p[0].numel() ** 0.5
    return network.eval()


SIZES = [(33, 50), (64, 64), (21, 90)]
MAKE = [compact, nafnet, dat, grey]


@pytest.mark.parametrize("make", MAKE)
@torch.inference_mode()
def test_foreign_networks_run_at_any_size(make, tmp_path):
    """The result is what the network itself computes, at each of three sizes; in the preset as on the command line."""
    network, scale = make()
    state, path = randomised(network).state_dict(), tmp_path / "net.pth"
    torch.save({"params_ema": state, "params": {}}, path)
    restorer = Restorer.from_preset("mini", "cpu", stage1=path, stage="1")
    assert isinstance(restorer.stage1, SpandrelNetwork) and restorer.stage1.scale == scale
    loaded = spandrel.ModelLoader().load_from_file(path)
    for height, width in SIZES:
        x = torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(height))
        y = restorer.restore(x, restorer.options(stage="1", upscale=scale)).image
        if min(height, width) >= loaded.size_requirements.minimum:  # others are padded with more by us
            expected = torch.cat([loaded(c) for c in x.split(1, 1)], 1) if make is grey else loaded(x)
            assert expected.std() > 1e-3
            assert_close(y, expected, rtol=0, atol=1e-4)
        assert y.shape == (1, 3, scale * height, scale * width)
        other = restorer.restore(x, restorer.options(stage="1", upscale=1.5)).image
        assert other.shape == (1, 3, round(1.5 * height), round(1.5 * width))


@torch.inference_mode()
def test_tiles_of_a_convolutional_network_are_seamless(tmp_path):
    network, _ = compact()
    torch.save(randomised(network).state_dict(), tmp_path / "net.pth")
    restorer = Restorer.from_preset("mini", "cpu", stage1=tmp_path / "net.pth", stage="1")
    x = torch.rand(1, 3, 150, 210, generator=torch.Generator().manual_seed(0))
    whole, tiled = (restorer.restore(x, restorer.options(stage="1", upscale=2, tile=t)).image for t in (0, 128))
    assert_close(tiled, whole, rtol=0, atol=1e-5)


def published(name: str) -> dict[str, Tensor]:
    """State of one of our own stage 1, small where only the kind matters, with what published files carry besides."""
    if name == "mini/swinir":
        return instantiate(load_config("configs/model/mini/swinir.yaml").networks.stage1).state_dict()
    node = load_config(f"configs/model/{name}.yaml").networks.stage1
    state = fill(instantiate(node)).state_dict()
    if name == "swinir":
        for i in range(8):
            for j in range(6):
                block = f"layers.{i}.residual_group.blocks.{j}"
                state[f"{block}.attn.relative_position_index"] = relative_position_index(8)
                if j % 2:
                    state[f"{block}.attn_mask"] = torch.zeros(64, 64, 64)
    return state


@pytest.mark.parametrize(
    "name, cls, suffix",
    [("mini/swinir", SwinIR, ".safetensors"), ("rrdbnet", RRDBNet, ".pth"), ("scunet", SCUNet, ".safetensors")],
)
def test_our_own_published_files_load_as_our_own_networks(name, cls, suffix, tmp_path):
    state, path = published(name), tmp_path / f"stage1{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}}, path)
    else:
        save_weights(state, path)
    restorer = Restorer.from_preset("mini", "cpu", stage1=path, stage="1")
    assert type(restorer.stage1) is cls
    for key, value in restorer.stage1.state_dict().items():
        assert torch.equal(value, state[key])


@pytest.mark.parametrize("name", ["swinir", "rrdbnet", "scunet"])
@torch.inference_mode()
def test_spandrel_computes_the_same_from_our_published_files(name, tmp_path):
    """Through either way in, the same numbers."""
    state, path = published(name), tmp_path / "stage1.pth"
    torch.save(state, path)
    ours = Restorer.from_preset("mini", "cpu", stage1=path, stage="1").stage1
    theirs = SpandrelNetwork(str(path))
    assert theirs.scale == getattr(ours, "scale", 1)
    side = 16 if name == "rrdbnet" else 64
    x = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    expected = ours(x).clamp(0, 1)
    assert expected.std() > 1e-3
    assert_close(theirs(x), expected, rtol=0, atol=1e-4)


def test_the_command_line_puts_any_network_in_front_of_stage_2(tmp_path):
    network, _ = compact()
    torch.save({"params": randomised(network).state_dict()}, tmp_path / "net.pth")
    Image.fromarray(read_rgb("inputs/demo/village-phone.jpg")[:40, :51]).save(tmp_path / "photo.png")
    flags = ["--input", tmp_path / "photo.png", "--output", tmp_path / "out", "--stage1", tmp_path / "net.pth"]
    assert inference.main([*map(str, flags), "--steps", "2", "--upscale", "1.5", "--device", "cpu"]) == 0
    assert np.asarray(Image.open(tmp_path / "out" / "photo.png")).shape == (60, 76, 3)


def test_a_network_without_half_precision_stays_in_float32(tmp_path):
    config = load_preset("mini", stage1=save(tmp_path, swinir_like()))
    restorer = Restorer.from_config(config, "cpu", "fp16", stage="1")
    assert next(restorer.stage1.parameters()).dtype == torch.float32


def swinir_like() -> dict[str, Tensor]:
    network = SwinIR(embed_dim=12, depths=[2], num_heads=[2], window_size=4, sf=2, upsampler="pixelshuffledirect")
    state = network.state_dict()
    state["layers.0.residual_group.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)  # of 8x8 pixels
    for j in range(2):
        state[f"layers.0.residual_group.blocks.{j}.attn.relative_position_index"] = relative_position_index(4)
    return state


def save(folder, state) -> str:
    torch.save(state, folder / "net.pth")
    return str(folder / "net.pth")


@pytest.mark.parametrize(
    "content, words",
    [
        ({"a.weight": torch.ones(2, 2)}, "is no network that spandrel knows"),
        ({"state_dict": nn.Linear(1, 1)}, "entry 'state_dict' holds torch.nn.modules.linear.Linear, which is refused"),
        ([torch.ones(1)], "does not hold a state dict"),
    ],
)
def test_other_files_are_refused_in_one_sentence(content, words, tmp_path):
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(UserError, match=words):
        Restorer.from_preset("mini", "cpu", stage1=tmp_path / "net.pth", stage="1")
    with pytest.raises(UserError, match="weights not found"):
        load_preset("mini", stage1=tmp_path / "nothing.pth")
