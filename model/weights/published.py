"""The table of published weight files (weights/files.yaml): what each holds and where it comes from."""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from omegaconf import OmegaConf

from diffbir.utils.config import ROOT

FOLDER = ROOT / "weights"


@dataclass(frozen=True)
class PublishedFile:
    """One published file.

    Args:
        holds: what is in it.
        licence: its licence.
        size: bytes; as the layout implies where the true size isn't known.
        repo: repository on the Hugging Face hub, or None.
        url: address elsewhere, or None.
        make: command that makes it here, or None.
        sha256: checksum, None where unknown.
        note: what else one should know.
    """

    holds: str
    licence: str
    size: float
    repo: str | None = None
    url: str | None = None
    make: str | None = None
    sha256: str | None = None
    note: str | None = None

    @property
    def source(self) -> str:
        """Where it comes from, for people."""
        return self.make or self.url or f"https://huggingface.co/{self.repo}"


@cache
def table() -> dict[str, PublishedFile]:
    """Name of every published file -> what is known about it."""
    rows = OmegaConf.to_container(OmegaConf.load(FOLDER / "files.yaml"))
    return {name: PublishedFile(**row) for name, row in rows.items()}


def where_to_get(path: Path) -> str:
    """What to do about a missing file."""
    known = table().get(path.name)
    if known is None:
        return "check `weights` in the configuration"
    if known.make:
        return f"make it with: {known.make}"
    note = f" ({known.note})" if known.note else ""
    return f"it is published at {known.source}{note}; scripts/download_weights.py puts it there"
