"""What is computed in where nobody says so."""

import time

import pytest
import torch

from diffbir.utils import device
from diffbir.utils.cli import UserError
from diffbir.utils.device import pick_precision

CPU = torch.device("cpu")


def test_a_name_is_that_precision_and_auto_is_exact_on_a_cpu():
    assert [pick_precision(name, CPU) for name in ("fp32", "bf16", "auto")] == ["fp32", "bf16", "fp32"]
    assert pick_precision("auto", torch.device("cuda")) == pick_precision("fastest", torch.device("cuda")) == "fp16"
    with pytest.raises(UserError, match="no precision 'fp8'"):
        pick_precision("fp8", CPU)


@pytest.mark.parametrize("slow, found", [(torch.bfloat16, "fp32"), (torch.float32, "bf16")])
def test_the_fastest_is_measured(slow, found, monkeypatch):
    def conv2d(x, weight, padding):
        time.sleep(0.003 * (x.dtype == slow))

    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    monkeypatch.setattr(device.F, "conv2d", conv2d)
    assert pick_precision("fastest", CPU) == found


def test_what_would_be_emulated_is_not_tried(monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    monkeypatch.setattr(device.F, "conv2d", None)
    assert pick_precision("fastest", CPU) == "fp32"
