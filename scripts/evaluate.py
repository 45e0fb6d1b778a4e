"""Evaluates restored pictures the way papers do, and says what it did.

Every folder is a method: NAME=FOLDER, or a folder that is called by its own name. Results and references are matched by
name, whatever their types and suffixes such as _x4 or _LR4. --protocol fixes colour space and crops at once; --dataset
knows the standard sets. With --preset, the pictures of --input are restored first, by the flags of inference.py.

OUTPUT gets report.md, scores.csv (a row for each picture), report.json (the same with all checksums) and plots. Methods
called NAME@VALUE become a curve in the plane of perception and distortion. A picture that could not be compared is
named at the end, and the status is then 1.

Examples:
    python scripts/evaluate.py ours=RESTORED peer=OTHERS --reference HR --compare ours peer
    python scripts/evaluate.py --preset mini --upscale 4 --input LR --reference HR
    python scripts/evaluate.py RESTORED --dataset realsr --data DATASETS
    python scripts/evaluate.py RESTORED --dataset celeba-test --embedder arcface.onnx
    python scripts/evaluate.py RESTORED --dataset lfw-test --metrics niqe fid --against FFHQ
    python scripts/evaluate.py --compare a/report.json b/report.json
"""

import argparse
import shlex
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir import command
from diffbir.evaluation.datasets import DATASETS, find
from diffbir.evaluation.protocols import CHANNELS, METRICS, MORE, PROTOCOLS, PYIQA, SET_METRICS, Protocol
from diffbir.model.options import Options
from diffbir.utils.cli import UserError, entry_point

SHOWN = "; ".join(f"{name} ({p.describe()})" for name, p in PROTOCOLS.items())


