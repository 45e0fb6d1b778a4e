"""Cuts the faces out of photos, aligned to 512 pixels as models of faces have them: for --task face, for presets of
faces, and for an evaluation on aligned faces.

Of photo.jpg the faces are OUTPUT/photo_1.png and so on, from left to right.
"""

import argparse
import sys
from pathlib import Path

from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.faces.align import align
from diffbir.faces.detect import Detector
from diffbir.utils.cli import entry_point
from diffbir.utils.device import pick_device
from diffbir.utils.image import image_names, read_rgb, to_tensor, to_uint8, write_png


@entry_point
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--input", required=True, help="a folder of photos (searched recursively), a photo, or a list")
    p.add_argument("--output", required=True, type=Path, help="folder for the faces, in the input's tree of folders")
    p.add_argument("--threshold", type=float, default=0.9, help="how sure the detector must be (default: %(default)s)")
    p.add_argument("--detector", type=Path, help="other weights of the detector (MTCNN)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, ... (default: %(default)s)")
    args = p.parse_args(argv)
    detector = Detector(args.detector, pick_device(args.device), args.threshold)
    folder, names = image_names(args.input)
    number, without = 0, []
    for name in tqdm(list(names), unit="photo"):
        photo = to_tensor(read_rgb(folder / name))
        faces = detector(photo)
        target = args.output / (Path(name).name if Path(name).is_absolute() else name)
        for i, face in enumerate(faces, 1):
            write_png(target.with_name(f"{target.stem}_{i}.png"), to_uint8(align(photo, face.points)))
        number += len(faces)
        without += [] if faces else [name]
    print(f"written: {number} faces, in {args.output}")
    if without:
        some = ", ".join([*without[:5], *(["..."] if without[5:] else [])])
        print(f"no face found in {len(without)} of the photos: {some}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
