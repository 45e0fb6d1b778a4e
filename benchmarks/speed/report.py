"""Records of the runner as Markdown, and how fast the machine could be."""

import argparse
from typing import Any

import torch
import torch.nn.functional as F

from benchmarks.speed.cases import Case, random

HEADER = (
    "| | s | of the other | CPU s | of the other | memory, GB | TFLOP/s | largest difference |\n" + "|---" * 8 + "|"
)


def table(record: dict[str, Any]) -> str:
    """A heading, a row for each way and the conditions."""
    facts = ", ".join(f"{k} {v}" for k, v in record["facts"].items())
    lines = [f"\n**{record['case']}**: {facts}; batch {record['batch']}\n", HEADER]
    for row in record["rows"]:
        memory = [row[key] for key in ("weight_bytes", "working_bytes") if row[key] is not None]
        cells = [
            row["way"],
            f"{row['seconds']:.3g}",
            f"{row['ratio']:.2f}" if "ratio" in row else "",
            f"{row['cpu_seconds']:.3g}",
            f"{row['cpu_ratio']:.2f}" if "ratio" in row else "",
            f"{sum(memory) / 1e9:.2f}" if memory else "",
            f"{record['flops'] / row['seconds'] / 1e12:.3g}" if record["flops"] else "",
            f"{row['difference']:.1e}" if "ratio" in row else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    where = record["device"] + (f", {record['threads']} threads" if record["threads"] else "")
    how = f"{record['precision']}, {record['layout']}{', compiled' if record['compile'] else ''}"
    lines.append(f"\n{where}; {how}; medians of {record['repeats']} in turns; {record['versions']}.")
    return "\n".join(lines)


def peak(args: argparse.Namespace) -> Case:
    """What the machine reaches at best: a product of large matrices; a 3x3 convolution of 320 channels."""
    n = args.size or (64 if args.tiny else 2048 if args.device.type == "cpu" else 8192)
    a, b = random(n, n, args=args), random(n, n, args=args)
    channels, side = (16, 16) if args.tiny else (320, 64)
    x = random(args.batch, channels, side, side, args=args).to(memory_format=torch.channels_last)
    w = random(channels, channels, 3, 3, args=args).to(memory_format=torch.channels_last)
    times = max(1, round(2 * n**3 / (18 * x.numel() * channels)))  # as many operations as the product has

    def convolutions() -> None:
        for _ in range(times):
            F.conv2d(x, w, padding=1)

    runs = {"product": lambda: torch.mm(a, b), "convolution": convolutions}
    facts = {"product": f"{n}x{n}x{n}", "convolution": f"{channels} channels, {side}x{side}"}
    return Case(runs, flops=2 * n**3, images=args.batch, facts=facts)
