"""What is timed: each case sets up the ways to compute one thing, ours first, over the same random weights.

Weights are those of preset v1_general (the published SwinIR, Stable Diffusion 2.1 and the branch); random ones take the
same time.
"""

import argparse
import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_size import random_state
from benchmarks.speed.peers import DiffusersDenoiser, peer
from benchmarks.speed.plain import PlainSwinIR
from diffbir.model.build import for_inference
from diffbir.model.networks.condition import Condition
from diffbir.model.presets import load_preset
from diffbir.model.sampling.denoiser import ControlledUNet
from diffbir.model.sampling.striped import StripedAutoencoder
from diffbir.utils.config import instantiate
from diffbir.utils.precision import PRECISIONS, dtype_of

# Sizes at which every case takes moments on a CPU, to see that it runs; their figures say nothing.
TINY = {
    "unet": (
        *("model_channels=32", "channel_mult=[1,2]", "num_res_blocks=1", "attention_factors=[1,2]"),
        *("head_channels=16", "norm_groups=8"),
    ),
    "autoencoder": ("channels=16", "channel_mult=[1,2,2,2]", "norm_groups=4"),
    "text_encoder": ("width=64", "layers=2", "heads=2"),
    "stage1": ("embed_dim=24", "depths=[2]", "num_heads=[2]"),
}
TEXT_TOKENS = 77


@dataclass(frozen=True)
class Case:
    """The ways to compute one thing.

    Args:
        runs: each by its name, ours first.
        weights: gives the bytes of the weights that each holds.
        reference: the one that outputs and times are compared with; None if there is only ours.
        flops: of the reference, a multiplication and an addition each.
        images: how many a call computes.
        facts: what it ran with.
        inference: whether nothing in it needs a gradient.
        own_process: whether a run is a process of its own: nothing here to warm up, and its memory isn't this one's.
    """

    runs: Mapping[str, Callable[[], Any]]
    weights: Mapping[str, Callable[[], int]] = field(default_factory=dict)
    reference: str | None = None
    flops: int | None = None
    images: int = 1
    facts: Mapping[str, Any] = field(default_factory=dict)
    inference: bool = True
    own_process: bool = False


def overrides(args: argparse.Namespace) -> list[str]:
    """Changes to a preset's YAML that make it small with --tiny."""
    return [f"networks.{name}.params.{o}" for name, values in TINY.items() for o in values] if args.tiny else []


def network(name: str, args: argparse.Namespace) -> nn.Module:
    """A network with random weights, in the layout that both sides want."""
    config = load_preset("v1_general", overrides=overrides(args))
    with torch.device("meta"):
        net = instantiate(config.networks[name], f"networks.{name}")
    net.load_state_dict(random_state(net, torch.Generator().manual_seed(0)), assign=True)
    net = net.requires_grad_(False).eval().to(args.device, PRECISIONS[args.precision])
    return net.to(memory_format=torch.channels_last)


def prepared(net: nn.Module, args: argparse.Namespace) -> nn.Module:
    """The network as `Restorer` runs it, beside the original, with which it shares what it leaves as it is."""
    shared = {id(tensor): tensor for tensor in (*net.parameters(), *net.buffers())}
    return for_inference(copy.deepcopy(net, shared), args.device)


def compiled(net: nn.Module, args: argparse.Namespace) -> nn.Module:
    """With --compile, both sides are."""
    return torch.compile(net) if args.compile else net


def bytes_of(*nets: nn.Module) -> int:
    return sum(x.numel() * x.element_size() for net in nets for x in (*net.parameters(), *net.buffers()))


