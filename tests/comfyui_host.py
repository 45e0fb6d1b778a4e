"""Stands in for ComfyUI, which is no package: its documented interface to custom nodes, in a process of its own.

Run with a folder that holds custom_nodes/DiffBIR; prints what the tests look at as JSON.
"""

import importlib.util
import json
import sys
import types
from pathlib import Path

import torch

CALLS = {"progress": [], "freed": [], "interrupt": False}


class InterruptProcessingException(Exception):
    pass


class ProgressBar:
    def __init__(self, total):
        self.total = total

    def update_absolute(self, value, total=None, preview=None):
        CALLS["progress"].append([value, total])


def throw_exception_if_processing_interrupted():
    if CALLS["interrupt"]:
        raise InterruptProcessingException


def build(folder: Path) -> None:
    """The modules of ComfyUI that nodes may import, and one of its folders whose name is also one of ours."""

    def module(name: str, **content) -> types.ModuleType:
        sys.modules[name] = types.ModuleType(name)
        vars(sys.modules[name]).update(content)
        return sys.modules[name]

    files = {kind: [p.name for p in sorted((folder / kind).glob("*"))] for kind in ("upscale_models", "loras")}
    comfy = module("comfy", __path__=[])
    comfy.model_management = module(
        "comfy.model_management",
        get_torch_device=lambda: torch.device("cpu"),
        unet_offload_device=lambda: torch.device("cpu"),
        module_size=lambda m: sum(x.nelement() * x.element_size() for x in m.state_dict().values()),  # as theirs
        free_memory=lambda size, device: CALLS["freed"].append([size, str(device)]),
        throw_exception_if_processing_interrupted=throw_exception_if_processing_interrupted,
        InterruptProcessingException=InterruptProcessingException,
    )
    comfy.utils = module("comfy.utils", ProgressBar=ProgressBar)
    module(
        "folder_paths",
        get_filename_list=lambda kind: files[kind],
        get_full_path=lambda kind, name: str(folder / kind / name),
    )
    module("nodes")
    (folder / "utils").mkdir()
    (folder / "utils" / "__init__.py").write_text("OWNER = 'ComfyUI'\n")
    sys.path.insert(0, str(folder))


def load_custom_node(path: Path) -> types.ModuleType:
    """As ComfyUI does: under a name that is the path, with dots replaced."""
    name = str(path).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, path / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


def main(folder: Path) -> dict:
    build(folder)
    module = load_custom_node(folder / "custom_nodes" / "DiffBIR")
    nodes = module.NODE_CLASS_MAPPINGS
    found = {
        "nodes": {name: cls.INPUT_TYPES() for name, cls in nodes.items()},
        "titles": module.NODE_DISPLAY_NAME_MAPPINGS,
        "returns": {name: [cls.RETURN_TYPES, cls.RETURN_NAMES] for name, cls in nodes.items()},
    }

    def run(name: str, **inputs):
        return getattr(nodes[name](), nodes[name].FUNCTION)(**inputs)

    def defaults(name: str) -> dict:
        inputs = nodes[name].INPUT_TYPES()
        inputs = {**inputs["required"], **inputs.get("optional", {})}
        return {key: spec[1]["default"] for key, spec in inputs.items() if len(spec) > 1 and "default" in spec[1]}

    (model,) = run("DiffBIRLoad", **defaults("DiffBIRLoad"))
    widgets = defaults("DiffBIRRestore") | {"steps": 2, "seed": 3}
    results = {}
    for channels, batch in ((1, 1), (3, 2), (4, 2)):
        g = torch.Generator().manual_seed(channels)
        images = torch.rand(batch, 16, 25, channels, generator=g) + 1e-4  # a hair above 1 somewhere
        image, stage1 = run("DiffBIRRestore", model=model, image=images, **widgets)
        alone, _ = run("DiffBIRRestore", model=model, image=images[-1:], **widgets)
        expected = model(images[-1].clamp(0, 1).movedim(-1, 0), steps=2, seed=3).movedim(0, -1)
        results[f"{channels} {batch}"] = {
            "shape": list(image.shape),
            "stage1": list(stage1.shape),
            "as_alone": torch.equal(image[-1:], alone),
            "as_restorer": torch.equal(alone[0], expected),
            "changed": (image - images).abs().mean().item() > 1e-3 and not torch.equal(image, stage1),
            "range": [image.min().item(), image.max().item()],
        }
    found["results"], found["calls"] = results, CALLS
    images = torch.rand(1, 16, 25, 3)
    larger, _ = run("DiffBIRRestore", model=model, image=images, **widgets | {"upscale": 2.0})
    found["larger"] = list(larger.shape)
    every, _ = run("DiffBIRRestore", model=model, image=images, **widgets | {"preset_defaults": False})
    preset, _ = run("DiffBIRRestore", model=model, image=images, **widgets)
    found["preset_matters"] = not torch.equal(every, preset)
    CALLS["interrupt"] = True
    try:
        run("DiffBIRRestore", model=model, image=images, **widgets)
    except InterruptProcessingException:
        found["interrupted"] = True

    (upscale_model,) = run("DiffBIRStage1", model=model)
    upscale_model.to("cpu")
    x = torch.rand(1, 3, 16, 24)
    y = upscale_model(x)
    found["upscale_model"] = {
        "scale": upscale_model.scale,
        "same": torch.allclose(y, model.stage1(x).clamp(0, 1).detach(), atol=1e-5),
        "bytes": sum(x.nbytes for x in upscale_model.model.state_dict().values()),
    }
    (other,) = run("DiffBIRLoad", **defaults("DiffBIRLoad") | {"stage1": "net.pth"})
    found["other_stage1"] = type(other.stage1).__name__

    import utils

    found["owner_of_utils"] = utils.OWNER
    found["modules"] = sorted({name.partition(".")[0] for name in sys.modules})
    found["path"] = sys.path
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
