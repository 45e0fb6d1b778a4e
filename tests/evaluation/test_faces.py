"""Identity of aligned faces, by tiny embedders in files, and sets of faces that have no references."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.testing import assert_close

from diffbir.evaluation import run
from diffbir.evaluation.faces import Embedder, IdentityDistance
from diffbir.evaluation.metrics import build_set
from diffbir.utils.cli import UserError
from diffbir.utils.image import write_png
from scripts import evaluate
from tests.evaluation.pairs import damaged, photo


class Means(nn.Module):
    """The mean of each channel in [-1, 1], as a vector."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean(dim=(2, 3))


def saved(network: nn.Module, path: Path, size: int = 8, channels: int = 3) -> Path:
    torch.jit.trace(network, torch.zeros(1, channels, size, size)).save(str(path))
    return path


def flat(*colour: float, border: float | None = None) -> Tensor:
    """A face of one colour, (1, 3, 64, 64); its outermost 8 pixels may have another."""
    x = torch.tensor(colour, dtype=torch.float32).view(1, 3, 1, 1).expand(1, 3, 64, 64).clone()
    if border is not None:
        inner = x[..., 8:-8, 8:-8].clone()
        x[:] = border
        x[..., 8:-8, 8:-8] = inner
    return x


def test_the_distance_is_one_less_the_cosine(tmp_path):
    distance = IdentityDistance(Embedder(saved(Means(), tmp_path / "e.pt"), 8, 1.0))
    x, y = (torch.cat(pictures) for pictures in ([flat(1, 1, 0), flat(1, 0, 0)], [flat(1, 0, 1), flat(0, 1, 1)]))
    assert_close(distance(x, y), torch.tensor([1 - (-1 / 3 + 1 / 3 - 1 / 3), 2.0]), rtol=0, atol=1e-5)
    assert_close(distance(x, x), torch.zeros(2), rtol=0, atol=1e-6)


def test_only_the_middle_is_seen_and_in_the_order_of_channels_it_wants(tmp_path):
    path = saved(Means(), tmp_path / "e.pt")
    face, framed = flat(0.9, 0.5, 0.1), flat(0.9, 0.5, 0.1, border=0.0)
    inside, whole = (IdentityDistance(Embedder(path, 8, crop)) for crop in (0.75, 1.0))
    assert inside(face, framed).item() < 1e-6 < 0.1 < whole(face, framed).item()
    assert_close(inside.embed(framed), torch.tensor([[0.8, 0.0, -0.8]]), rtol=0, atol=1e-5)
    swapped = IdentityDistance(Embedder(path, 8, 0.75, "bgr"))
    assert_close(swapped.embed(framed), torch.tensor([[-0.8, 0.0, 0.8]]), rtol=0, atol=1e-5)
    grey = IdentityDistance(Embedder(saved(Means(), tmp_path / "g.ts", channels=1), 8, 0.75, "grey"))
    luma = 0.299 * 0.9 + 0.587 * 0.5 + 0.114 * 0.1
    assert_close(grey.embed(framed), torch.tensor([[2 * luma - 1]]), rtol=0, atol=1e-5)


def test_onnx_and_torchscript_give_the_same(tmp_path):
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 16, 8)
    file = saved(nn.Sequential(conv, nn.Flatten()), tmp_path / "e.pt")
    (tmp_path / "e.onnx").write_bytes(onnx(conv.weight.detach().numpy(), conv.bias.detach().numpy()))
    x, y = torch.rand(2, 3, 3, 20, 20)
    values = [IdentityDistance(Embedder(path, 8))(x, y) for path in (file, tmp_path / "e.onnx")]
    assert values[0].min() > 1e-3
    assert_close(*values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "name, size, words",
    [
        ("none.pt", 8, "does not exist; give a face embedder"),
        ("state.pth", 8, "is no TorchScript; torch.jit.trace"),
        ("noise.onnx", 8, "is no ONNX file that OpenCV reads"),
        ("weights.safetensors", 8, "must be TorchScript"),
        ("linear.pt", 9, r"cannot embed \(1, 3, 9, 9\).*--embedder-size"),
        ("maps.pt", 8, "an embedder gives a vector for each face"),
        ("linear.pt", 0, "a size of 1 pixel or more"),
    ],
)
def test_what_is_no_embedder_is_refused_in_a_sentence(tmp_path, name, size, words):
    torch.save({"weight": torch.zeros(3)}, tmp_path / "state.pth")
    for noise in ("noise.onnx", "weights.safetensors"):
        (tmp_path / noise).write_bytes(b"nothing")
    saved(nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), tmp_path / "linear.pt")
    saved(nn.Identity(), tmp_path / "maps.pt")
    with pytest.raises(UserError, match=words):
        IdentityDistance(Embedder(tmp_path / name, size))


