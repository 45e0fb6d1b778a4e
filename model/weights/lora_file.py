"""Files of low-rank additions (LoRA), with the key names of diffusers, PEFT, kohya or our own, for our networks.

A key is NETWORK LAYER FACTOR. All spellings of a layer are the same once dots are underscores: kohya has nothing else.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffbir.model.networks.lora import DOWN, UP
from diffbir.model.weights.checkpoint import CheckpointError, find_weights, save_weights
from diffbir.model.weights.diffusers_layout import TRANSLATORS, Source, sources
from diffbir.model.weights.foreign import read_foreign

# Network -> what its keys may begin with.
PREFIXES = {
    "unet": ("unet_", "lora_unet_", "model_diffusion_model_"),
    "autoencoder": ("autoencoder_", "vae_", "lora_vae_", "first_stage_model_"),
    "text_encoder": ("text_encoder_", "lora_te_", "lora_te1_", "cond_stage_model_"),
    "branch": ("branch_", "controlnet_", "lora_controlnet_", "control_model_"),
}
# .lora_A or .lora_A.ADAPTER; .lora_down, .lora.down, _lora.down or .lora_linear_layer.down
FACTOR = re.compile(
    r"^(.+?)(?:\.lora_(?P<peft>[AB])(?:\.\w+)?|[._]lora(?:_linear_layer)?[._](?P<kohya>down|up))\.weight$"
)
SCALE = re.compile(r"^(.+)\.alpha$")
OTHERS = re.compile(
    r"\.(dora_scale|lora_magnitude_vector\b.*|hada_\w+|lokr_\w+|lora_mid\.weight|oft_\w+|diff\w*|on_input)$"
)


def read_lora(
    path: str | Path, networks: Mapping[str, nn.Module | None]
) -> tuple[dict[str, dict[str, Tensor]], dict[str, dict[str, Tensor]]]:
    """What a file adds to networks.

    Args:
        networks: those that there are, by role; additions to one that is None are left out.

    Returns:
        Role -> additions as `model.networks.lora.factors` names them, with the file's own scale (alpha / rank) in the
        second factor; role -> whole weights that the file replaces, by our keys.

    Raises:
        CheckpointError: the file can't be read, holds another kind of addition, or a layer that isn't there.
    """
    path = find_weights(path)
    state = _flat(read_foreign(path))
    tables = {role: _table(role, network) for role, network in networks.items() if network is not None}
    factors: dict[str, dict[str, Tensor]] = {}
    whole, alphas = {}, {}
    for key, value in state.items():
        if match := FACTOR.match(key):
            down = match["peft"] == "A" or match["kohya"] == "down"
            factors.setdefault(match[1], {})[DOWN if down else UP] = value
        elif match := SCALE.match(key):
            alphas[match[1]] = float(value)
        elif OTHERS.search(key):
            raise CheckpointError(f"{path} holds '{key}', which is no addition of low rank (LoRA); merge it elsewhere")
        else:
            whole[key] = value
    if not factors:
        raise CheckpointError(f"{path} holds no addition of low rank; give a LoRA file of diffusers, PEFT or kohya")

    default = _peft_scale(path)
    parts: dict[tuple[str, str], list[tuple[int, int, Tensor, Tensor]]] = {}
    for layer, pair in factors.items():
        place = _place(path, layer, tables, networks)
        if len(pair) != 2:
            raise CheckpointError(f"{path}: only one of the factors of '{layer}' is there; fetch the file again")
        if place:
            role, key, i, n = place
            down, up = pair[DOWN].float(), pair[UP].float()
            scale = alphas[layer] / len(down) if layer in alphas else default
            parts.setdefault((role, key), []).append((i, n, down, up * scale))
    found: dict[str, dict[str, Tensor]] = {}
    for (role, key), pieces in parts.items():
        down, up = _joined(pieces)
        found.setdefault(role, {})[key + DOWN] = down
        found[role][key + UP] = up

    replaced: dict[str, dict[str, Tensor]] = {}
    for key, value in whole.items():
        layer, _, kind = key.replace(".base_layer.", ".").rpartition(".")
        if place := _place(path, layer, tables, networks):
            role, name, _, n = place
            if n == 1:
                replaced.setdefault(role, {})[f"{name}.{kind}"] = value
    return found, replaced


def write_lora(additions: Mapping[str, Tensor], path: str | Path, dtype: torch.dtype) -> None:
    """Writes additions, `<network>.<layer>.lora_A.weight` and `.lora_B.weight`, and what else they hold.

    Args:
        dtype: of all; with `torch.float8_e4m3fn`, of the factors (see `in_8_bits`), and half precision of the rest.
    """
    if dtype == torch.float8_e4m3fn:
        save_weights(in_8_bits(additions), path)
    else:
        save_weights(additions, path, dtype)


def in_8_bits(additions: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Factors as float8_e4m3fn, which has 4 bits of precision, and what else there is, such as biases, as float16.

    A file has room for twice the rank that it has in half precision, and rounding costs a thousandth of the addition's
    energy. Each factor is brought into the range of the type by a power of two; `<layer>.alpha` takes both back.
    """
    dtype = torch.float8_e4m3fn
    result, shifts = {}, {}
    for key, value in additions.items():
        if not key.endswith((DOWN, UP)):
            result[key] = value.to(torch.float16)
            continue
        largest = value.float().abs().max().clamp(min=2.0**-40)
        shift = torch.floor(torch.log2(torch.finfo(dtype).max / largest))
        result[key] = (value.float() * 2**shift).to(dtype)
        layer = key.removesuffix(DOWN).removesuffix(UP)
        shifts[layer] = shifts.get(layer, 0.0) + shift
    ranks = {layer: len(additions[layer + DOWN]) for layer in shifts}
    return result | {f"{layer}.alpha": ranks[layer] * 2.0**-shift for layer, shift in shifts.items()}


