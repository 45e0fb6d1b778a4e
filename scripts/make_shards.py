"""Packs images into tar shards of the WebDataset layout, each image as the bytes that it is, with its captions.

Every image is decoded once, so that shards hold none that cannot be read. The order is random, so that neighbours in a
shard have nothing in common. Shards appear whole or not at all.

Examples:
    python scripts/make_shards.py photos --output shards
    python scripts/make_shards.py photos.parquet --captions short long --output shards --on-error skip
"""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.dataset.order import shuffled
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
    p.add_argument("--on-error", choices=("fail", "skip"), default="fail", help="what to do with unreadable images")
    p.add_argument("--seed", type=int, default=0, help="of the order (default: %(default)s)")
    p.add_argument("--resume", action="store_true", help="keep the shards that are there, and write the others")
    args = p.parse_args(argv)

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

    bar, skipped, count = tqdm(total=len(source), unit="image"), 0, 0

    def samples(numbers: list[int]) -> Iterator[tuple[str, dict[str, bytes]]]:
        nonlocal skipped
        for i in numbers:
            bar.update()
            path = source.paths[i]
            try:
                read_rgb(path)
            except ImageError as error:
                if args.on_error == "fail":
                    raise
                skipped += 1
                tqdm.write(f"skipped: {error}", file=sys.stderr)
                continue
            members = {path.suffix.lower().removeprefix("."): path.read_bytes()}
            if args.captions:
                members["json"] = json.dumps(source.texts(i), ensure_ascii=False).encode()
            yield f"{i:09d}_{path.stem.replace('.', '_')}", members

    with bar:
        for number, start in enumerate(range(0, len(source), args.per_shard)):
            positions = range(start, min(start + args.per_shard, len(source)))
            numbers = [shuffled(i, len(source), args.seed, 0) for i in positions]
            path = args.output / f"{number:06d}.tar"
            if path.exists():
                bar.update(len(numbers))
            else:
                write_shard(path, samples(numbers))
            count += len(load_index(path))
    print(f"{count} images in {number + 1} shards in {args.output}; {skipped} skipped")


if __name__ == "__main__":
    sys.exit(main())