def parse(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("results", nargs="*", metavar="[NAME=]RESULTS", help="folders of restored pictures")
    p.add_argument("--reference", type=Path, help="folder of the clean pictures; without it, NIQE and BRISQUE are left")
    p.add_argument("--output", type=Path, default=Path("outputs/evaluation"), help="folder (default: %(default)s)")
    p.add_argument("--protocol", choices=PROTOCOLS, help=f"{SHOWN} (default: the dataset's, or rgb)")
    p.add_argument("--channel", choices=("rgb", "y"), help="of PSNR and SSIM (default: the protocol's)")
    p.add_argument("--crop", type=int, help="border that PSNR and SSIM leave out, pixels (default: the protocol's)")
    p.add_argument("--centre", type=int, help="side of the centre crop that is compared (default: the protocol's)")
    p.add_argument(
        "--metrics",
        nargs="+",
        default=[*METRICS, *SET_METRICS],
        metavar="NAME",
        help=f"{', '.join((*METRICS, *SET_METRICS))} (default: all of these); {MORE[0]}; {MORE[1]} with --embedder; "
        "with the package pyiqa, whose licence is non-commercial and whose weights are downloaded: "
        f"{', '.join(PYIQA)}, or pyiqa:NAME",
    )
    p.add_argument(
        "--against",
        type=Path,
        help="folder of clean pictures of any names that FID and KID compare with (default: the "
        "reference), such as FFHQ for real faces",
    )
    p.add_argument(
        "--embedder", type=Path, help="adds identity: a face embedder, TorchScript or ONNX; for aligned faces"
    )
    p.add_argument("--embedder-size", type=int, default=112, help="side of its input, pixels (default: %(default)s)")
    p.add_argument(
        "--embedder-crop",
        type=float,
        default=0.78,
        help="centre of the picture that it sees (default: %(default)s, ArcFace's part of a face aligned as in FFHQ)",
    )
    p.add_argument("--embedder-channels", choices=CHANNELS, default="rgb", help="(default: %(default)s)")
    p.add_argument("--compare", nargs=2, metavar=("A", "B"), help="names of two methods, or two report.json")
    p.add_argument("--dataset", choices=DATASETS, help="a standard set: its folders, protocol and size")
    p.add_argument("--data", type=Path, default=Path("datasets"), help="where the sets lie (default: %(default)s)")
    p.add_argument("--preset", help="restores --input first, by this preset, further flags and key=value")
    p.add_argument("--input", type=Path, help="the degraded pictures, for --preset")
    p.add_argument("--batch", type=int, default=1, help="pictures of equal size at once (default: %(default)s)")
    command.add_restoration(p)
    args = p.parse_args(argv)
    args.overrides = [word for word in args.results if "=" in word and not Path(word.partition("=")[2]).exists()]
    if args.preset:
        args.results = [word for word in args.results if word not in args.overrides]
    return args


@entry_point
def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    words = " ".join(["python scripts/evaluate.py", *map(shlex.quote, sys.argv[1:] if argv is None else argv)])
    if args.compare and all(name.endswith(".json") for name in args.compare) and not args.results:
        return compare_reports(*map(Path, args.compare))

    protocol, dataset = args.protocol or "rgb", None
    if args.dataset:
        dataset, lq, hq = find(args.dataset, args.data)
        args.reference, args.input = args.reference or hq, args.input or lq
        protocol = args.protocol or dataset.protocol
    name = protocol
    changes = {k: v for k in ("channel", "crop", "centre") if (v := getattr(args, k)) is not None}
    chosen: Protocol = replace(PROTOCOLS[protocol], **changes)
    if chosen != PROTOCOLS[protocol]:
        name, chosen = f"{protocol}, changed", replace(chosen, used_by=Protocol.used_by)
    results = named(args.results)
    if args.compare and not results:
        results = named(args.compare)
        args.compare = list(results)
    if not results and not args.preset:
        raise UserError("say what to evaluate: folders of results, or --preset NAME --input FOLDER")
    if args.preset and args.input is None:
        raise UserError("--preset restores the pictures of --input; give that folder, or --dataset")

    from diffbir.evaluation import datasets, report, run  # torch takes long to load
    from diffbir.evaluation.faces import Embedder
    from diffbir.utils.device import pick_device

    status = 0
    if args.preset:
        from diffbir.restore import restore

        title = Path(args.preset).stem
        restored = args.output / "restored" / title
        flags = command.parse(["--input", str(args.input), "--output", str(restored), "--preset", args.preset])
        own = ("task", "stage1", "lora", "device", "precision", "offload", "overrides")
        for key in (*own, *Options.__dataclass_fields__):
            setattr(flags, key, getattr(args, key))
        status = restore(flags)
        results[title] = restored
    embedder = None
    if args.embedder:
        embedder = Embedder(args.embedder, args.embedder_size, args.embedder_crop, args.embedder_channels)
        args.metrics = list(dict.fromkeys([*args.metrics, "identity"]))
    device = pick_device(args.device)
    found = run.evaluate(
        results, args.reference, chosen, args.metrics, device, args.batch, embedder=embedder, against=args.against
    )
    found["protocol"] = {"name": name, **found["protocol"]}
    found["command"] = words
    if dataset:
        found["dataset"] = {"title": dataset.title, "source": dataset.source}
        images = next(iter(found["methods"].values()))["images"]
        if not chosen.centre:
            found["warnings"] += datasets.faults(dataset, [(row["width"], row["height"]) for row in images])
    if args.compare:
        found["comparisons"] = [report.compare(found, *args.compare)]
    written = report.write(found, args.output)
    written += plots(found, args.output)
    print("\n" + report.markdown(found))
    print("written: " + ", ".join(str(path) for path in written))
    failures = [failure for method in found["methods"].values() for failure in method["failures"]]
    for failure in failures:
        print(f"error: {failure}", file=sys.stderr)
    return 1 if failures else status


def named(words: list[str]) -> dict[str, Path]:
    """NAME=FOLDER, or FOLDER, whose name it gets.

    Raises:
        UserError: two have the same name.
    """
    found: dict[str, Path] = {}
    for word in words:
        title, _, folder = word.rpartition("=") if "=" in word and not Path(word).exists() else ("", "", word)
        title = title or Path(folder).resolve().name
        if title in found:
            raise UserError(f"two results are called '{title}'; name them: NAME=FOLDER")
        found[title] = Path(folder)
    return found


def plots(found: dict, output: Path) -> list[Path]:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        print("plots are left out: they need matplotlib: pip install '.[evaluation]'", file=sys.stderr)
        return []
    from diffbir.evaluation.plots import distributions, plane

    paths = [output / "distributions.png"]
    distributions(found, paths[0])
    if {"psnr", "lpips"} <= found["metrics"].keys():
        paths.append(output / "plane.png")
        plane(found, paths[1])
    return paths


def compare_reports(*paths: Path) -> int:
    """Of two files with one method each, or the first of each."""
    from diffbir.evaluation.report import compare, differences, from_json, merge

    reports = [(str(path), from_json(path)) for path in paths]
    reports = [(name, {**r, "methods": dict([next(iter(r["methods"].items()))])}) for name, r in reports]
    merged = merge(reports)
    print(differences(compare(merged, *merged["methods"]), merged["metrics"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
