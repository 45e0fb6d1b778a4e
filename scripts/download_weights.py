"""Fetches the weight files of a preset into weights/, or lists what it needs and what is there.

Files come from the Hugging Face hub (interrupted downloads go on where they stopped) or from the release pages of their
authors.
"""

import argparse
import hashlib
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from diffbir.model.build import weight_files
from diffbir.model.presets import PRESETS, STAGE1, load_preset, names
from diffbir.model.weights.published import FOLDER, PublishedFile, address, table
from diffbir.utils.cli import UserError, entry_point
from diffbir.utils.config import project_path


@entry_point
def main(argv: list[str] | None = None) -> int:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("files", nargs="*", metavar="FILE", help="names of single files, see weights/README.md")
    p.add_argument("--preset", help=f"everything that a preset needs: {', '.join(names(PRESETS))}, or a YAML")
    p.add_argument("--task", help="sr, face or denoise, for presets with several tasks (default: its first)")
    p.add_argument("--stage1", help=f"another stage 1: {', '.join(names(STAGE1))}, or a YAML")
    p.add_argument("--folder", type=Path, default=FOLDER, help="where files go (default: %(default)s)")
    p.add_argument("--list", action="store_true", help="only say what is needed and what is there")
    p.add_argument("--offline", action="store_true", help="never use the network (also if HF_HUB_OFFLINE is 1)")
    args = p.parse_args(argv)
    offline = args.offline or os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "yes", "on")

    for name in args.files:
        if name not in table():
            raise UserError(f"'{name}' is not a published file; there are {', '.join(table())}")
    paths = [args.folder / name for name in args.files]
    if args.preset or args.stage1:
        config = load_preset(args.preset or "mini", args.task, args.stage1)
        paths += [p for p in map(project_path, dict.fromkeys(weight_files(config).values())) if p not in paths]
    if not paths:
        paths = [args.folder / name for name in table()]
        if not args.list:
            raise UserError("name a preset (--preset v2) or files; --list shows every file")

    absent = [path for path in paths if not path.exists()]
    if args.list:
        print("\n".join(describe(path) for path in paths))
        return 0
    if absent and offline:
        raise UserError(f"offline, and missing: {', '.join(str(path) for path in absent)}")
    for path in absent:
        if path.name not in table():
            raise UserError(f"{path} is missing and not a published file; train it, or correct the configuration")
        fetch(table()[path.name], path)
    print(f"{len(paths)} files in place: {', '.join(path.name for path in paths)}")
    return 0


def describe(path: Path) -> str:
    state = "present" if path.exists() else "MISSING"
    known = table().get(path.name)
    if known is None:
        return f"{state}  {path}"
    lines = [f"{state}  {path}", f"         {known.holds}", f"         {known.source}", f"         {known.licence}"]
    lines += [f"         {known.note}"] if known.note else []
    return "\n".join([f"{lines[0]}  ({known.size / 1e9:.2f} GB)", *lines[1:]])


def fetch(file: PublishedFile, path: Path) -> None:
    """Downloads one file from the first of its mirrors that has it; what is half fetched never has the file's name.

    Raises:
        UserError: no mirror gives it, or none with the right checksum.
    """
    if file.make:
        raise UserError(f"{path.name} is not downloaded but made: {file.make}")
    path.parent.mkdir(parents=True, exist_ok=True)
    failures = []
    for mirror in file.mirrors:
        try:
            return fetch_from(mirror, path, file.sha256)
        except Exception as error:  # libraries of two kinds, each with many ways to fail
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            failures.append(f"from {address(mirror)}: {reason}")
    note = f"; {file.note}" if file.note else ""
    raise UserError(f"{path.name} could not be fetched {'; '.join(failures)}{note}")


def fetch_from(mirror: str, path: Path, sha256: str | None) -> None:
    if "://" in mirror:
        torch.hub.download_url_to_file(mirror, str(path))
    else:
        from huggingface_hub import hf_hub_download

        hf_hub_download(mirror, path.name, local_dir=path.parent)
    if sha256 and (found := checksum(path)) != sha256:
        path.unlink()
        raise ValueError(f"it arrived with checksum {found} instead of {sha256}")


def checksum(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as source, tqdm(total=path.stat().st_size, unit="B", unit_scale=True, desc="checking") as bar:
        while block := source.read(2**24):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
