"""Imports run downwards only, everything has one name, and old names in saved configurations still resolve."""

import ast
import importlib
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest

from diffbir.utils import moved
from diffbir.utils.config import full_name, instantiate

ROOT = Path(__file__).parents[1]
STOREYS = {  # prefix -> floor; the longest prefix counts
    "diffbir.utils": 0,
    "diffbir.dataset": 1,
    "diffbir.evaluation": 1,
    "diffbir.model.networks": 1,
    "diffbir.model.sampling": 2,
    "diffbir.model.weights": 3,
    "diffbir.model": 4,  # build, options, presets, restorer
    "diffbir.model.training": 5,
    "diffbir": 6,
    "__init__": 7,  # ComfyUI's way in
    "inference": 7,
    "scripts": 7,
    "train_stage1": 7,
    "train_stage2": 7,
    "benchmarks": 8,
}
OWN = ("model", "dataset", "utils", "evaluation")
SIDEWAYS = {("diffbir.model.networks", "diffbir.dataset"), ("diffbir.dataset", "diffbir.model.networks")}


def storey(module: str) -> str:
    found = [prefix for prefix in STOREYS if module == prefix or module.startswith(f"{prefix}.")]
    return max(found, key=len, default="")


def imports(source: str) -> set[str]:
    """Modules that a file imports, anywhere in it; `from a import b` counts as a and as a.b."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide which storey is meant"
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def faults(module: str, source: str) -> list[str]:
    """Imports of a module that lead upwards, sideways, or past the namespace."""
    own, wrong = storey(module), []
    for name in imports(source):
        if name.partition(".")[0] in OWN:
            wrong.append(f"{module} imports {name}, not diffbir.{name}")
        other = storey(name)
        if other and (STOREYS[other] > STOREYS[own] or (own, other) in SIDEWAYS):
            wrong.append(f"{module} imports {name}, which stands above or beside it")
    return wrong


def modules() -> dict[str, Path]:
    """Dotted name -> file, of everything that is in the repository but tests."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = {}
    for line in listed.stdout.split():
        path = Path(line)
        if path.parts[0] == "tests" or not (ROOT / path).is_file():
            continue
        name = ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        names[f"diffbir.{name}" if path.parts[0] in OWN else name] = ROOT / path
    return names


def test_imports_run_downwards():
    found = [fault for name, path in modules().items() for fault in faults(name, path.read_text())]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "module, line",
    [
        ("diffbir.utils.image", "from diffbir.model.networks.layers import repeat_to"),
        ("diffbir.utils.image", "def f():\n    import diffbir.dataset.crops"),
        ("diffbir.model.networks.unet", "from diffbir.model.sampling import solvers"),
        ("diffbir.model.networks.unet", "from diffbir.dataset.crops import Crop"),
        ("diffbir.model.sampling.tiling", "from diffbir.model.restorer import Restorer"),
        ("diffbir.model.restorer", "from diffbir.model.training.base import Trainable"),
        ("diffbir.model.training.run", "import inference"),
        ("diffbir.model.restorer", "from utils.image import read_rgb"),
    ],
)
def test_a_wrong_import_is_found(module, line):
    assert faults(module, line)


def test_every_module_is_imported_under_its_one_name():
    """What a whole program loads: no file twice, and none of the folders as top-level packages."""
    script = (
        "import sys, json, inference, train_stage1\n"
        "import diffbir.restore, diffbir.model.training.run, diffbir.dataset.data_module\n"
        "files = {}\n"
        "for name, module in list(sys.modules.items()):\n"
        "    if getattr(module, '__file__', None): files.setdefault(module.__file__, []).append(name)\n"
        "print(json.dumps(files))"
    )
    run = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    ours = {str(path) for path in modules().values()}  # an environment may lie inside the checkout
    files = {file: names for file, names in json.loads(run.stdout).items() if file in ours}
    assert len(files) > 40
    assert [names for names in files.values() if len(names) > 1] == []
    tops = {name.partition(".")[0] for names in files.values() for name in names}
    assert tops == {"diffbir", "inference", "train_stage1"}


def test_other_packages_of_the_same_names_change_nothing(tmp_path):
    for name in ("model", "dataset", "utils"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the wrong package')\n")
    script = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import diffbir.model.restorer, diffbir.dataset.pairs"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


OLD = [*moved.CLASSES, *(f"{module}.*" for module in moved.MODULES)]


@pytest.mark.parametrize("name", OLD)
def test_targets_of_older_configurations_resolve(name):
    module, _, cls = name.rpartition(".")
    if cls != "*":
        assert inspect.isclass(getattr(importlib.import_module(full_name(name).rpartition(".")[0]), cls))
        return
    target = importlib.import_module(full_name(f"{module}.X").rpartition(".")[0])
    assert target.__name__.startswith("diffbir.")


@pytest.mark.parametrize(
    "target", ["model.swinir.SwinIR", "model.networks.swinir.SwinIR", "diffbir.model.networks.swinir.SwinIR"]
)
def test_short_long_and_old_targets_mean_the_same_class(target):
    from diffbir.model.networks.swinir import SwinIR

    params = {"embed_dim": 12, "depths": [1], "num_heads": [2], "window_size": 4}
    assert type(instantiate({"target": target, "params": params})) is SwinIR
