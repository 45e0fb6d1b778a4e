"""The share of the time of a folder's run in which the device computes, after the model is loaded.

Reading, computing and writing overlap; what is missing to 100 % is what the device waited for files.

Example:
    python benchmarks/busy.py --count 100 --size 256
"""

import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import arguments, machine
from diffbir.folder import manifest
from diffbir.folder.inputs import find_sources
from diffbir.folder.plan import Settings, make_plan
from diffbir.folder.prompts import read_prompts
from diffbir.folder.work import Share, work
from diffbir.model.restorer import Restorer
from diffbir.utils.cli import entry_point
from diffbir.utils.device import pick_device, pick_precision


def write_photos(folder: Path, count: int, size: int) -> None:
    """Smooth colours with noise, half of them JPEG and half PNG."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:size, :size] / size
    for i in range(count):
        image = np.stack([x, y, np.sin(9 * x * y + i) ** 2], axis=-1) + rng.normal(0, 0.05, (size, size, 3))
        pixels = (image.clip(0, 1) * 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03d}.{'jpg' if i % 2 else 'png'}")


def busy(restorer: Restorer, photos: Path, output: Path, batch: int) -> tuple[float, float]:
    """Seconds that were computed, and seconds in all."""
    sources = find_sources([str(photos)], output)
    settings = Settings({}, vars(restorer.defaults))
    plan = make_plan(sources, output, settings, read_prompts(None, ("", ""), sources), batch=batch)
    output.mkdir()
    start = time.perf_counter()
    work(Share(output, plan.items, plan.batches, settings), lambda task: restorer, quiet=True)
    seconds = time.perf_counter() - start
    return sum(line["seconds"] for line in manifest.read(output).values()), seconds


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = arguments.parser(__doc__)
    arguments.add_preset(p)
    p.add_argument("--count", type=int, default=100, help="pictures (default: %(default)s)")
    p.add_argument("--size", type=int, default=256, help="their side (default: %(default)s)")
    p.add_argument("--device", default="auto", help="(default: %(default)s)")
    args = p.parse_args(argv)
    device = pick_device(args.device)
    restorer = Restorer.from_preset(args.preset, device, pick_precision("auto", device), overrides=args.overrides)
    with tempfile.TemporaryDirectory() as folder:
        photos = Path(folder) / "in"
        photos.mkdir()
        write_photos(photos, args.count, args.size)
        computed, seconds = busy(restorer, photos, Path(folder) / "out", 1 if device.type == "cpu" else 0)
    print(
        f"{args.count} pictures of {args.size}x{args.size}, {args.preset}: computing took {computed:.1f} s of "
        f"{seconds:.1f} s, {computed / seconds:.1%}; {machine.processor(device)}, {machine.versions('torch')}"
    )


if __name__ == "__main__":
    sys.exit(main())
