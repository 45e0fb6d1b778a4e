"""Writes a list of the images below a folder, one path a line, for a training; or two, the second for validation.

Example:
    python scripts/make_file_list.py photos --output train.txt --val-output val.txt --val 0.02 --min-size 512
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.dataset.order import shuffled
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.files import replacing
from diffbir.utils.image import list_images


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("input", type=Path, help="folder (with its folders), or another list")
    p.add_argument("--output", type=Path, required=True, help="list to write; paths are relative to its folder")
    p.add_argument("--val-output", type=Path, help="second list, of images that are then not in the first")
    p.add_argument("--val", type=float, default=0.05, help="size of the second list: a share below 1, or a number")
    p.add_argument("--min-size", type=int, default=0, help="leaves out images with a shorter side, pixels")
    p.add_argument(
        "--on-error", choices=("fail", "skip"), default="fail", help="what to do with files that are no images"
    )
    p.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    args = p.parse_args(argv)

    paths, small, unreadable = [], 0, 0
    for path in tqdm(list_images(args.input), unit="image"):
        try:
            with Image.open(path) as image:  # the header alone; scripts/check_dataset.py decodes
                side = min(image.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            if args.on_error == "fail":
                raise UserError(f"{path} is not a readable image; remove it, or give --on-error skip") from error
            tqdm.write(f"skipped: {path} is not a readable image", file=sys.stderr)
            unreadable += 1
            continue
        if side < args.min_size:
            small += 1
        else:
            paths.append(path)
    if not paths:
        raise UserError(f"no image of {args.input} has a short side of {args.min_size} pixels; lower --min-size")

    held_out: set[int] = set()
    if args.val_output:
        count = round(args.val * len(paths)) if args.val < 1 else int(args.val)
        if not 0 < count < len(paths):
            raise UserError(f"--val {args.val:g} takes {count} of {len(paths)} images; leave some in both lists")
        held_out = {shuffled(i, len(paths), args.seed, 0) for i in range(count)}
        write_list(args.val_output, [paths[i] for i in sorted(held_out)])
    write_list(args.output, [path for i, path in enumerate(paths) if i not in held_out])
    print(f"{len(paths) - len(held_out)} images in {args.output}", end="")
    print(f", {len(held_out)} in {args.val_output}" if held_out else "", end="")
    print(f"; left out: {small} too small, {unreadable} unreadable")


def write_list(output: Path, paths: Sequence[Path]) -> None:
    """Images below the list's folder by relative paths, so that both can move together; others by absolute ones."""
    folder = output.resolve().parent
    absolute = [path.resolve() for path in paths]
    lines = [os.path.relpath(p, folder) if p.is_relative_to(folder) else str(p) for p in absolute]
    with replacing(output) as part:
        part.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
