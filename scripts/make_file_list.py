"""Writes a list of the images below a folder, one path a line, for a training; or two, the second for validation.

Example:
    python scripts/make_file_list.py photos --output train.txt --val-output val.txt --val 0.02 --min-size 512
"""

import argparse
import os
import sys
from array import array
from collections.abc import Iterable
from pathlib import Path

from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.dataset.order import shuffled
from diffbir.dataset.parallel import computed
from diffbir.dataset.sources.texts import Paths
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.files import replacing
from diffbir.utils.image import image_names


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
    p.add_argument("--workers", type=int, default=1, help="processes that read (default: %(default)s)")
    args = p.parse_args(argv)

    paths = Paths(*image_names(args.input))

    def short_side(i: int) -> int | None:
        """None if the file is no image; of those the header alone is read, and scripts/check_dataset.py decodes."""
        try:
            with Image.open(paths[i]) as image:
                return min(image.size)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            return None

    kept, small, unreadable = array("q"), 0, 0
    sides = computed(short_side, range(len(paths)), args.workers, block=256)
    for i, side in enumerate(tqdm(sides, total=len(paths), unit="image")):
        if side is None:
            if args.on_error == "fail":
                raise UserError(f"{paths[i]} is not a readable image; remove it, or give --on-error skip")
            tqdm.write(f"skipped: {paths[i]} is not a readable image", file=sys.stderr)
            unreadable += 1
        elif side < args.min_size:
            small += 1
        else:
            kept.append(i)
    if not kept:
        raise UserError(f"no image of {args.input} has a short side of {args.min_size} pixels; lower --min-size")

    held_out: set[int] = set()
    if args.val_output:
        count = round(args.val * len(kept)) if args.val < 1 else int(args.val)
        if not 0 < count < len(kept):
            raise UserError(f"--val {args.val:g} takes {count} of {len(kept)} images; leave some in both lists")
        held_out = {shuffled(i, len(kept), args.seed, 0) for i in range(count)}
        write_list(args.val_output, (paths[kept[i]] for i in sorted(held_out)))
    write_list(args.output, (paths[number] for i, number in enumerate(kept) if i not in held_out))
    print(f"{len(kept) - len(held_out)} images in {args.output}", end="")
    print(f", {len(held_out)} in {args.val_output}" if held_out else "", end="")
    print(f"; left out: {small} too small, {unreadable} unreadable")


def write_list(output: Path, paths: Iterable[Path]) -> None:
    """Images below the list's folder by relative paths, so that both can move together; others by absolute ones."""
    folder = output.resolve().parent
    with replacing(output) as part, part.open("w", encoding="utf-8") as file:
        for path in paths:
            path = path.resolve()
            file.write(f"{os.path.relpath(path, folder) if path.is_relative_to(folder) else path}\n")


if __name__ == "__main__":
    sys.exit(main())
