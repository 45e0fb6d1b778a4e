"""Compares folders of results with one of references, picture by picture: an evaluation as plain data.

It is what the JSON file holds: `methods` -> title -> `images` (name, checksums, scores) and `summary`, with `protocol`,
`metrics` (variant, checksums of weights), `skipped` and `versions`.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from diffbir.evaluation.faces import Embedder
from diffbir.evaluation.metrics import FEW, Metric, SetMetric, build, build_set, check
from diffbir.evaluation.pairing import Pairing, pair
from diffbir.evaluation.protocols import SET_METRICS, Protocol
from diffbir.evaluation.statistics import summary
from diffbir.utils.cli import UserError
from diffbir.utils.image import ImageError, image_names, read_rgb, to_tensor
from diffbir.utils.versions import versions

PACKAGES = ("torch", "torchvision", "torchmetrics", "numpy", "pillow")


def evaluate(
    results: dict[str, Path],
    reference: Path | None,
    protocol: Protocol,
    names: Sequence[str],
    device: torch.device,
    batch: int = 1,
    embedder: Embedder | None = None,
    against: Path | None = None,
) -> dict[str, Any]:
    """Scores every method's pictures.

    Args:
        results: title -> folder (searched recursively), image or list.
        reference: the clean pictures; None for metrics that need none.
        names: of metrics; those that cannot be had are skipped, with the reason under `skipped`.
        batch: pictures of equal size that are scored at once.
        embedder: of the metric `identity`.
        against: clean pictures of any names, which the metrics of whole sets compare with in place of the reference.

    Raises:
        UserError: nothing to compare; a name that no metric has.
    """
    for name in names:
        check(name)
    skipped: dict[str, str] = {}
    metrics = _built(names, protocol, reference, device, skipped, embedder)
    found = {
        "protocol": {**asdict(protocol), "description": protocol.describe()},
        "metrics": {},
        "skipped": skipped,
        "warnings": [],
        "versions": versions(PACKAGES),
        "device": str(device) if device.type != "cuda" else torch.cuda.get_device_name(device),
        "reference": None if reference is None else {"folder": str(reference)},
        "methods": {},
    }
    references = None if reference is None else named_files(reference)
    pairings = {}
    for title, folder in results.items():
        files = named_files(folder)
        pairings[title] = (
            Pairing({n: (p, None) for n, p in files.items()}) if references is None else pair(files, references)
        )
    clean = references if against is None else named_files(against)
    sets, unread = {}, []
    if clean is not None:
        counts = [len(clean), *(len(pairing.pairs) for pairing in pairings.values())]
        sets = _built_sets(names, min(counts), device, skipped)
        unread = _take_in(clean, sets, protocol, device)
    if against is not None:
        found["against"] = {"folder": str(against), "count": len(clean) - len(unread)}
        found["warnings"] += [f"left out of {against}: {failure}" for failure in unread]
    for title, folder in results.items():
        found["methods"][title] = {"folder": str(folder)}
        found["methods"][title] |= _method(title, pairings[title], protocol, metrics, sets, device, batch)
    if sets and min(counts) < FEW:
        which = " and ".join(metric.title for metric in sets.values())
        found["warnings"].append(f"{which} over {min(counts)} pictures say little; take {FEW} or more")
    found["metrics"] = {name: _about(metric) for name, metric in {**metrics, **sets}.items()}
    if references is not None:
        images = {i["name"]: i["reference_sha256"] for m in found["methods"].values() for i in m["images"]}
        found["reference"]["checksum"] = set_checksum(images)
    return found


def _built(
    names: Sequence[str],
    protocol: Protocol,
    reference: Path | None,
    device: torch.device,
    skipped: dict[str, str],
    embedder: Embedder | None,
) -> dict[str, Metric]:
    """Metrics of single pictures; why others cannot be had goes to `skipped`."""
    metrics = {}
    for name in names:
        try:
            metric = None if name in SET_METRICS else build(name, protocol, device, embedder)
        except UserError as error:
            skipped[name] = str(error)
            continue
        if metric is None:
            continue
        if reference is None and metric.reference:
            skipped[name] = "it compares with a reference, and none is given"
        else:
            metrics[name] = metric
    if not metrics:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in skipped.items())
        raise UserError(f"none of the metrics can be computed of single pictures; {reasons}")
    return metrics


def _built_sets(
    names: Sequence[str], count: int, device: torch.device, skipped: dict[str, str]
) -> dict[str, SetMetric]:
    """Metrics of whole sets of `count` pictures; why others cannot be had goes to `skipped`."""
    sets = {}
    for name in (name for name in names if name in SET_METRICS):
        try:
            sets[name] = build_set(name, count, device)
        except UserError as error:
            skipped[name] = str(error)
    return sets


@torch.inference_mode()
def _take_in(clean: dict[str, Path], sets: dict[str, SetMetric], protocol: Protocol, device: torch.device) -> list[str]:
    """Gives the references to the metrics of whole sets; what is wrong with those that cannot be read."""
    failures = []
    for path in tqdm(clean.values(), unit="picture", desc="references") if sets else ():
        try:
            x = _centre(read_rgb(path), protocol.centre, path)[None].to(device)
        except ImageError as error:
            failures.append(str(error))
            continue
        for metric in sets.values():
            metric.update(x, True)
    return failures


def _method(
    title: str,
    pairing: Pairing,
    protocol: Protocol,
    metrics: dict[str, Metric],
    sets: dict[str, SetMetric],
    device: torch.device,
    batch: int,
) -> dict[str, Any]:
    images, failures = [], []
    for metric in sets.values():
        metric.reset()  # what another method left
    with torch.inference_mode(), tqdm(total=len(pairing.pairs), unit="picture", desc=title) as bar:
        for rows, x, y in _batches(pairing, protocol, batch, failures):
            x, y = x.to(device), None if y is None else y.to(device)
            for name, metric in metrics.items():
                try:
                    values = metric.score(x, y).tolist()
                except ValueError as error:  # too small for it
                    failures.extend(f"{row['name']}: no {metric.title}: {error}" for row in rows)
                    values = [math.nan] * len(rows)
                for row, value in zip(rows, values, strict=True):
                    row["scores"][name] = value
            for metric in sets.values():
                metric.update(x, False)
            images.extend(rows)
            bar.update(len(rows))
    if not images:
        raise UserError(f"no picture of {title} could be compared: {failures[0]}")
    table = {name: asdict(summary([row["scores"][name] for row in images])) for name in metrics}
    for name, metric in sets.items():
        table[name] = {
            "mean": metric.compute() if len(images) > 1 else math.nan,
            "error": math.nan,
            "count": len(images),
        }
    return {
        "count": len(images),
        "checksum": set_checksum({row["name"]: row["result_sha256"] for row in images}),
        "summary": table,
        "lone_results": list(pairing.lone_results),
        "lone_references": list(pairing.lone_references),
        "failures": failures,
        "images": images,
    }


def _batches(
    pairing: Pairing, protocol: Protocol, batch: int, failures: list[str]
) -> Iterator[tuple[list[dict[str, Any]], Tensor, Tensor | None]]:
    """Rows without scores, results (B, 3, H, W) and references; neighbours of equal size together."""
    rows, xs, ys = [], [], []
    for name, (result, reference) in pairing.pairs.items():
        try:
            x = _centre(read_rgb(result), protocol.centre, result)
            y = None if reference is None else _centre(read_rgb(reference), protocol.centre, reference)
            if y is not None and x.shape != y.shape:
                raise ImageError(
                    f"{result} has {x.shape[-1]} x {x.shape[-2]} pixels and {reference} {y.shape[-1]} x {y.shape[-2]}; "
                    "restore at the size of the reference (--upscale)"
                )
        except ImageError as error:
            failures.append(str(error))
            continue
        if rows and (len(rows) == batch or x.shape != xs[0].shape):
            yield rows, torch.stack(xs), torch.stack(ys) if ys else None
            rows, xs, ys = [], [], []
        row = {"name": name, "width": x.shape[-1], "height": x.shape[-2], "result_sha256": checksum(result)}
        if reference is not None:
            row["reference_sha256"] = checksum(reference)
            ys.append(y)
        rows.append({**row, "scores": {}})
        xs.append(x)
    if rows:
        yield rows, torch.stack(xs), torch.stack(ys) if ys else None


def _centre(rgb: Any, side: int, path: Path) -> Tensor:
    """(H, W, 3) -> (3, side, side), or all of it with side 0."""
    if side:
        height, width = rgb.shape[:2]
        if min(height, width) < side:
            raise ImageError(f"{path} has {width} x {height} pixels, fewer than the centre crop of {side}; --centre 0")
        top, left = (height - side) // 2, (width - side) // 2
        rgb = rgb[top : top + side, left : left + side]
    return to_tensor(rgb)


def named_files(folder: Path) -> dict[str, Path]:
    root, names = image_names(folder)
    return {name: root / name for name in names}


def _about(metric: Metric | SetMetric) -> dict[str, Any]:
    return {
        "title": metric.title,
        "variant": metric.variant,
        "lower": metric.lower,
        "weights": {path.name: checksum(path) for path in metric.weights},
    }


def checksum(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def set_checksum(checksums: dict[str, str]) -> str:
    """SHA-256 of the lines `checksum  name` in order of the names, as `sha256sum` prints them."""
    lines = "".join(f"{value}  {name}\n" for name, value in sorted(checksums.items()))
    return hashlib.sha256(lines.encode()).hexdigest()