def _flat(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """Nested `state_dict_unet`, `state_dict_vae` of published one-step restorers, with their networks as prefixes."""
    state = {}
    for key, value in content.items():
        if isinstance(value, dict) and key in ("state_dict", "params"):
            state |= _flat(value)
        elif isinstance(value, dict):
            state |= {f"{key.removeprefix('state_dict_')}.{k}": v for k, v in _flat(value).items()}
        elif isinstance(value, Tensor):
            state[key] = value
    return state


def _table(role: str, network: nn.Module) -> dict[str, tuple[str, int, int]]:
    """Every spelling of a layer, with underscores -> our layer, and which of how many parts of its rows."""
    state = network.state_dict()
    table = {}
    translated = sources(role, state) if role in TRANSLATORS and state and _translatable(role, state) else {}
    for key in state:
        if not key.endswith("weight"):
            continue
        layer = key[:-7]  # without .weight, or _weight
        table[layer.replace(".", "_")] = layer, 0, 1
        source = translated.get(key)
        if source is not None and type(source) is Source:
            for i, name in enumerate(source.keys):
                name = name.removesuffix(".weight").replace(".", "_")
                spellings = name, name.replace("to_out_0", "to_out"), name.removeprefix("text_model_")
                table |= dict.fromkeys(spellings, (layer, i, len(source.keys)))
    return table


def _translatable(role: str, state: Mapping[str, Tensor]) -> bool:
    """Whether their libraries have a counterpart of the network: their text encoder has one of ours alone."""
    return role != "text_encoder" or any(".resblocks." in key for key in state)


def _place(
    path: Path, layer: str, tables: Mapping[str, dict], networks: Mapping[str, nn.Module | None]
) -> tuple[str, str, int, int] | None:
    """Role, our layer, part and number of parts of a layer in a file; None for a network that is left out."""
    name = layer.removeprefix("base_model.model.").removeprefix("module.").replace(".processor.", ".").replace(".", "_")
    for role, prefixes in PREFIXES.items():
        for prefix in prefixes:
            if name.startswith(prefix) and role in networks:
                if role not in tables:
                    return None
                if name.removeprefix(prefix) in tables[role]:
                    return role, *tables[role][name.removeprefix(prefix)]
                rest = layer.partition(".")[2] if layer.startswith(f"{role}.") else layer
                raise CheckpointError(f"{path}: '{rest}' is no layer of {type(networks[role]).__name__}; {ADVICE}")
    for role in ("unet", *tables):  # without a prefix it is the UNet's
        if name in tables.get(role, {}):
            return role, *tables[role][name]
    raise CheckpointError(f"{path}: '{layer}' belongs to none of {', '.join(networks)}; {ADVICE}")


ADVICE = "give additions that were trained for this model"


def _joined(pieces: list[tuple[int, int, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """One pair of factors for a layer of ours that is several of theirs: the second of them block by block."""
    if len(pieces) == 1 and pieces[0][1] == 1:
        return pieces[0][2:]
    ups = []
    for i, n, _, up in pieces:
        block = up.new_zeros(n * len(up), up.shape[1])
        block[i * len(up) : (i + 1) * len(up)] = up.flatten(1)
        ups.append(block)
    return torch.cat([down.flatten(1) for _, _, down, _ in pieces]), torch.cat(ups, dim=1)


def _peft_scale(path: Path) -> float:
    """lora_alpha / r of the adapter_config.json that PEFT writes beside its files; 1 without one."""
    config = path.with_name("adapter_config.json")
    if not (path.name.startswith("adapter_model") and config.is_file()):
        return 1.0
    try:
        content = json.loads(config.read_text())
        rank = content["r"] ** 0.5 if content.get("use_rslora") else content["r"]
        return content.get("lora_alpha", rank) / rank
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{config} is damaged; fetch it again") from error
