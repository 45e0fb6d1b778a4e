"""The standard test sets: what lies where in them, how results on them are compared, and who publishes them."""

from dataclasses import dataclass
from pathlib import Path

from diffbir.utils.cli import UserError


@dataclass(frozen=True)
class Dataset:
    """A test set in a folder.

    Args:
        title: its name in papers.
        count: pictures in it.
        input: folder of the degraded pictures, inside the set's.
        reference: folder of the clean ones; None where nobody has them.
        size: (width, height) of the clean pictures, or of the degraded ones without them; None where they differ.
        scale: size of the clean pictures over that of the degraded ones.
        protocol: key of `evaluation.protocols.PROTOCOLS`.
        source: who publishes it.
        find: how to obtain and lay it out.
    """

    title: str
    count: int
    input: str
    reference: str | None
    size: tuple[int, int] | None
    scale: int
    protocol: str
    source: str
    find: str

    def folders(self, root: Path) -> tuple[Path, Path | None]:
        """Of degraded and of clean pictures.

        Raises:
            UserError: one of them isn't there.
        """
        folders = [root / self.input, *([root / self.reference] if self.reference else [])]
        absent = [str(folder) for folder in folders if not folder.is_dir()]
        if absent:
            raise UserError(f"{' and '.join(absent)} of {self.title} missing; {self.find}; published at {self.source}")
        return folders[0], folders[1] if self.reference else None


_STABLESR = "https://huggingface.co/datasets/Iceclear/StableSR-TestSets"
_UNPACK = "unpack the folder {0} of StableSR_testsets.zip as <data>/{0}"
_FACES = "https://github.com/wzhouxiff/RestoreFormer"

# Name -> set, and the folder below <data> that it is looked for in.
DATASETS: dict[str, tuple[str, Dataset]] = {
    "realsr": (
        "RealSRVal_crop128",
        Dataset(
            *("RealSR, 100 centre crops", 100, "test_LR", "test_HR", (512, 512), 4, "y", _STABLESR),
            _UNPACK.format("RealSRVal_crop128"),
        ),
    ),
    "drealsr": (
        "DrealSRVal_crop128",
        Dataset(
            *("DRealSR, 93 centre crops", 93, "test_LR", "test_HR", (512, 512), 4, "y", _STABLESR),
            _UNPACK.format("DrealSRVal_crop128"),
        ),
    ),
    "div2k-val": (
        "DIV2K_V2_val",
        Dataset(
            *("DIV2K-Val, 3,000 synthetic pairs", 3000, "lq", "gt", (512, 512), 4, "y", _STABLESR),
            _UNPACK.format("DIV2K_V2_val"),
        ),
    ),
    "real47": (
        "real47",
        Dataset(
            *("Real47", 47, ".", None, None, 4, "rgb", "https://github.com/XPixelGroup/DiffBIR"),
            "put its pictures into <data>/real47",
        ),
    ),
    "celeba-test": (
        "celeba_512_validation",
        Dataset(
            *("CelebA-Test, 3,000 faces", 3000, "lq", "gt", (512, 512), 1, "rgb", _FACES),
            "put degraded and clean faces of the same names into <data>/celeba_512_validation/lq and /gt",
        ),
    ),
    "lfw-test": (
        "LFW-Test",
        Dataset(
            *("LFW-Test, 1,711 faces", 1711, ".", None, (512, 512), 1, "rgb", "https://github.com/TencentARC/GFPGAN"),
            "put its aligned faces into <data>/LFW-Test (FID: --against FFHQ)",
        ),
    ),
    "wider-test": (
        "WIDER-Test",
        Dataset(
            *("WIDER-Test, 970 faces", 970, ".", None, (512, 512), 1, "rgb", "https://github.com/sczhou/CodeFormer"),
            "put its aligned faces into <data>/WIDER-Test (FID: --against FFHQ)",
        ),
    ),
}


def find(name: str, data: Path) -> tuple[Dataset, Path, Path | None]:
    """A set, its folder of degraded pictures and that of clean ones.

    Raises:
        UserError: it isn't below `data`, with what to do.
    """
    folder, dataset = DATASETS[name]
    try:
        return dataset, *dataset.folders(data / folder)
    except UserError as error:
        raise UserError(str(error).replace("<data>", str(data))) from None


def faults(dataset: Dataset, sizes: list[tuple[int, int]]) -> list[str]:
    """In what the pictures found differ from the published set, as sentences.

    Args:
        sizes: (width, height) of the pictures found.
    """
    found = []
    if len(sizes) != dataset.count:
        found.append(f"{dataset.title} has {dataset.count} pictures, and {len(sizes)} are here")
    wrong = [size for size in sizes if dataset.size and size != dataset.size]
    if wrong:
        right, other = ("{} x {}".format(*size) for size in (dataset.size, wrong[0]))
        found.append(f"{dataset.title} has pictures of {right}, and {len(wrong)} here differ, such as {other}")
    return found
