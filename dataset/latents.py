"""Latents of fixed crops, computed once (scripts/cache_latents.py): stage 2 then trains without stage 1 and encoder."""

import json
from bisect import bisect
from collections.abc import Sequence
from itertools import accumulate, chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from diffbir.dataset.order import shuffled
from diffbir.dataset.sources.texts import Texts
from diffbir.utils.cli import UserError
from diffbir.utils.files import replacing

KEYS = ("posterior", "latent")


class CachedLatents(Dataset):
    """Items of a folder of latents, in an order that the seed fixes, another one in every epoch.

    Item `n`, for any n >= 0, is a dict: `posterior` (2 C, h, w) float16, mean and log variance of q(z | hq), unscaled;
    `latent` (C, h, w) float16, E(I_reg), scaled; `prompt`. Crops and degradations are those of the cache, so it should
    hold several draws of every photo. It belongs to the weights that it was computed with.

    Args:
        folder: what scripts/cache_latents.py wrote.
        seed: of the order.

    Raises:
        UserError: the folder has no latents, or a damaged file.
    """

    def __init__(self, folder: str | Path, seed: int = 0):
        self.files, self.seed = sorted(Path(folder).glob("*.safetensors")), seed
        if not self.files:
            raise UserError(f"{folder} has no latents; scripts/cache_latents.py computes them")
        texts = [prompts(path) for path in self.files]
        self.ends = list(accumulate(map(len, texts)))
        self.prompts = Texts(chain.from_iterable(texts))

    def __len__(self) -> int:
        return self.ends[-1]

    def __getitem__(self, n: int) -> dict[str, Tensor | str]:
        epoch, i = divmod(n, len(self))
        i = shuffled(i, len(self), self.seed, epoch)
        number = bisect(self.ends, i)
        path, row = self.files[number], i - (self.ends[number - 1] if number else 0)
        with safe_open(path, "pt") as file:
            return {**{key: file.get_slice(key)[row] for key in KEYS}, "prompt": self.prompts[i]}


def prompts(path: Path) -> list[str]:
    """Of every item of a file."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["prompts"])
    except (SafetensorError, TypeError, KeyError) as error:
        raise UserError(f"{path} is not a whole file of latents; delete it and run cache_latents.py again") from error


def write(path: Path, posterior: Tensor, latent: Tensor, texts: Sequence[str]) -> None:
    """One file of the cache: (N, 2 C, h, w), (N, C, h, w), N prompts."""
    tensors = {key: x.to(torch.float16).contiguous().cpu() for key, x in zip(KEYS, (posterior, latent), strict=True)}
    with replacing(path) as part:
        save_file(tensors, part, {"prompts": json.dumps(list(texts))})
