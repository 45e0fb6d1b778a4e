"""The nodes for ComfyUI: in a process that loads the checkout as ComfyUI does (`comfyui_host.py`)."""

import importlib.util
import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch

from diffbir.model.options import Options
from diffbir.utils.config import ROOT

spandrel = pytest.importorskip("spandrel")


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> dict:
    """What the host saw."""
    from spandrel.architectures.Compact import Compact

    folder = tmp_path_factory.mktemp("ComfyUI")
    for name in ("custom_nodes", "upscale_models", "loras"):
        (folder / name).mkdir()
    (folder / "custom_nodes" / "DiffBIR").symlink_to(ROOT, target_is_directory=True)
    torch.save(Compact(num_feat=8, num_conv=1, upscale=2).state_dict(), folder / "upscale_models" / "net.pth")
    host = Path(__file__).with_name("comfyui_host.py")
    run = subprocess.run([sys.executable, "-P", host, folder], cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_every_option_is_an_input_with_its_default_range_and_help(found):
    inputs = found["nodes"]["DiffBIRRestore"]["required"]
    assert [inputs["model"], inputs["image"]] == [["DIFFBIR"], ["IMAGE"]]
    for option in fields(Options):
        kind, details = inputs[option.name]
        assert details["default"] == option.default and details["tooltip"] == option.metadata["help"]
        if option.metadata["choices"]:
            assert kind == list(option.metadata["choices"])
        else:
            assert kind == {bool: "BOOLEAN", int: "INT", float: "FLOAT", str: "STRING"}[type(option.default)]
        for bound, key in (("low", "min"), ("high", "max")):
            if option.metadata[bound] is not None and kind in ("INT", "FLOAT"):
                assert details[key] == option.metadata[bound]
    assert len(inputs) == len(fields(Options)) + 3


def test_nodes_say_what_they_return(found):
    assert found["returns"] == {
        "DiffBIRLoad": [["DIFFBIR"], ["model"]],
        "DiffBIRRestore": [["IMAGE", "IMAGE"], ["image", "stage1"]],
        "DiffBIRStage1": [["UPSCALE_MODEL"], ["upscale_model"]],
    }
    assert found["titles"].keys() == found["nodes"].keys()


@pytest.mark.parametrize("channels, batch", [(1, 1), (3, 2), (4, 2)])
def test_batches_of_every_kind_are_restored(found, channels, batch):
    result = found["results"][f"{channels} {batch}"]
    assert result["shape"] == result["stage1"] == [batch, 16, 25, channels]
    assert result["as_alone"] and result["as_restorer"] and result["changed"]
    assert result["range"][0] >= 0 and result["range"][1] <= 1


def test_options_reach_the_model_and_the_preset_has_the_rest(found):
    assert found["larger"] == [1, 32, 50, 3]
    assert found["preset_matters"]


def test_progress_memory_and_interruption_are_comfyui_s(found):
    progress = found["calls"]["progress"]
    assert progress[:3] == [[1, 2], [2, 2], [1, 2]]  # two steps of one image, which is then restored again
    assert [2 * 2, 2 * 2] in progress and [1, 4] in progress
    assert all(size > 1e6 and device == "cpu" for size, device in found["calls"]["freed"])
    assert found["interrupted"]


def test_stage_1_is_an_upscale_model_and_upscale_models_are_stage_1(found):
    assert found["upscale_model"]["scale"] == 1 and found["upscale_model"]["same"]
    assert found["upscale_model"]["bytes"] > 1e6
    assert found["other_stage1"] == "SpandrelNetwork"


def test_no_name_of_ours_shadows_one_of_comfyui_s(found):
    assert found["owner_of_utils"] == "ComfyUI"
    assert not {"model", "dataset", "scripts", "inference"} & set(found["modules"])
    assert str(ROOT) not in found["path"]


def test_the_file_that_comfyui_loads_does_nothing_elsewhere():
    spec = importlib.util.spec_from_file_location("anything", ROOT / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not hasattr(module, "NODE_CLASS_MAPPINGS") and "comfy" not in sys.modules


def test_the_example_workflow_fits_the_nodes(found):
    """Types of all nodes of ours, links between sockets of one type, and a value for every widget."""
    (path,) = (ROOT / "example_workflows").glob("*.json")
    workflow = json.loads(path.read_text())
    nodes = {node["id"]: node for node in workflow["nodes"]}
    ours = [node for node in nodes.values() if node["type"].startswith("DiffBIR")]
    assert {node["type"] for node in ours} == found["nodes"].keys() - {"DiffBIRStage1"}
    for node in ours:
        inputs = found["nodes"][node["type"]]
        widgets = {k: v for k, v in {**inputs["required"], **inputs.get("optional", {})}.items() if len(v) > 1}
        values = iter(node["widgets_values"])
        for name, (kind, details) in widgets.items():
            value = next(values)
            assert value in kind if isinstance(kind, list) else type(value) is type(details["default"]), name
            if details.get("control_after_generate"):
                assert next(values) == "fixed"
        assert not list(values)
    for _, start, slot, end, socket, kind in workflow["links"]:
        assert nodes[start]["outputs"][slot]["type"] == nodes[end]["inputs"][socket]["type"] == kind


def test_pyproject_describes_the_node_for_the_registry():
    text = (ROOT / "pyproject.toml").read_text()
    section = text.partition("[tool.comfy]")[2].partition("\n[")[0]
    assert 'DisplayName = "DiffBIR"' in section and "PublisherId" in section
