"""Looks at a dataset before a training does: every image is decoded, the loader is timed, some pairs are drawn.

Give the images, or, with --config, the same arguments as to the training. The status is 1 if an image cannot be read.

Examples:
    python scripts/check_dataset.py photos --degradation configs/dataset/realesrgan.yaml --contact-sheet pairs.png
    python scripts/check_dataset.py --config configs/train/stage1_realesrgan.yaml photos=photos run_dir=runs/stage1
"""

import argparse
import copy
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.dataset.degradations.recipes import Recipe
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.preflight import Recorded, read_recipe, scan, throughput
from diffbir.dataset.sources.files import Files
from diffbir.dataset.sources.split import Rest
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import instantiate, load_config
from diffbir.utils.files import replacing
from diffbir.utils.image import side_by_side, to_uint8, write_png


@entry_point
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument(
        "arguments",
        nargs="+",
        metavar="SOURCE | key=value",
        help="folder, list file, table or shards; with --config the overrides of the training's YAML",
    )
    p.add_argument("--config", help="YAML of the training whose data to check; replaces the first four options below")
    p.add_argument("--degradation", help="YAML with the recipe (configs/dataset/); without it there is no lq")
    p.add_argument("--crop-size", type=int, default=512, help="smaller images are reported (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=16, help="for each device (default: %(default)s)")
    p.add_argument("--workers", type=int, default=1, help="processes that read (default: %(default)s)")
    p.add_argument("--effective-batch", type=int, help="batch size x devices x accumulated batches")
    p.add_argument("--need", type=float, help="pairs per second that the model takes, to compare the loader with")
    p.add_argument("--contact-sheet", type=Path, help="PNG to write with pairs of the first draws")
    p.add_argument("--good-list", type=Path, help="file list to write without unreadable images")
    p.add_argument("--fast", action="store_true", help="do not decode every image")
    args = p.parse_args(argv)

    if args.config:
        data = instantiate(load_config(args.config, args.arguments).data, "data")
        dataset, args.batch_size, args.workers = data.train, data.batch_size, data.num_workers
        if isinstance(dataset, ImagePairs) and isinstance(dataset.source, Rest):
            dataset.use(dataset.source.source)  # what is held out of it can be damaged as well
    else:
        if len(args.arguments) > 1:
            raise UserError(f"give one source, not {len(args.arguments)}; key=value needs --config")
        recipe = read_recipe(args.degradation) if args.degradation else None
        dataset = ImagePairs(args.arguments[0], args.crop_size, instantiate(recipe, "degradation"))
    if not isinstance(dataset, ImagePairs):
        raise UserError("a stream cannot be read twice; check its shards on a disk before they are served")
    batch = args.effective_batch or args.batch_size
    print(f"images       {len(dataset)}; {len(dataset) / batch:.1f} steps of {batch} are an epoch")
    if len(dataset) < batch:
        print("             fewer than a batch: steps will see images twice")

    unreadable: dict[int, str] = {}
    if not args.fast:
        found = scan(dataset.source, args.workers)
        unreadable = found.unreadable
        print(f"unreadable   {len(unreadable)}")
        print("".join(f"             {reason}\n" for reason in unreadable.values()), end="")
        if dataset.crop_size:
            small = found.below(dataset.crop_size)
            print(f"too small    {len(small)} below {dataset.crop_size} pixels, which will be enlarged")
            print("".join(f"             {dataset.source.name(i)}\n" for i in small[:10]), end="")
        print("short side   " + "\n             ".join(f"{k}: {v}" for k, v in found.histogram().items() if v))
        if args.good_list:
            if not isinstance(dataset.source, Files):
                raise UserError("--good-list works for folders and file lists only; write the table or shards again")
            lines = [f"{dataset.source.paths[i].resolve()}\n" for i in found.readable]
            with replacing(args.good_list) as part:
                part.write_text("".join(lines), encoding="utf-8")
    if unreadable and dataset.on_error == "fail":
        return 1
    if args.contact_sheet:
        write_png(args.contact_sheet, contact_sheet(dataset))
    if not unreadable or dataset.on_error == "skip":
        speed = throughput(dataset, args.batch_size, args.workers)
        verdict = (
            ""
            if args.need is None
            else f"; the model takes {args.need:g}: "
            + ("fast enough" if speed >= args.need else "TOO SLOW, give more workers")
        )
        print(f"loader       {speed:.1f} pairs/s with {args.workers} workers{verdict}")
    return 1 if unreadable else 0


def contact_sheet(dataset: ImagePairs, rows: int = 4, columns: int = 2) -> np.ndarray:
    """The first draws as (H, W, 3) uint8, clean and degraded side by side; prints what they are."""
    dataset = copy.copy(dataset)
    dataset.defer = False
    if isinstance(dataset.degradation, Recipe):
        dataset.degradation = Recorded(dataset.degradation)
    pairs = []
    for n in range(rows * columns):
        item = dataset[n]
        pairs.append(side_by_side({f"draw {n}": to_uint8(item["hq"]), "lq": to_uint8(item.get("lq", item["hq"]))}))
        drawn = " ".join(getattr(dataset.degradation, "drawn", []))
        print(f"draw {n:<7} {dataset.source.name(dataset.number(n))} {drawn}")
    return np.concatenate([np.concatenate(pairs[i::columns], axis=0) for i in range(columns)], axis=1)


if __name__ == "__main__":
    sys.exit(main())
