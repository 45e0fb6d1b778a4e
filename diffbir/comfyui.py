"""Nodes for ComfyUI; docs/elsewhere.md tells how to use them. Loaded by the checkout's `__init__.py`, inside ComfyUI.

Images there are (B, H, W, C) float32 in [0, 1], on the CPU.
"""

import copy
from dataclasses import fields
from typing import Any

import comfy.model_management as management
import comfy.utils
import folder_paths
import torch
from torch import Tensor, nn

from diffbir.model.options import Options
from diffbir.model.presets import PRESETS, STAGE1, names
from diffbir.model.restorer import Progress, Restorer
from diffbir.utils.choices import PRECISIONS
from diffbir.utils.cli import UserError
from diffbir.utils.precision import dtype_of

MODEL = "DIFFBIR"  # what sockets between our nodes carry
OWN = "the preset's own"
LARGEST = {int: 2**31 - 1, float: 1e9}  # where an option has no bound: widgets need one


def widget(option: Any) -> tuple:
    """The input of a node for a field of `Options`: type, default, range and help."""
    kind, meta = type(option.default), option.metadata
    details = {"default": option.default, "tooltip": meta["help"]}
    if meta["choices"]:
        return list(meta["choices"]), details
    if kind is bool:
        return "BOOLEAN", details
    if kind is str:
        return "STRING", {**details, "multiline": True}
    low = 0 if meta["low"] is None else meta["low"]
    details |= {"min": kind(low), "max": kind(LARGEST[kind] if meta["high"] is None else meta["high"])}
    if kind is float:
        return "FLOAT", {**details, "step": 0.05 if details["max"] <= 16 else 100.0, "round": False}
    return "INT", {**details, "control_after_generate": True} if option.name == "seed" else details


class LoadDiffBIR:
    """A preset, in ComfyUI's device and, unless it keeps models there, in main memory while it does not compute."""

    CATEGORY, FUNCTION = "DiffBIR", "load"
    RETURN_TYPES, RETURN_NAMES = (MODEL,), ("model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        stage1 = [OWN, *names(STAGE1), *folder_paths.get_filename_list("upscale_models")]
        loras = ["none", *folder_paths.get_filename_list("loras")]
        return {
            "required": {
                "preset": (names(PRESETS), {"default": "mini", "tooltip": "its weights go into the folder weights"}),
                "stage1": (stage1, {"default": OWN, "tooltip": "by name, or any file of upscale_models"}),
                "precision": (["auto", *PRECISIONS], {"default": "auto", "tooltip": "auto is fp16 on a GPU"}),
            },
            "optional": {
                "preset_file": ("STRING", {"default": "", "tooltip": "a YAML in place of the preset"}),
                "task": ("STRING", {"default": "", "tooltip": "of a preset with several: sr, face or denoise"}),
                "lora": (loras, {"default": "none", "tooltip": "merged into the networks"}),
                "lora_scale": ("FLOAT", {"default": 1.0, "min": -10.0, "max": 10.0, "step": 0.05}),
            },
        }

    def load(
        self,
        preset: str,
        stage1: str,
        precision: str,
        preset_file: str = "",
        task: str = "",
        lora: str = "none",
        lora_scale: float = 1.0,
    ) -> tuple[Restorer]:
        if stage1 in folder_paths.get_filename_list("upscale_models"):
            stage1 = folder_paths.get_full_path("upscale_models", stage1)
        additions = [] if lora == "none" else [f"{folder_paths.get_full_path('loras', lora)}:{lora_scale}"]
        device = management.get_torch_device()
        restorer = Restorer.from_preset(
            preset_file or preset,
            device,
            precision,
            task=task or None,
            stage1=None if stage1 == OWN else stage1,
            offload=management.unet_offload_device() != device,
            lora=additions,
        )
        return (restorer,)


class Restore:
    """Restores a batch, one image after the other; what an image becomes does not depend on the others."""

    CATEGORY, FUNCTION = "DiffBIR", "restore"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE", "IMAGE"), ("image", "stage1")

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        help = "leaves what is not changed here to the preset: a value at this node's default means the preset's"
        return {
            "required": {
                "model": (MODEL,),
                "image": ("IMAGE",),
                "preset_defaults": ("BOOLEAN", {"default": True, "tooltip": help}),
                **{option.name: widget(option) for option in fields(Options)},
            }
        }

    def restore(
        self, model: Restorer, image: Tensor, preset_defaults: bool = True, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if preset_defaults:
            unchanged = {option.name: option.default for option in fields(Options)}
            options = {name: value for name, value in options.items() if value != unchanged.get(name)}
        pictures = list(image.movedim(-1, 1).clamp(0, 1).float())
        bar = comfy.utils.ProgressBar(len(pictures))

        def report(at: Progress) -> None:
            management.throw_exception_if_processing_interrupted()
            steps = max(1, at.steps)
            done = at.picture * steps + (at.step if at.steps else 1)
            bar.update_absolute(done, len(pictures) * steps)

        networks = [net for net in (model.stage1, *model.diffusion_networks, model.autoencoder) if net is not None]
        management.free_memory(max(map(management.module_size, networks)), model.device)
        results = list(model.stream(pictures, progress=report, stages=True, **options))
        image, stage1 = (torch.stack([getattr(r, name) for r in results]) for name in ("image", "stage1"))
        return image.movedim(1, -1), stage1.movedim(1, -1)


class UpscaleModel:
    """What ComfyUI's nodes for upscale models call: stage 1 alone, (B, 3, h, w) -> (B, 3, scale h, scale w)."""

    def __init__(self, stage1: nn.Module):
        self.model = copy.deepcopy(stage1)  # their nodes move it between devices
        self.scale = round(getattr(stage1, "scale", 1))

    def to(self, *args: Any, **kwargs: Any) -> "UpscaleModel":
        self.model.to(*args, **kwargs)
        return self

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        return self.model(image.to(dtype_of(self.model))).float().clamp(0, 1)


class Stage1AsUpscaleModel:
    CATEGORY, FUNCTION = "DiffBIR", "take"
    RETURN_TYPES, RETURN_NAMES = ("UPSCALE_MODEL",), ("upscale_model",)

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {"model": (MODEL,)}}

    def take(self, model: Restorer) -> tuple[UpscaleModel]:
        if not any(True for _ in model.stage1.parameters()):
            raise UserError("this model has no stage 1; load one with it")
        return (UpscaleModel(model.stage1),)


NODE_CLASS_MAPPINGS = {
    "DiffBIRLoad": LoadDiffBIR,
    "DiffBIRRestore": Restore,
    "DiffBIRStage1": Stage1AsUpscaleModel,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DiffBIRLoad": "Load DiffBIR",
    "DiffBIRRestore": "DiffBIR Restore",
    "DiffBIRStage1": "DiffBIR Stage 1 as Upscale Model",
}
