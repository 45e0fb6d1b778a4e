"""Every metric against what pyiqa computes on ten damaged photos, recorded once by `record.py`."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from diffbir.utils.image import to_tensor
from diffbir.utils.metrics import DISTS, LPIPS, LPIPSVGG, psnr, ssim
from diffbir.utils.naturalness import BRISQUE, BRISQUE_WEIGHTS, NIQE
from tests.evaluation.pairs import NAMES, pair

RECORDED = json.loads(Path(__file__).with_name("pyiqa.json").read_text())
TOLERANCES = {"niqe": {"rtol": 0, "atol": 0.05}, "brisque": {"rtol": 0, "atol": 0.05}}
RELATIVE = {"rtol": 1e-3, "atol": 0}


@pytest.fixture(scope="module")
def metrics(vgg16):
    return {
        "psnr": psnr,
        "psnr-y": partial(psnr, channel="y"),
        "ssim": ssim,
        "ssim-y": partial(ssim, channel="y"),
        "lpips": LPIPS(),
        "lpips-vgg": LPIPSVGG(vgg16=vgg16),
        "dists": DISTS(vgg16=vgg16),
        "niqe": NIQE(),
        **({"brisque": BRISQUE()} if BRISQUE_WEIGHTS.is_file() else {}),
    }


def test_ten_pairs_were_recorded_with_a_version():
    assert tuple(RECORDED["scores"]) == NAMES and len(NAMES) == 10
    assert RECORDED["versions"]["pyiqa"] == "0.1.16"


@pytest.mark.parametrize("name", NAMES)
def test_every_metric_agrees_with_pyiqa(metrics, name):
    x, y = (to_tensor(rgb)[None] for rgb in pair(name))
    for title, metric in metrics.items():
        with torch.no_grad():
            score = metric(x) if title in TOLERANCES else metric(x, y)
        expected = torch.tensor([RECORDED["scores"][name][title]], dtype=score.dtype)
        limits = TOLERANCES.get(title, RELATIVE)
        assert_close(score, expected, **limits, msg=lambda text, title=title: f"{title}: {text}")
