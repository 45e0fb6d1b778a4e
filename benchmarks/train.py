"""Training throughput: this code against the straightforward PyTorch of the same networks, on this machine.

Straightforward: attention with its matrices written out, softmax(q k^T + bias) v, and window by window as SwinIR was
published; a convolution after every nearest-neighbour doubling; contiguous layout; frozen networks in float32.
Ours: what train_stage1.py and train_stage2.py run, frozen networks in bf16 (`frozen_dtype`) where precision is.

All cases are whole steps (encode, forward, backward, AdamW) on the same weights and the same random batch. Every repeat
times one step of each case, after one that isn't timed, so that whatever else the machine does meets them all; medians.
Weights are random: they don't change the time. The losses at the start, with the same noise, agree to rounding.
"""

import statistics
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import product
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments, machine
from diffbir.model.networks import swinir
from diffbir.model.training.base import Trainable
from diffbir.model.training.run import build_module
from diffbir.utils.cli import entry_point
from diffbir.utils.config import ROOT, load_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
CASES = ("straightforward", "ours")


def attention(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, *_) -> Tensor:
    """As `F.scaled_dot_product_attention` without dropout, with its matrices written out."""
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = logits if attn_mask is None else logits + attn_mask
    return logits.softmax(-1) @ v


def window_attention(qkv: Tensor, heads: int, bias: Tensor, mask: Tensor | None = None) -> Tensor:
    """As `model.networks.attention.window_attention`, in the steps of SwinIR's published code."""
    B, nW, N = qkv.shape[:3]
    q, k, v = qkv.reshape(B * nW, N, 3, heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
    logits = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)
    logits = logits + bias
    if mask is not None:
        logits = (logits.view(B, nW, heads, N, N) + mask[:, None]).view(-1, heads, N, N)
    return (logits.softmax(-1) @ v).transpose(1, 2).reshape(B, nW, N, -1)


def upsample_conv(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """As `model.networks.layers.upsample_conv`."""
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


@contextmanager
def straightforward() -> Iterator[None]:
    """Both passes belong in it: with checkpointing, the backward pass runs the forward pass again."""
    with (
        patch.object(F, "scaled_dot_product_attention", attention),
        patch.object(swinir, "window_attention", window_attention),
        patch.object(swinir, "upsample_conv", upsample_conv),
    ):
        yield


def arrange(module: Trainable, case: str, dtype: torch.dtype) -> None:
    """Brings the weights into the layout and type of a case; one copy of a large model is enough for all."""
    module.to(memory_format=torch.channels_last if case == "ours" else torch.contiguous_format)
    module.frozen.to(dtype if case == "ours" else torch.float32)


def loss(module: Trainable, batch: dict, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    with torch.autocast(module.device.type, dtype, enabled=dtype != torch.float32):
        output = module.training_step(batch, 0)
    return output["loss"] if isinstance(output, dict) else output


def step(module: Trainable, batch: dict, dtype: torch.dtype, optimizer: torch.optim.Optimizer) -> None:
    loss(module, batch, dtype).backward()
    optimizer.step()
    optimizer.zero_grad()


def randn_like(x: Tensor) -> Tensor:
    """The same draws whatever the layout and type of x."""
    return torch.randn(x.shape, device=x.device).to(x.dtype)


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    p.add_argument("--config", default="configs/train/stage1_codeformer.yaml", help="training (default: %(default)s)")
    p.add_argument("--size", type=int, default=512, help="side of the crops (default: %(default)s)")
    p.add_argument("--batch", type=int, default=1, help="images in a step (default: %(default)s)")
    p.add_argument("--repeats", type=int, default=5, help="(default: %(default)s)")
    p.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=list(DTYPES), help="(default: all)")
    p.add_argument("--fused", action="store_true", help="ours with optimizer.params.fused=true")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the YAML")
    args = p.parse_args(argv)
    warnings.filterwarnings("ignore", ".*self.trainer.* reference is not registered.*")

    torch.manual_seed(0)
    config = load_config(ROOT / args.config, [f"photos={ROOT / 'inputs/demo'}", *args.overrides])
    config.weights = {}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    module = build_module(config).to(device).train()
    shape = (args.batch, 3, args.size, args.size)
    batch = {"hq": torch.rand(shape, device=device), "lq": torch.rand(shape, device=device)}
    batch["prompt"] = [""] * args.batch

    optimizers, losses, times = {}, {}, {}
    for case in CASES:  # moments have the layout of the weights that they belong to
        arrange(module, case, torch.float32)
        configured = module.configure_optimizers()
        optimizers[case] = configured["optimizer"] if isinstance(configured, dict) else configured
        for group in optimizers[case].param_groups:
            group["fused"] = args.fused and case == "ours"
    grid = list(product(CASES, args.precisions))
    for repeat in tqdm(range(args.repeats + 1), unit="repeat"):
        for case, precision in grid:
            dtype = DTYPES[precision]
            arrange(module, case, dtype)
            with straightforward() if case == "straightforward" else nullcontext():
                if repeat == 0:  # before the first step changes the weights
                    with torch.no_grad(), patch("torch.randn_like", randn_like):
                        losses[case, precision] = loss(module, batch, dtype).item()
                    continue
                step(module, batch, dtype, optimizers[case])  # warms up what the case before put out
                start, cpu = time.perf_counter(), time.process_time()
                step(module, batch, dtype, optimizers[case])
                if device.type == "cuda":
                    torch.cuda.synchronize()
                seconds = (time.perf_counter() - start, time.process_time() - cpu)
            times.setdefault((case, precision), []).append(seconds)

    print(f"\n{args.config}, {args.size} pixels, batch {args.batch}; {machine.processor(device)}, {machine.threads()};")
    print(f"{machine.versions('torch')}; medians of {args.repeats} interleaved steps.\n")
    print("| | precision | s / step | images / s | CPU s / step | speed-up | the same in CPU s | loss at the start |")
    print("|---|---|---|---|---|---|---|---|")
    medians = {
        key: [statistics.median(column) for column in zip(*values, strict=True)] for key, values in times.items()
    }
    for (case, precision), (wall, cpu) in medians.items():
        reference = medians["straightforward", precision]
        row = f"| {case} | {precision} | {wall:.2f} | {args.batch / wall:.2f} | {cpu:.2f} "
        print(row + f"| {reference[0] / wall:.2f} | {reference[1] / cpu:.2f} | {losses[case, precision]:.5f} |")


if __name__ == "__main__":
    sys.exit(main())
