"""Packs images into tar shards of the WebDataset layout, each image as the bytes that it is, with its captions.

With --resize, pictures that are larger are shrunk, as a training with that short_side would. Every image is decoded
once, so that shards hold none that cannot be read. The order is random, so that neighbours in a shard have nothing in
common. Shards appear whole or not at all.

Examples:
    python scripts/make_shards.py photos --output shards
    python scripts/make_shards.py list.txt --output shards --resize 512 --workers 32
    python scripts/make_shards.py photos.parquet --captions short long --output shards --on-error skip
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.dataset.crops import resize_short
from diffbir.dataset.order import shuffled
from diffbir.dataset.parallel import computed
from diffbir.dataset.sources.files import Files
from diffbir.dataset.sources.shards import load_index, write_shard
from diffbir.dataset.sources.tables import TABLES, Table
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.image import ImageError, read_rgb


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("input", type=Path, help="folder, list file, or table (CSV or parquet) of images")
    p.add_argument("--output", type=Path, required=True, help="folder for the shards")
    p.add_argument("--per-shard", type=int, default=1000, help="images in each (default: %(default)s)")
    p.add_argument("--image", default="image", help="the table's column of paths (default: %(default)s)")
    p.add_argument(
        "--captions", nargs="*", default=[], metavar="COLUMN", help="the table's columns to keep as captions"
    )
    p.add_argument(
        "--resize", type=int, help="shrinks larger pictures to this short side, pixels; they are saved as JPEG"
    )
    p.add_argument("--quality", type=int, default=95, help="of such JPEGs (default: %(default)s)")
    p.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="what to do with unreadable images")
    p.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    p.add_argument("--resume", action="store_true", help="keep the shards that are there, and write the others")
    p.add_argument("--workers", type=int, default=1, help="processes, each at a shard (default: %(default)s)")
    args = p.parse_args(argv)

    if not 1 <= args.quality <= 100:
        raise UserError(f"--quality {args.quality} must be from 1 to 100")
    if args.per_shard < 1:
        raise UserError(f"--per-shard {args.per_shard} must be at least 1")
    if args.input.suffix.lower() in TABLES:
        source = Table(args.input, args.image, dict.fromkeys(args.captions, 0.0))
    elif args.captions:
        raise UserError(f"--captions needs a table ({', '.join(TABLES)}), not {args.input}")
    else:
        source = Files(args.input)
    if not args.resume and any(args.output.glob("*.tar")):
        raise UserError(f"{args.output} already holds shards; give another folder, or --resume to write those missing")

    packing = Packing(source, args)
    starts = range(0, len(source), args.per_shard)
    count = skipped = 0
    with tqdm(total=len(source), unit="image") as bar:
        for packed, reasons in computed(packing, range(len(starts)), args.workers, block=1):
            for reason in reasons:
                tqdm.write(f"skipped: {reason}", file=sys.stderr)
            count, skipped = count + packed, skipped + len(reasons)
            bar.update(min(args.per_shard, len(source) - bar.n))
    print(f"{count} images in {len(starts)} shards in {args.output}; {skipped} skipped")


class Packing:
    """Writes shard `number` of a source, unless it is there; tells how many images it has and why some are not."""

    def __init__(self, source: Files | Table, args: argparse.Namespace):
        self.source, self.args = source, args

    def __call__(self, number: int) -> tuple[int, list[str]]:
        args, n, skipped = self.args, len(self.source), []
        path = args.output / f"{number:06d}.tar"
        if not path.exists():
            first = number * args.per_shard
            numbers = [shuffled(i, n, args.seed, 0) for i in range(first, min(first + args.per_shard, n))]
            write_shard(path, self._samples(numbers, skipped))
        return len(load_index(path)), skipped

    def _samples(self, numbers: list[int], skipped: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        for i in numbers:
            path = self.source.paths[i]
            try:
                image = read_rgb(path)
            except ImageError as error:
                if self.args.on_error == "fail":
                    raise
                skipped.append(str(error))
                continue
            if self.args.resize and min(image.shape[:2]) > self.args.resize:
                members = {"jpg": to_jpeg(resize_short(image, self.args.resize), self.args.quality)}
            else:
                members = {path.suffix.lower().removeprefix("."): path.read_bytes()}
            if self.args.captions:
                members["json"] = json.dumps(self.source.texts(i), ensure_ascii=False).encode()
            yield f"{i:09d}_{path.stem.replace('.', '_')}", members


def to_jpeg(image: NDArray[np.uint8], quality: int) -> bytes:
    """(H, W, 3), with colours at full resolution."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=quality, subsampling="4:4:4")
    return file.getvalue()


if __name__ == "__main__":
    sys.exit(main())
