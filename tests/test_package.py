"""The installed package: built from this checkout, run from an empty folder, without the checkout on the path."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffbir.utils.image import read_rgb
from tests.test_architecture import modules

ROOT = Path(__file__).parents[1]
FLAGS = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """Built from a copy of what git would hold, so that nothing is written into the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        if not name.startswith(("tests/", "docs/", "inputs/")) and (ROOT / name).is_file():
            (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / "source" / name)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, "--wheel-dir", folder, folder / "source"], check=True, cwd=folder)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """What a wheel of pure Python becomes in site-packages."""
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def run(folder: Path, *path: Path, args: list) -> str:
    """Runs Python in a folder with nothing but the environment and `path` to import from."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_holds_every_module_every_configuration_and_the_embedded_weights(wheel):
    held = set(zipfile.ZipFile(wheel).namelist())
    for name, path in modules().items():
        if name.partition(".")[0] == "diffbir":
            relative = path.relative_to(ROOT)
            assert str(relative if relative.parts[0] == "diffbir" else Path("diffbir") / relative) in held
    for pattern in ("configs/**/*.yaml", "weights/mini/*.safetensors", "weights/lpips/*.safetensors", "weights/*.yaml"):
        files = list(ROOT.glob(pattern))
        assert files
        for path in files:
            assert str(Path("diffbir") / path.relative_to(ROOT)) in held
    assert all(name.startswith(("diffbir/", "diffbir-")) for name in held)
    entry = next(name for name in held if name.endswith("entry_points.txt"))
    assert "diffbir = diffbir.command:main" in zipfile.ZipFile(wheel).read(entry).decode()


def test_installed_it_restores_as_from_the_checkout_whatever_else_has_its_folders_names(installed, tmp_path):
    empty, strangers = tmp_path / "empty", tmp_path / "strangers"
    empty.mkdir()
    for name in ("model", "dataset", "utils", "configs", "weights"):
        (strangers / name).mkdir(parents=True)
        (strangers / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    photo = tmp_path / "photo.png"
    Image.fromarray(read_rgb(ROOT / "inputs/demo/village-phone.jpg")[:40, :51]).save(photo)
    run(ROOT, args=["inference.py", "--input", photo, "--output", tmp_path / "checkout", *FLAGS])
    path = (strangers, installed)
    run(empty, *path, args=["-m", "diffbir", "--input", photo, "--output", "command", *FLAGS])
    script = (
        "import diffbir\n"
        f"assert diffbir.__file__.startswith({str(installed)!r}) and len(diffbir.__path__) == 1\n"
        "restorer = diffbir.Restorer.from_preset(device='cpu')\n"
        f"restorer({str(photo)!r}, steps=2).save('object.png')"
    )
    run(empty, *path, args=["-c", script])
    expected = (tmp_path / "checkout" / "photo.png").read_bytes()
    assert (empty / "command" / "photo.png").read_bytes() == expected
    assert (empty / "object.png").read_bytes() == expected
    assert np.asarray(Image.open(empty / "object.png")).shape == (40, 51, 3)
