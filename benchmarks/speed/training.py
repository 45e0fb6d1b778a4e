"""Whole training steps: encode, forward, backward, AdamW, on the same weights and the same random batch.

Ours is what train_stage1.py and train_stage2.py run. Straightforward: attention with its matrices written out, SwinIR
in the steps of its paper, contiguous layout, frozen networks in float32.
"""

import argparse
import warnings
from contextlib import nullcontext
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.speed.cases import Case, flops_of, overrides
from benchmarks.speed.plain import PlainSwinIR, plain_attention
from diffbir.model.training.base import Trainable
from diffbir.model.training.run import build_module
from diffbir.utils.config import ROOT, load_config, read_config
from diffbir.utils.precision import PRECISIONS


def arrange(module: Trainable, plain: bool, dtype: torch.dtype) -> None:
    """Brings the weights into the layout and type of a way; one copy of a large model is enough for both."""
    module.to(memory_format=torch.contiguous_format if plain else torch.channels_last)
    module.frozen.to(torch.float32 if plain else dtype)


def loss(module: Trainable, batch: dict, dtype: torch.dtype) -> Tensor:
    torch.manual_seed(0)
    with torch.autocast(module.device.type, dtype, enabled=dtype != torch.float32):
        output = module.training_step(batch, 0)
    return output["loss"] if isinstance(output, dict) else output


def randn_like(x: Tensor) -> Tensor:
    """The same draws whatever the layout and type of x."""
    return torch.randn(x.shape, device=x.device).to(x.dtype)


def case(args: argparse.Namespace, config_file: str) -> Case:
    warnings.filterwarnings("ignore", ".*self.trainer.* reference is not registered.*")
    torch.manual_seed(0)
    present = read_config(ROOT / config_file).networks
    changes = [o for o in overrides(args) if o.split(".")[1] in present]
    config = load_config(ROOT / config_file, [f"photos={ROOT / 'inputs/demo'}", *changes])
    config.weights = {}
    module = build_module(config).to(args.device).train()
    dtype, side = PRECISIONS[args.precision], args.size or (64 if args.tiny else 512)
    shape = (args.batch, 3, side, side)
    batch = {"hq": torch.rand(shape, device=args.device), "lq": torch.rand(shape, device=args.device)}
    batch["prompt"] = [""] * args.batch
    role, net = next(iter(module.trained.items()))
    plain_net = PlainSwinIR(net) if role == "stage1" else net
    optimizers = {}
    for plain in (False, True):  # moments have the layout of the weights that they belong to
        arrange(module, plain, torch.float32)
        configured = module.configure_optimizers()
        optimizers[plain] = configured["optimizer"] if isinstance(configured, dict) else configured

    def run_loss(plain: bool) -> Tensor:
        arrange(module, plain, dtype)
        module.trained[role] = plain_net if plain else net
        with plain_attention() if plain else nullcontext():
            value = loss(module, batch, dtype)
            if torch.is_grad_enabled():
                value.backward()
        module.trained[role] = net
        return value.detach()

    with torch.no_grad(), patch("torch.randn_like", randn_like):  # steps change the weights
        at_start = {plain: run_loss(plain) for plain in (False, True)}

    def step(plain: bool) -> Tensor:
        run_loss(plain)
        optimizers[plain].step()
        optimizers[plain].zero_grad()
        return at_start[plain]

    runs = {"ours": lambda: step(False), "straightforward": lambda: step(True)}
    facts = {"config": config_file, "pixels": f"{side}x{side}"}
    flops = flops_of(runs["ours"])
    return Case(runs, reference="straightforward", flops=flops, images=args.batch, facts=facts, inference=False)


def stage1(args: argparse.Namespace) -> Case:
    """A training step of SwinIR."""
    return case(args, "configs/train/stage1_codeformer.yaml")


def stage2(args: argparse.Namespace) -> Case:
    """A training step of the branch, with all that is frozen."""
    return case(args, "configs/train/stage2_v1.yaml")