def flops_of(run: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def random(*shape: int, args: argparse.Namespace) -> Tensor:
    """Standard normal, the same on every device."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    return x.to(args.device, PRECISIONS[args.precision])


def denoiser(args: argparse.Namespace) -> Case:
    """One evaluation of UNet and branch, or with --part of one of them; with --cfg, for two texts an image."""
    side, batch, width = args.size or (16 if args.tiny else 64), args.batch, 64 if args.tiny else 1024
    unet = network("unet", args) if args.part != "branch" else None
    branch = network("branch", args) if args.part != "unet" else None
    texts = random(batch * (2 if args.cfg else 1), TEXT_TOKENS, width, args=args)
    z, condition = random(batch, 4, side, side, args=args), Condition(random(batch, 4, side, side, args=args), texts)
    t = torch.full((batch,), 500, device=args.device)
    ours = {name: prepared(net, args) for name, net in (("unet", unet), ("branch", branch)) if net is not None}
    theirs = {name: peer(name, net) for name, net in (("unet", unet), ("branch", branch)) if net is not None}
    if unet is None:
        own, other = compiled(ours["branch"], args), compiled(theirs["branch"], args)
        n = len(texts) // batch
        repeated = [x.repeat(n, *[1] * (x.ndim - 1)) for x in (z, t, condition.latent)]

        def reference() -> list[Tensor]:
            down, middle = other(*repeated[:2], texts, controlnet_cond=repeated[2], return_dict=False)
            return [*down, middle]

        # What precedes the first text is computed once for all texts of an image here, for each of them there.
        runs = {
            "ours": lambda: [f[-1:] for f in own(z, t, condition)],
            "diffusers": lambda: [f[-1:] for f in reference()],
        }
    else:
        own = compiled(ControlledUNet(ours["unet"], ours.get("branch")), args)
        other = compiled(DiffusersDenoiser(theirs["unet"], theirs.get("branch")), args)
        runs = {"ours": lambda: own(z, t, condition), "diffusers": lambda: other(z, t, condition)}
    facts = {"part": args.part, "latent": f"{side}x{side}", "texts": len(texts) // batch}
    weights = {"ours": lambda: bytes_of(*ours.values()), "diffusers": lambda: bytes_of(*theirs.values())}
    return Case(runs, weights, "diffusers", flops_of(runs["diffusers"]), batch, facts)


def swinir(args: argparse.Namespace) -> Case:
    """Stage 1 as published."""
    side = args.size or (64 if args.tiny else 512)
    net = network("stage1", args)
    image = random(args.batch, 3, side, side, args=args).sigmoid()
    own = compiled(prepared(net, args), args)
    plain = compiled(PlainSwinIR(net.to(memory_format=torch.contiguous_format)), args)
    runs = {"ours": lambda: own(image), "straightforward": lambda: plain(image)}
    weights = {"ours": lambda: bytes_of(own), "straightforward": lambda: bytes_of(plain)}
    facts = {"pixels": f"{side}x{side}"}
    return Case(runs, weights, "straightforward", flops_of(runs["straightforward"]), args.batch, facts)


def autoencoder(args: argparse.Namespace, part: str) -> Case:
    side = args.size or (64 if args.tiny else 1024)
    net = network("autoencoder", args)
    own, other = prepared(net, args), peer("autoencoder", net)
    striped = StripedAutoencoder(own)
    weights = {"ours": lambda: bytes_of(own), "diffusers": lambda: bytes_of(other)}
    facts = {"pixels": f"{side}x{side}"}
    if part == "encode":
        encode = compiled(other.encode, args)
        image = random(args.batch, 3, side, side, args=args).sigmoid()
        runs = {
            "ours": lambda: striped.encode(image),
            "diffusers": lambda: encode(image * 2 - 1).latent_dist.mode() * net.scale_factor,
        }
    else:
        decode = compiled(other.decode, args)
        z = random(args.batch, 4, side // net.factor, side // net.factor, args=args)
        runs = {
            "ours": lambda: striped.decode(z),
            "diffusers": lambda: decode(z / net.scale_factor).sample / 2 + 0.5,
        }
    return Case(runs, weights, "diffusers", flops_of(runs["diffusers"]), args.batch, facts)


def encode(args: argparse.Namespace) -> Case:
    """The autoencoder's way in, as `Restorer` calls it: in strips where the picture is large."""
    return autoencoder(args, "encode")


def decode(args: argparse.Namespace) -> Case:
    """The autoencoder's way back."""
    return autoencoder(args, "decode")


def halves(args: argparse.Namespace) -> Case:
    """UNet with branch, SwinIR and autoencoder in fp16 and bf16, against float32."""
    side = 64 if args.tiny else 512
    names = ("unet", "branch", "stage1", "autoencoder")

    def results(precision: str) -> Callable[[], list[Tensor]]:
        own = argparse.Namespace(**{**vars(args), "precision": precision})
        unet, branch, stage1, auto = (prepared(network(name, own), own) for name in names)
        image = random(args.batch, 3, side, side, args=own).sigmoid()
        z = random(args.batch, 4, side // 8, side // 8, args=own)
        text = random(args.batch, TEXT_TOKENS, 64 if args.tiny else 1024, args=own)
        t = torch.full((args.batch,), 500, device=args.device)
        step = ControlledUNet(unet, branch)
        wide = auto if precision != "fp16" else auto.float()  # as `Restorer` has it, for it overflows
        return lambda: [step(z, t, Condition(z, text)), stage1(image), wide.decode(z.to(dtype_of(wide)))]

    runs = {name: results(name) for name in ("fp16", "bf16", "fp32")}
    return Case(runs, reference="fp32", images=args.batch, facts={"pixels": f"{side}x{side}"})