def test_the_script_adds_identity_and_the_colour_error(tmp_path, capsys):
    for name in ("astronaut", "coffee"):
        face = np.ascontiguousarray(photo(name)[:64, :64])
        write_png(tmp_path / f"hq/{name}.png", face)
        write_png(tmp_path / f"same/{name}.png", face)
        write_png(tmp_path / f"noisy/{name}.png", damaged(face, 0))
    torch.manual_seed(0)
    file = saved(nn.Sequential(nn.Flatten(), nn.Linear(192, 16)), tmp_path / "embedder.pt")
    folders = [str(tmp_path / "same"), str(tmp_path / "noisy"), "--reference", str(tmp_path / "hq")]
    common = ["--metrics", "ciede2000", "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert evaluate.main([*folders, *common, "--embedder", str(file), "--embedder-size", "8"]) == 0
    found = json.loads((tmp_path / "out/report.json").read_text())
    same, noisy = (found["methods"][name]["summary"] for name in ("same", "noisy"))
    assert same["identity"]["mean"] == pytest.approx(0, abs=1e-6) and same["ciede2000"]["mean"] == 0
    assert noisy["identity"]["mean"] > 1e-3 and noisy["ciede2000"]["mean"] > 1
    assert (
        found["metrics"]["identity"]["variant"]
        == "1 - cosine, embedder.pt on the middle 0.78 of faces at 8 pixels, rgb"
    )
    assert len(found["metrics"]["identity"]["weights"]["embedder.pt"]) == 64
    assert "| | pictures | ΔE00 ↓ | identity ↓ |" in capsys.readouterr().out
    assert evaluate.main([*folders, *common[2:], "--metrics", "psnr", "identity"]) == 0
    assert "left out, identity: it needs a face embedder: --embedder FILE" in capsys.readouterr().out


def test_real_faces_are_compared_with_a_set_of_clean_ones(tmp_path, monkeypatch):
    """FID of two methods against a folder of other names and number, from the formula; references come in once."""

    class Features(nn.Module):
        num_features = 3
        seen = 0

        def forward(self, x: Tensor) -> Tensor:
            Features.seen += len(x)
            return x.float().mean(dim=(2, 3)) / 255

    rng = np.random.default_rng(0)
    groups = {"a": (5, 40), "b": (6, 90), "ffhq": (9, 60)}
    colours = {name: rng.integers(low, low + 100, (count, 3)) for name, (count, low) in groups.items()}
    for name, rows in colours.items():
        for i, colour in enumerate(rows):
            write_png(tmp_path / name / f"{name}{i}.png", np.full((16, 16, 3), colour, np.uint8))
    (tmp_path / "ffhq/zz.png").write_bytes(b"nothing")
    monkeypatch.setattr(run, "build_set", lambda name, count, device: build_set(name, count, device, Features()))
    monkeypatch.setattr(run, "_built", lambda *_: {})
    Features.seen = 0
    results = {name: tmp_path / name for name in ("a", "b")}
    found = run.evaluate(
        results, None, evaluate.PROTOCOLS["rgb"], ["fid"], torch.device("cpu"), against=tmp_path / "ffhq"
    )
    assert Features.seen == 5 + 6 + 9
    real = colours["ffhq"] / 255
    for name in results:
        assert found["methods"][name]["summary"]["fid"]["mean"] == pytest.approx(
            fid(colours[name] / 255, real), rel=1e-4
        )
    assert found["against"]["count"] == 9
    assert any("zz.png" in warning for warning in found["warnings"])
    assert any("FID over 5 pictures" in warning for warning in found["warnings"])


def fid(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance of Gaussians with the moments of (N, 3) features; eigenvalues of a product of covariances."""
    covariances = [np.cov(v, rowvar=False) for v in (x, y)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).real).sum()
    return float(((x.mean(0) - y.mean(0)) ** 2).sum() + sum(map(np.trace, covariances)) - 2 * roots)


def onnx(weight: np.ndarray, bias: np.ndarray) -> bytes:
    """An ONNX file, written by hand, of a convolution over the whole picture and a flattening."""

    def number(n: int) -> bytes:
        return bytes([n & 127 | 128]) + number(n >> 7) if n > 127 else bytes([n])

    def field(key: int, value: int | str | bytes) -> bytes:
        if isinstance(value, int):
            return number(key << 3) + number(value)
        value = value.encode() if isinstance(value, str) else value
        return number(key << 3 | 2) + number(len(value)) + value

    def node(kind: str, inputs: list[str], output: str) -> bytes:
        return b"".join(field(1, name) for name in inputs) + field(2, output) + field(4, kind)

    def tensor(name: str, x: np.ndarray) -> bytes:
        dims = b"".join(field(1, n) for n in x.shape)
        return dims + field(2, 1) + field(8, name) + field(9, struct.pack(f"<{x.size}f", *x.flat))

    def value(name: str, shape: tuple[int, ...]) -> bytes:
        dims = b"".join(field(1, field(1, n)) for n in shape)
        return field(1, name) + field(2, field(1, field(1, 1) + field(2, dims)))

    size = field(1, "kernel_shape") + b"".join(field(8, n) for n in weight.shape[2:]) + field(20, 7)  # integers
    nodes = node("Conv", ["x", "w", "b"], "maps") + field(5, size), node("Flatten", ["maps"], "y")
    graph = b"".join(field(1, n) for n in nodes) + field(2, "graph")
    graph += field(5, tensor("w", weight)) + field(5, tensor("b", bias))
    graph += field(11, value("x", (1, *weight.shape[1:]))) + field(12, value("y", (1, len(weight))))
    return field(1, 8) + field(7, graph) + field(8, field(1, "") + field(2, 13))
