"""The mean of weight files of one network, such as states of a training or of several: often better than each of them.

  python scripts/average_weights.py a/lora.safetensors:0.65 b/lora.safetensors:0.35 --output mean.safetensors

Of additions of low rank (LoRA) it is the mean of what they add, B A and its scale, at the rank of the first file.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.model.build import file_and_scale
from diffbir.model.networks.lora import DOWN, UP, approximation
from diffbir.model.weights.checkpoint import read_state_dict, save_weights
from diffbir.model.weights.lora_file import write_lora
from diffbir.utils.cli import UserError, entry_point


def mean(states: Sequence[Mapping[str, Tensor]], shares: Sequence[float]) -> dict[str, Tensor]:
    """Of states with the same keys, of which additions may differ in rank; `shares` add up to 1; float32."""
    total = {}
    for key, first in tqdm(states[0].items(), unit="tensor"):
        if key.endswith(UP):  # with its partner
            continue
        values = [state[key].float() for state in states]
        if not key.endswith(DOWN):
            total[key] = sum(share * value for share, value in zip(shares, values, strict=True))
            continue
        other = key.removesuffix(DOWN) + UP
        ups = [share * state[other].float().flatten(1) for share, state in zip(shares, states, strict=True)]
        downs = torch.cat([value.flatten(1) for value in values])
        down, up = approximation(downs, torch.cat(ups, dim=1), len(first))
        total[key], total[other] = down.view(-1, *first.shape[1:]), up.view(*up.shape, *states[0][other].shape[2:])
    return total


def folded(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without alphas, which are multiplied into the factors: the scale of an addition is alpha / rank."""
    alphas = {key.removesuffix(".alpha"): float(value) for key, value in state.items() if key.endswith(".alpha")}
    plain = {key: value for key, value in state.items() if not key.endswith(".alpha")}
    for layer, alpha in alphas.items():
        if layer + DOWN in plain and layer + UP in plain:
            plain[layer + UP] = plain[layer + UP].float() * (alpha / len(plain[layer + DOWN]))
    return plain


def check(files: Sequence[str], states: Sequence[Mapping[str, Tensor]]) -> None:
    """Whether the files are of one network.

    Raises:
        UserError: keys or shapes, but for ranks, aren't those of the first.
    """
    for file, state in zip(files, states, strict=True):
        if odd := sorted(state.keys() ^ states[0].keys()):
            raise UserError(f"'{odd[0]}' is in one of {files[0]} and {file} only; give files of the same network")
        factors = [{key.removesuffix(end) for key in state if key.endswith(end)} for end in (DOWN, UP)]
        if odd := sorted(factors[0] ^ factors[1]):
            raise UserError(f"{file}: only one of the factors of '{odd[0]}' is there; fetch the file again")
        for key, value in state.items():
            first = states[0][key].shape
            rank = 0 if key.endswith(DOWN) else 1 if key.endswith(UP) else None
            if [n for i, n in enumerate(value.shape) if i != rank] != [n for i, n in enumerate(first) if i != rank]:
                shapes = f"{tuple(value.shape)} in {file} and {tuple(first)} in {files[0]}"
                raise UserError(f"'{key}' is {shapes}; give files of the same network")


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="+", metavar="FILE[:SHARE]", help="weights; shares, 1 by default, count relatively")
    p.add_argument("--output", type=Path, required=True, help="a .safetensors file, stored as the first file is")
    args = p.parse_args(argv)
    files, scales = zip(*map(file_and_scale, args.files), strict=True)
    if sum(scales) <= 0:
        raise UserError(f"shares add up to {sum(scales):g}; give more than 0 together")
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output} is no .safetensors file; give it that ending")
    stored = [read_state_dict(file) for file in files]
    states = [folded(state) for state in stored]
    check(files, states)
    result = mean(states, [scale / sum(scales) for scale in scales])
    dtypes = [value.dtype for value in stored[0].values() if value.is_floating_point()]
    if torch.float8_e4m3fn in dtypes:
        write_lora(result, args.output, torch.float8_e4m3fn)
    else:
        save_weights(result, args.output, dtypes[0] if dtypes else None)


if __name__ == "__main__":
    sys.exit(main())
