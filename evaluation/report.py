"""An evaluation, which is plain data (see `evaluation.run`), as Markdown, CSV and JSON."""

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from diffbir.evaluation.statistics import difference
from diffbir.utils.cli import UserError
from diffbir.utils.files import replacing

DIGITS = {"psnr": 2, "niqe": 2, "brisque": 2, "fid": 2, "kid": 2, "musiq": 2}  # 3 otherwise; as papers print them


def write(found: dict[str, Any], folder: Path) -> list[Path]:
    """`report.md`, `scores.csv` (a row for each picture) and `report.json` in a folder."""
    texts = {"report.md": markdown(found), "scores.csv": rows(found), "report.json": to_json(found)}
    for name, text in texts.items():
        with replacing(folder / name) as part:
            part.write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def markdown(found: dict[str, Any]) -> str:
    """The table, and below it everything that its figures depend on."""
    protocol = found["protocol"]
    lines = [table(found), "", "Mean ± standard error over the pictures; ↑ higher is better, ↓ lower.", ""]
    lines += [f"- protocol `{protocol['name']}` ({protocol['used_by']}): {protocol['description']}"]
    lines += [f"- {m['title']}: {m['variant']}{_weights(m)}" for m in found["metrics"].values()]
    lines += [f"- left out, {name}: {reason}" for name, reason in found["skipped"].items()]
    lines += [f"- NOTE: {warning}" for warning in found["warnings"]]
    if found["reference"]:
        lines += [f"- reference: {found['reference']['folder']}, checksum `{found['reference']['checksum']}`"]
    if against := found.get("against"):
        lines += [f"- metrics of whole sets: against {against['folder']}, {against['count']} pictures"]
    for title, method in found["methods"].items():
        lines += [f"- {title}: {method['folder']}, {method['count']} pictures, checksum `{method['checksum']}`"]
        for key, words in (("lone_results", "results without a reference"), ("lone_references", "without a result")):
            names = method[key]
            if names:
                shown = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
                lines += [f"  - NOTE: {len(names)} {words}: {shown}"]
        lines += [f"  - NOTE: {failure}" for failure in method["failures"]]
    lines += ["- " + ", ".join(f"{name} {version}" for name, version in found["versions"].items())]
    lines += [f"- computed on {found['device']}", f"- command: `{found['command']}`"]
    for comparison in found.get("comparisons", []):
        lines += ["", differences(comparison, found["metrics"])]
    return "\n".join(lines) + "\n"


def table(found: dict[str, Any]) -> str:
    metrics = found["metrics"]
    titles = [f"{m['title']} {'↓' if m['lower'] else '↑'}" for m in metrics.values()]
    lines = [f"| | {' | '.join(['pictures', *titles])} |", "|---" * (len(titles) + 2) + "|"]
    for title, method in found["methods"].items():
        cells = [cell(name, method["summary"].get(name)) for name in metrics]
        lines.append(f"| {title} | {' | '.join([str(method['count']), *cells])} |")
    return "\n".join(lines)


def cell(name: str, summary: dict[str, float] | None) -> str:
    if summary is None or math.isnan(summary["mean"]):
        return ""
    digits = DIGITS.get(name, 3)
    error = "" if math.isnan(summary["error"]) else f" ± {summary['error']:.{digits}f}"
    return f"{summary['mean']:.{digits}f}{error}"


def single(found: dict[str, Any]) -> list[str]:
    """The metrics that have a value for every picture."""
    scored = {name for method in found["methods"].values() for name in method["images"][0]["scores"]}
    return [name for name in found["metrics"] if name in scored]


def _weights(metric: dict[str, Any]) -> str:
    """File names and the beginnings of their checksums, which the JSON file has in full."""
    return "".join(f"; {name} {checksum[:12]}" for name, checksum in metric["weights"].items())


