"""Computes the latents of fixed crops, so that stage 2 trains without running stage 1 and the encoder at every step.

The crops are the first --draws that the training of --config would see; without val_photos=, what it would hold out is
left out. A run that was stopped goes on; --draws may be raised later. Processes that torchrun starts share the files,
each with a GPU of its own; the files are the same for any number of them.

Examples:
    python scripts/cache_latents.py --config configs/train/stage2_v2.yaml --output latents --draws 1000000 photos=FOLDER
    torchrun --nproc-per-node 8 scripts/cache_latents.py --config configs/train/stage2_v2.yaml --output latents ...
    python train_stage2.py --config configs/train/stage2_v2.yaml photos=FOLDER val_photos=OTHER \\
        'data.params.train={target: dataset.latents.CachedLatents, params: {folder: latents}}'
"""

import argparse
import os
import sys
from itertools import chain, islice
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import DataLoader
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.dataset.latents import prompts, write
from diffbir.dataset.pairs import ImagePairs
from diffbir.model.build import build_networks
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import instantiate, load_config
from diffbir.utils.files import replacing

BATCHES = 32  # of one file
RANKS = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0}  # torchrun's names in the environment, and what else holds


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--config", required=True, help="YAML of a stage-2 training")
    p.add_argument("--output", type=Path, required=True, help="folder for the latents")
    p.add_argument("--draws", type=int, required=True, help="how many crops; several times the number of photos")
    p.add_argument("--batch-size", type=int, default=8, help="(default: %(default)s)")
    p.add_argument("--num-workers", type=int, default=1, help="loader processes of each process (default: %(default)s)")
    p.add_argument("overrides", nargs="*", metavar="key=value", help="changes to the YAML")
    args = p.parse_args(argv)

    config = load_config(args.config, [*args.overrides, "degrade_on_device=false"])
    dataset = instantiate(config.data, "data").train  # without what is held out of it
    if not isinstance(dataset, ImagePairs):
        raise UserError(f"data.params.train of {args.config}: only draws of dataset.pairs.ImagePairs can be repeated")
    rank, ranks, local = (int(os.environ.get(key, default)) for key, default in RANKS.items())
    device = f"cuda:{local % torch.cuda.device_count()}" if torch.cuda.is_available() else "cpu"
    networks = {k: v.to(device).eval() for k, v in build_networks(config, ("stage1", "autoencoder")).items()}

    prepare(args.output, config, args.batch_size)
    size = BATCHES * args.batch_size
    own = [range(first, min(first + size, args.draws)) for first in range(0, args.draws, size)][rank::ranks]
    todo = [draws for draws in own if not holds(args.output / name(draws), draws)]
    loader = DataLoader(dataset, args.batch_size, sampler=chain.from_iterable(todo), num_workers=args.num_workers)
    total, left = sum(map(len, own)), sum(map(len, todo))
    with tqdm(total=total, initial=total - left, unit="crop", disable=rank > 0) as progress:
        batches = iter(loader)
        for draws in todo:
            rows = []
            for batch in islice(batches, -(-len(draws) // args.batch_size)):
                rows.append((*encode(networks, batch, device), batch["prompt"]))
                progress.update(len(batch["prompt"]))
            posteriors, latents, texts = zip(*rows, strict=True)
            texts = [text for batch in texts for text in batch]
            write(args.output / name(draws), torch.cat(posteriors), torch.cat(latents), texts)


def name(draws: range) -> str:
    """Of the file with these draws."""
    return f"{draws[0]:08d}.safetensors"


def holds(path: Path, draws: range) -> bool:
    """Whether a file is there with all its draws: the last one of fewer draws has not those that were added."""
    return path.exists() and len(prompts(path)) >= len(draws)


def prepare(folder: Path, config: DictConfig, batch_size: int) -> None:
    """Writes down what the latents depend on.

    Raises:
        UserError: the folder has latents of something else.
    """
    names = ("networks", "weights", "seed", "data")
    made_from = OmegaConf.create(
        {
            "batch_size": batch_size,
            "held_out": not config.get("val_photos"),
            **{k: config[k] for k in names if k in config},
        }
    )
    made_from.networks = {k: v for k, v in made_from.networks.items() if k in ("stage1", "autoencoder")}
    made_from.data = made_from.data.params.train
    path = folder / "made_from.yaml"
    # Several processes may come here at once, all with the same.
    if path.exists() and OmegaConf.load(path) != made_from:
        raise UserError(f"{folder} has latents of other networks, photos or settings ({path}); give another folder")
    with replacing(path) as part:
        OmegaConf.save(made_from, part)


@torch.inference_mode()
def encode(networks: dict, batch: dict, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and log variance of q(z | hq), and E(I_reg)."""
    hq, lq = batch["hq"].to(device), batch["lq"].to(device)
    if "stage1" in networks:
        lq = networks["stage1"](lq).clamp(0, 1)
    q = networks["autoencoder"].posterior(hq)
    return torch.cat([q.mean, q.logvar], dim=1), networks["autoencoder"].encode(lq)


if __name__ == "__main__":
    sys.exit(main())
