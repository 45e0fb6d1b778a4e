"""What a training changed, as additions of low rank: the file that turns one set of weights into another.

  python scripts/extract_lora.py weights/mini runs/mini/one_step/weights --rank unet=28 branch=18 autoencoder=84 \\
      --output one_step.safetensors

FROM and TO are folders with <network>.safetensors, as trainings leave them, or files of several networks, whose keys
begin with <network>. Stored are the best additions of each rank (by the singular values of the difference), and what is
no layer's matrix, such as biases and norms, whole where it changed. Use the file with `--lora`, a preset's `lora` or
`one_step.lora`.
"""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.model.networks.lora import DOWN, UP, factorized
from diffbir.model.weights.checkpoint import read_state_dict
from diffbir.model.weights.lora_file import write_lora
from diffbir.utils.cli import UserError, entry_point

DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "fp8": torch.float8_e4m3fn}


def read(path: Path, network: str) -> dict[str, Tensor]:
    """The weights of one network, without its name."""
    if path.is_dir():
        return read_state_dict(path / f"{network}.safetensors")
    own = {k.removeprefix(f"{network}."): v for k, v in read_state_dict(path).items() if k.startswith(f"{network}.")}
    if not own:
        raise UserError(f"{path} has no keys that begin with '{network}.'; give the folder of its weight files")
    return own


def additions(old: Mapping[str, Tensor], new: Mapping[str, Tensor], rank: int) -> tuple[dict[str, Tensor], float]:
    """What turns `old` into `new`, of at most this rank, and the share of the change's energy that it has."""
    found, kept, total = {}, 0.0, 0.0
    for key, value in new.items():
        change = value.float() - old[key].float()
        if not change.any():
            continue
        layer = key.removesuffix(".weight")
        if change.ndim < 2 and key.endswith((".weight", ".bias")):
            found[key] = value
            continue
        if layer == key:
            raise UserError(f"'{key}' changed, which is no layer's weight or bias, so no file of additions can hold it")
        outputs, *kernel = change.shape
        matrix = change.flatten(1)
        down, up = factorized(matrix, rank)
        total += float(matrix.square().sum())
        kept += float((up @ down).square().sum())
        found[layer + DOWN] = down.reshape(-1, *kernel)
        found[layer + UP] = up.reshape(outputs, -1, *(1 for _ in kernel[1:]))
    return found, kept / total if total else 1.0


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("before", metavar="FROM", type=Path, help="folder or file with the weights that it will be added to")
    p.add_argument("after", metavar="TO", type=Path, help="folder or file with the weights that this shall give")
    p.add_argument(
        "--rank", nargs="+", required=True, metavar="NETWORK=RANK", help="networks, and ranks of the additions"
    )
    p.add_argument("--output", type=Path, required=True, help="a .safetensors file")
    p.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="fp8 is half as large at the same rank (default: %(default)s)"
    )
    args = p.parse_args(argv)
    ranks = {}
    for spec in args.rank:
        network, _, rank = spec.partition("=")
        if not rank.isdecimal() or int(rank) < 1:
            raise UserError(f"--rank {spec} must be a network and its rank, such as unet=32")
        ranks[network] = int(rank)
    if args.output.suffix != ".safetensors":
        raise UserError(f"--output {args.output} is no .safetensors file; give it that ending")
    result = {}
    for network, rank in tqdm(ranks.items(), unit="network"):
        old, new = read(args.before, network), read(args.after, network)
        shapes = [{key: tuple(value.shape) for key, value in state.items()} for state in (old, new)]
        if odd := sorted(shapes[0].items() ^ shapes[1].items()):
            raise UserError(
                f"{network}: '{odd[0][0]}' differs between {args.before} and {args.after}; give the same network"
            )
        own, share = additions(old, new, rank)
        tqdm.write(f"{network}: {share:.1%} of the change's energy")
        result |= {f"{network}.{key}": value for key, value in own.items()}
    if not any(key.endswith(DOWN) for key in result):
        raise UserError(f"no layer differs between {args.before} and {args.after}")
    write_lora(result, args.output, DTYPES[args.dtype])


if __name__ == "__main__":
    sys.exit(main())