def compare(found: dict[str, Any], a: str, b: str) -> dict[str, Any]:
    """Paired differences a - b of two methods over the pictures that both have: metric -> mean, low, high, wins, count.

    Raises:
        UserError: there is no such method, or they share no picture.
    """
    for title in (a, b):
        if title not in found["methods"]:
            raise UserError(f"nothing is called '{title}'; there are {', '.join(found['methods'])}")
    by_name = [{row["name"]: row["scores"] for row in found["methods"][title]["images"]} for title in (a, b)]
    shared = sorted(by_name[0].keys() & by_name[1].keys())
    if not shared:
        raise UserError(f"{a} and {b} have no picture in common")
    result = {}
    for name in by_name[0][shared[0]]:
        x, y = ([scores[picture].get(name, math.nan) for picture in shared] for scores in by_name)
        result[name] = asdict(difference(x, y))
    return {"a": a, "b": b, "confidence": 0.95, "differences": result}


def differences(comparison: dict[str, Any], metrics: dict[str, Any]) -> str:
    """A comparison as a table."""
    a, b = comparison["a"], comparison["b"]
    lines = [f"{a} minus {b}, picture by picture, with 95 % confidence intervals (Student's t):", ""]
    lines += ["| | mean difference | interval | better on | pictures | |", "|---|---|---|---|---|---|"]
    for name, d in comparison["differences"].items():
        metric = metrics[name]
        better = (d["mean"] < 0) == metric["lower"]
        certain = d["low"] > 0 or d["high"] < 0
        verdict = f"{a if better else b} is better" if certain else "no certain difference"
        share = 1 - d["wins"] if metric["lower"] else d["wins"]
        digits = DIGITS.get(name, 3) + 1
        interval = f"{d['low']:+.{digits}f} to {d['high']:+.{digits}f}"
        cells = [f"{d['mean']:+.{digits}f}", interval, f"{share:.0%}", str(d["count"]), verdict]
        lines.append(f"| {metric['title']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def rows(found: dict[str, Any]) -> str:
    """CSV: method, picture, size, checksums and every score in full."""
    names = single(found)
    columns = ("name", "width", "height", "result_sha256", "reference_sha256")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["method", *columns, *names])
    for title, method in found["methods"].items():
        for row in method["images"]:
            scores = [row["scores"].get(name, math.nan) for name in names]
            writer.writerow([title, *(row.get(c, "") for c in columns), *("" if math.isnan(s) else s for s in scores)])
    return text.getvalue()


def to_json(found: dict[str, Any]) -> str:
    """JSON has no NaN and no infinity: they are null and "inf"."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        if isinstance(value, list):
            return [plain(v) for v in value]
        if isinstance(value, float) and not math.isfinite(value):
            return None if math.isnan(value) else str(value)
        return value

    return json.dumps(plain(found), indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def from_json(path: Path) -> dict[str, Any]:
    """What `to_json` wrote.

    Raises:
        UserError: the file is no such report.
    """

    def numbers(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        special = {None: math.nan, "inf": math.inf, "-inf": -math.inf}
        return {k: special.get(v, v) if isinstance(v, str | None) else v for k, v in pairs}

    try:
        found = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=numbers)
        if not {"protocol", "metrics", "methods"} <= found.keys():
            raise ValueError("it has no protocol, metrics and methods")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no report of an evaluation ({error}); give a report.json or a folder") from error
    return found


def merge(reports: Sequence[tuple[str, dict[str, Any]]]) -> dict[str, Any]:
    """Several reports as one; a method that others have too is called after its file.

    Raises:
        UserError: they differ in protocol or metrics, so that their figures can't be compared.
    """
    (first, merged), *others = reports
    for name, report in others:
        variants = [{k: (m["variant"], m["weights"]) for k, m in r["metrics"].items()} for r in (merged, report)]
        if merged["protocol"] != report["protocol"] or any(
            variants[0][k] != variants[1][k] for k in variants[0].keys() & variants[1].keys()
        ):
            raise UserError(f"{first} and {name} were computed by different protocols or metrics; evaluate one anew")
    methods: dict[str, Any] = {}
    for name, report in reports:
        for title, method in report["methods"].items():
            methods[title if title not in methods else f"{title} ({name})"] = method
    return {**merged, "methods": methods}
