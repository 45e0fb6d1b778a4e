"""What each loader process comes to own of the memory that it begins with, over one pass through a list of paths.

A process that is forked shares all memory with its parent until it writes. Here nothing is decoded: every draw looks up
its path alone. Linux only.

Example:
    python benchmarks/memory.py --items 2000000 --workers 2
"""

import argparse
import gc
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.sources.files import Files
from diffbir.utils.cli import entry_point


class Lookups(ImagePairs):
    """Batches of (process, megabytes of its own) instead of images."""

    def __getitems__(self, numbers: Sequence[int]) -> list[tuple[int, float]]:
        for n in numbers:
            assert self.source.paths[self.number(n)].suffix == ".jpg"
        return [(torch.utils.data.get_worker_info().id, own_memory())]


def own_memory() -> float:
    """Memory of this process that no other shares, MB."""
    text = Path("/proc/self/smaps_rollup").read_text()
    return sum(int(kilobytes) for kilobytes in re.findall(r"Private_\w+: +(\d+) kB", text)) / 1000


def write_list(path: Path, items: int) -> None:
    """Paths as long as those of ImageNet."""
    with path.open("w") as file:
        file.writelines(f"train/n{i % 1000:08d}/n{i % 1000:08d}_{i:08d}.jpg\n" for i in range(items))


def own_over_a_pass(paths: Sequence[Path], source: Files, workers: int, batch: int = 1000) -> list[np.ndarray]:
    """Of each process, its memory after each of its batches, MB."""
    source.paths = paths
    dataset = Lookups(source, 8)
    gc.collect()
    loader = DataLoader(
        dataset,
        batch,
        sampler=range(len(dataset)),
        num_workers=workers,
        multiprocessing_context="fork",
        collate_fn=lambda items: items[0],
    )
    seen: list[list[float]] = [[] for _ in range(workers)]
    for worker, megabytes in loader:
        seen[worker].append(megabytes)
    return [np.array(values) for values in seen]


@entry_point
def main(argv: list[str] | None = None) -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--items", type=int, default=2_000_000, help="paths in the list (default: %(default)s)")
    p.add_argument("--workers", type=int, default=2, help="loader processes (default: %(default)s)")
    args = p.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        write_list(Path(folder) / "list.txt", args.items)
        source = Files(Path(folder) / "list.txt")
    print(f"{args.items} paths, {args.workers} processes; MB that each has of its own")
    for name, make in (("one buffer", lambda paths: paths), ("a list of Path", list)):
        for worker, own in enumerate(own_over_a_pass(make(source.paths), source, args.workers)):
            marks = own[np.linspace(0, len(own) - 1, 5).astype(int)]
            print(f"{name:<15} process {worker}: {', '.join(f'{value:.1f}' for value in marks)} at 0, 25, ... 100 %")


if __name__ == "__main__":
    sys.exit(main())
