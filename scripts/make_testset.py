"""Makes a fixed synthetic test set: hq/ and lq/ with PNGs of the same names, and what they were made from.

testset.json holds the seed, and of every pair its image and what was drawn for it; recipe.yaml is the degradation. The
same command makes the same pixels, also with random crops; a smaller --count makes the first pairs of a larger one.
Read it as pairs with `dataset.sources.pairs.PairFolders`.

Example:
    python scripts/make_testset.py photos --degradation configs/dataset/realesrgan.yaml --output testsets/photos
"""

import argparse
import json
import sys
from pathlib import Path

from omegaconf import OmegaConf
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.dataset.degradations.resize import resize
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.preflight import Recorded, read_recipe
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import instantiate
from diffbir.utils.files import replacing
from diffbir.utils.image import to_uint8, write_png
from diffbir.utils.versions import versions

PACKAGES = ("numpy", "opencv-python", "pillow")  # their versions may change pixels


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("input", help="folder, list file, table or shards of clean images")
    p.add_argument("--output", type=Path, required=True, help="folder for the test set; must not exist")
    p.add_argument("--degradation", required=True, help="YAML with the recipe (configs/dataset/)")
    p.add_argument("--size", type=int, default=512, help="side of the crops, pixels (default: %(default)s)")
    p.add_argument(
        "--crop",
        choices=("centre", "random"),
        default="centre",
        help="where each is cut out; a random place follows from --seed and the image's number (default: %(default)s)",
    )
    p.add_argument("--short-side", type=int, help="resizes the short side to this before the crop, pixels")
    p.add_argument(
        "--lq-scale",
        type=int,
        default=1,
        help="stores degraded pictures this much smaller, for methods that enlarge themselves: recipes enlarge them to "
        "the clean ones' size, which is undone (default: %(default)s)",
    )
    p.add_argument(
        "--count",
        type=int,
        help="only the first so many images: of a folder by name, else in the list's order (default: all)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the degradations and random crops (default: %(default)s)")
    args = p.parse_args(argv)

    if args.count is not None and args.count < 1:
        raise UserError(f"--count {args.count} must be at least 1")
    if args.output.exists():
        raise UserError(f"{args.output} already exists; remove it, or give another folder")
    recipe = read_recipe(args.degradation)
    if args.lq_scale < 1 or args.size % args.lq_scale:
        raise UserError(f"--lq-scale {args.lq_scale} must divide --size {args.size}")
    degradation = Recorded(instantiate(recipe, "degradation"))
    pairs = ImagePairs(
        args.input,
        args.size,
        degradation,
        crop=args.crop,
        flip=False,
        shuffle=False,
        seed=args.seed,
        short_side=args.short_side,
    )
    items = []
    with replacing(args.output) as part:
        for n in tqdm(range(min(args.count or len(pairs), len(pairs))), unit="pair"):
            item, name = pairs[n], f"{n:05d}.png"
            hq, lq = to_uint8(item["hq"]), to_uint8(item["lq"])
            height, width = (side // args.lq_scale for side in lq.shape[:2])
            write_png(part / "hq" / name, hq)
            write_png(part / "lq" / name, lq if args.lq_scale == 1 else resize(lq, height, width, "bicubic"))
            source = pairs.source.name(n)
            items.append({"name": name, "source": source, "seed": [args.seed, n], "drawn": degradation.drawn})
        facts = {
            "seed": args.seed,
            "size": args.size,
            "short_side": args.short_side,
            "crop": args.crop,
            "lq_scale": args.lq_scale,
        }
        facts["versions"] = versions(PACKAGES)
        (part / "testset.json").write_text(json.dumps({**facts, "items": items}, indent=2) + "\n")
        OmegaConf.save(OmegaConf.create({"degradation": recipe}), part / "recipe.yaml")
    print(f"{len(items)} pairs of {args.size} x {args.size} pixels in {args.output}")


if __name__ == "__main__":
    sys.exit(main())
