"""An evaluation as pictures: the distribution of every metric, and the plane of perception and distortion."""

import math
import re
from pathlib import Path
from typing import Any

from diffbir.evaluation.report import single

CURVE = re.compile(r"(.+)@([\d.eE+-]+)$")  # NAME@VALUE: points of one curve


def distributions(found: dict[str, Any], path: Path) -> None:
    """A box for each method and every picture as a point, a panel for each metric."""
    plt = _pyplot()
    methods = found["methods"]
    names = single(found)
    columns = min(3, len(names))
    lines = -(-len(names) // columns)
    size = (columns * max(3.2, 0.6 * len(methods) + 2), 2.8 * lines)
    figure, axes = plt.subplots(lines, columns, figsize=size, squeeze=False, layout="constrained")
    for axis, name in zip(axes.flat, names, strict=False):
        values = [[row["scores"].get(name, math.nan) for row in m["images"]] for m in methods.values()]
        values = [[v for v in scores if math.isfinite(v)] for scores in values]
        axis.boxplot(values, widths=0.5, showfliers=False)
        for i, scores in enumerate(values, start=1):
            axis.plot([i + 0.3] * len(scores), scores, ".", markersize=3, alpha=0.5)
        axis.set_xticks(range(1, len(methods) + 1), list(methods), rotation=30, ha="right", fontsize=7)
        metric = found["metrics"][name]
        axis.set_title(f"{metric['title']} ({'lower' if metric['lower'] else 'higher'} is better)", fontsize=9)
    for axis in list(axes.flat)[len(names) :]:
        axis.remove()
    _save(figure, path)


def plane(found: dict[str, Any], path: Path, distortion: str = "psnr", perception: str = "lpips") -> None:
    """Means of two metrics with their standard errors; methods called NAME@VALUE are joined by value."""
    figure, axis = _pyplot().subplots(figsize=(7, 5), layout="constrained")
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for title, method in found["methods"].items():
        x, y = method["summary"][distortion], method["summary"][perception]
        named = CURVE.match(title)
        color = "0.35" if named else None
        axis.errorbar(x["mean"], y["mean"], _error(y), _error(x), fmt="o", markersize=4, capsize=2, color=color)
        # Points of a curve are labelled below: its ends often lie on those of other methods.
        position = {"xy": (x["mean"], y["mean"]), "xytext": (4, -10 if named else 4), "textcoords": "offset points"}
        axis.annotate(named[2] if named else title, fontsize=8, **position)
        if named:
            curves.setdefault(named[1], []).append((float(named[2]), x["mean"], y["mean"]))
    for name, points in curves.items():
        _, xs, ys = zip(*sorted(points), strict=True)
        axis.plot(xs, ys, "-", linewidth=1, label=name)
    if curves:
        axis.legend(fontsize=8)
    labels = []
    for name in (distortion, perception):
        metric = found["metrics"][name]
        labels.append(f"{metric['title']} ({'lower' if metric['lower'] else 'higher'} is better)")
    axis.set(xlabel=labels[0], ylabel=labels[1])
    _save(figure, path)


def _error(summary: dict[str, float]) -> float:
    return 0.0 if math.isnan(summary["error"]) else summary["error"]


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _save(figure: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
