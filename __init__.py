"""Where ComfyUI finds its nodes when this repository lies in its folder custom_nodes; empty for everyone else.

The checkout does not go on the path of imports: its folders `model`, `dataset` and `utils` have names of ComfyUI's own.
"""

import importlib.util
import sys
from pathlib import Path

if {"folder_paths", "comfy"} <= sys.modules.keys():
    if "diffbir" not in sys.modules:
        _folder = Path(__file__).resolve().parent / "diffbir"
        _spec = importlib.util.spec_from_file_location("diffbir", _folder / "__init__.py")
        sys.modules["diffbir"] = importlib.util.module_from_spec(_spec)
        _spec.loader.exec_module(sys.modules["diffbir"])
    from diffbir.comfyui import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

    __all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
