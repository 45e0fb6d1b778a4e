"""Versions of installed packages, for the records of what was made with them."""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

# Packages that are published in several builds, each under its own name and with the same module.
BUILDS = {
    "opencv-python": (
        "opencv-python",
        "opencv-python-headless",
        "opencv-contrib-python",
        "opencv-contrib-python-headless",
    )
}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Name of the installed build -> version; 'unknown' for what was installed without saying (by conda, by hand)."""
    return dict(_installed(package) for package in packages)


def _installed(package: str) -> tuple[str, str]:
    for build in BUILDS.get(package, (package,)):
        try:
            return build, version(build)
        except PackageNotFoundError:
            continue
    return package, "unknown"
