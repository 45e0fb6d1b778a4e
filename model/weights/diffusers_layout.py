"""The layout of diffusers and transformers: the one place that knows their key names.

Our networks keep the key names of the published Stable Diffusion files. `sources` says what each of our keys is made of
in their files, and `to_diffusers` is the same mapping the other way round.
"""

import json
import logging
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.weights.weight_file import splits

log = logging.getLogger(__name__)

# Role of a network -> its weights in a diffusers folder.
COMPONENTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "autoencoder": "vae/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "branch": "controlnet/diffusion_pytorch_model.safetensors",
}
# Names of weight files and of indices of parts, as `model.fp16.safetensors`, `model.safetensors.index.fp16.json`.
WEIGHTS = re.compile(
    r"(diffusion_pytorch_model|model|pytorch_model)(?:\.(\w+))?\.(safetensors|bin)(\.index(?:\.(\w+))?\.json)?"
)
# A key by which a file of theirs is recognised.
MARKS = {
    "unet": "time_embedding.linear_1.weight",
    "branch": "time_embedding.linear_1.weight",
    "autoencoder": "decoder.mid_block.resnets.0.conv1.weight",
    "text_encoder": "text_model.final_layer_norm.weight",
}

# Parts of our keys -> parts of theirs, replaced in this order. Blocks that they also count differently come after.
UNET = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "middle_block.0": "mid_block.resnets.0",
    "middle_block.1": "mid_block.attentions.0",
    "middle_block.2": "mid_block.resnets.1",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
AUTOENCODER = {
    "mid.block_1": "mid_block.resnets.0",
    "mid.block_2": "mid_block.resnets.1",
    "mid.attn_1": "mid_block.attentions.0",
    "norm": "group_norm",
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "proj_out": "to_out.0",
    "down": "down_blocks",
    "block": "resnets",
    "nin_shortcut": "conv_shortcut",
    "downsample": "downsamplers.0",
    "upsample": "upsamplers.0",
    "norm_out": "conv_norm_out",
}
TEXT_ENCODER = {
    "model": "text_model",
    "token_embedding": "embeddings.token_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "transformer.resblocks": "encoder.layers",
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn": "self_attn",
    "c_fc": "fc1",
    "c_proj": "fc2",
    "ln_final": "final_layer_norm",
}
# Names of the autoencoder's attention in older versions of diffusers, in which published files are still stored.
OLD = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class Source:
    """What a tensor is made of in a file: the named tensors, joined along the first axis, then reshaped.

    Args:
        keys: names in the file.
        shape: shape of the result.
    """

    keys: tuple[str, ...]
    shape: tuple[int, ...]

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        """Values of the named tensors -> ours.

        Raises:
            ValueError: what they compute there, our network cannot.
        """
        return (parts[0] if len(parts) == 1 else torch.cat(list(parts))).reshape(self.shape)

    def split(self, value: Tensor) -> Sequence[Tensor]:
        """Ours -> values of the named tensors."""
        return value.chunk(len(self.keys))


class HintConvolution(Source):
    """The first convolution of the latent branch, W on [z_t, c] = W_1 z_t + W_2 c, in a ControlNetModel.

    Which computes conv_in(z_t) + embedding(c), where the embedding is two convolutions with a SiLU between them. Since
    silu(x) - silu(-x) = x, it is W_2 c if the first gives [c, -c] and the second is [W_2, -W_2].
    """

    PREFIX = "controlnet_cond_embedding."
    KEYS = ("conv_out.weight", "conv_out.bias", "conv_in.weight", "conv_in.bias")

    @classmethod
    def of(cls, shape: tuple[int, ...]) -> "HintConvolution":
        return cls(("conv_in.weight", *(cls.PREFIX + key for key in cls.KEYS)), shape)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        on_z, weight = parts[:2]
        half = weight.shape[1] // 2
        value = torch.cat([on_z, weight[:, :half]], dim=1)
        pairs = list(zip(parts, self.split(value), strict=True))
        if any(p.shape != q.shape or not (p.is_meta or torch.equal(p, q)) for p, q in pairs):
            raise ValueError("its embedding of the condition is no plain convolution, which the latent branch has")
        return value

    def split(self, value: Tensor) -> Sequence[Tensor]:
        on_z, on_c = value.chunk(2, dim=1)
        channels = on_c.shape[1]
        identity = value.new_zeros(2 * channels, channels, 3, 3)
        identity[:channels, :, 1, 1] = torch.eye(channels, device=value.device)
        identity[channels:, :, 1, 1] = -torch.eye(channels, device=value.device)
        doubled = torch.cat([on_c, -on_c], dim=1)
        return on_z, doubled, value.new_zeros(len(value)), identity, value.new_zeros(2 * channels)


class WithoutText(Source):
    """The norm after the attention to the text, in a network that has none: there, such an attention that adds zero.

    It attends to one token of width 1.
    """

    PARTS = ("norm2.weight", "norm2.bias", "attn2.to_q.weight", "attn2.to_k.weight", "attn2.to_v.weight")
    SILENT = ("attn2.to_out.0.weight", "attn2.to_out.0.bias")

    @classmethod
    def of(cls, key: str, shape: tuple[int, ...]) -> "WithoutText":
        block = key.removesuffix("norm3.weight")
        return cls((key, *(block + part for part in cls.PARTS + cls.SILENT)), shape)

    def join(self, parts: Sequence[Tensor]) -> Tensor:
        if any(not part.is_meta and part.any() for part in parts[-len(self.SILENT) :]):
            raise ValueError("it attends to text, which this network does not")
        return parts[0]

    def split(self, value: Tensor) -> Sequence[Tensor]:
        n = len(value)
        shapes = (n,), (n,), (n, n), (n, 1), (n, 1), (n, n), (n,)
        return value, *(value.new_zeros(shape) for shape in shapes)


def is_diffusers(role: str, names: Iterable[str]) -> bool:
    """Whether the keys of a file are theirs, under whatever prefix, for a network with this role."""
    return role in MARKS and any(current(role, rest) == MARKS[role] for name in names for _, rest in splits(name))


def find_component(folder: Path, role: str) -> Path:
    """The weight file for a role in a diffusers folder, or in the part of one for this role; or an index of several.

    Of variants, the first of: without a name, fp16, bf16, others, non_ema; but safetensors before torch files. Networks
    that diffusers has no class for, and a branch that isn't a ControlNetModel there, lie beside the others as
    ROLE.safetensors. If there is none, the path where diffusers would write it.
    """
    own = folder / f"{role}.safetensors"
    usual = folder / COMPONENTS.get(role, own.name)
    found = _weights(usual.parent) or [path for path in (own,) if path.is_file()] or _weights(folder)
    if len(found) > 1:
        log.info("%s is taken; there is also %s", found[0], ", ".join(path.name for path in found[1:]))
    return found[0] if found else usual


def _weights(folder: Path) -> list[Path]:
    """Weight files of one network, or their indices, under the names of diffusers and transformers; the best first."""
    variants = ["", "fp16", "bf16"]
    found = []
    for path in folder.glob("*"):
        match = WEIGHTS.fullmatch(path.name)
        if match and path.is_file():
            _, variant, suffix, index, its_variant = match.groups(default="")
            variant = variant or its_variant
            rank = variants.index(variant) if variant in variants else len(variants) + variant.startswith("non_")
            found.append((suffix == "bin", rank, variant, bool(index), path))
    return [path for *_, path in sorted(found)]


def unused(role: str, state: Mapping[str, Tensor]) -> list[str]:
    """Our keys that never influence an output, so that their files may lack them.

    They are what follows the text encoder's penultimate layer, except the final norm.
    """
    if role != "text_encoder":
        return []
    last = max((int(key.split(".")[3]) for key in state if ".resblocks." in key), default=0)
    return [
        key
        for key in state
        if key.startswith(("model.text_projection", "model.logit_scale", f"model.transformer.resblocks.{last}."))
    ]


def sources(role: str, state: Mapping[str, Tensor], names: Iterable[str] = ()) -> dict[str, Source]:
    """Each of our keys, except the unused, -> what it is made of in their file.

    Args:
        role: key of `MARKS`.
        state: state of our network; only keys and shapes matter, so it may be on the meta device.
        names: keys of the file; the result spells keys as it does, where versions of their libraries differ.
    """
    spelling = {current(role, name): name for name in names}
    translate = TRANSLATORS[role](state)
    idle = set(unused(role, state))
    result = {}
    for key, value in state.items():
        if key not in idle:
            theirs = translate(key)
            if key == "input_blocks.0.0.weight" and role == "branch" and "input_hint_block.0.weight" not in state:
                result[key] = HintConvolution.of(tuple(value.shape))
                continue
            if key.endswith(".norm3.weight") and key.replace("norm3", "norm2") not in state:
                without = WithoutText.of(theirs, tuple(value.shape))
                if not spelling or spelling.keys() >= set(without.keys):
                    result[key] = without
                    continue
            parts = [theirs.replace("in_proj_", f"{p}_proj.") for p in "qkv"] if "in_proj_" in theirs else [theirs]
            result[key] = Source(tuple(spelling.get(part, part) for part in parts), tuple(value.shape))
    return result


def to_diffusers(role: str, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of our network in their layout; the tensors are views of ours."""
    result = {}
    for key, source in sources(role, state).items():
        for theirs, part in zip(source.keys, source.split(state[key]), strict=True):
            # The projections of the autoencoder's attention, our 1x1 convolutions, are linear layers there.
            result[theirs] = part[..., 0, 0] if ".attentions." in theirs and part.ndim == 4 else part
    return result


def current(role: str, name: str) -> str:
    """Their key as published files of today spell it."""
    if role == "text_encoder":  # transformers 5 writes no prefix; it reads files with and without
        return "text_model." + name.removeprefix("text_model.")
    return _replace(name, OLD) if role == "autoencoder" else name


def _replace(key: str, rules: Mapping[str, str]) -> str:
    """Applies rules to whole parts of a key, that is, between dots."""
    for old, new in rules.items():
        key = re.sub(rf"(?<![^.]){re.escape(old)}(?![^.])", new, key)
    return key


def _unet(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    """They count blocks by level, we count through.

    A level of the down path is its residual blocks and a downsampling, which the last lacks; but input block 0 is the
    first convolution, so the number of blocks is a multiple of that of the levels. A level of the up path has as many.
    """
    blocks = {key.split(".")[1] for key in state if key.startswith("input_blocks.")}
    levels = 1 + sum(key.endswith(".op.weight") for key in state)
    per_level = len(blocks) // levels

    def place(match: re.Match) -> str:
        path, block, layer, part = match.groups()
        level, i = divmod(int(block) - (path == "input"), per_level)
        prefix = f"{'down' if path == 'input' else 'up'}_blocks.{level}"
        if part == "op":
            return f"{prefix}.downsamplers.0.conv"
        if part == "conv":
            return f"{prefix}.upsamplers.0.conv"
        return f"{prefix}.{'resnets' if layer == '0' else 'attentions'}.{i}.{part}"

    return lambda key: re.sub(r"^(input|output)_blocks\.(\d+)\.(\d+)\.(\w+)", place, _replace(key, UNET))


def _branch(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    """As the UNet, with the small image encoder, in which we also count activations, and the zero convolutions."""
    encoder = _unet(state)
    last = max((int(key.split(".")[1]) for key in state if key.startswith("input_hint_block.")), default=0)

    def place(match: re.Match) -> str:
        layer = int(match[1])
        name = {0: "conv_in", last: "conv_out"}.get(layer, f"blocks.{layer // 2 - 1}")
        return f"controlnet_cond_embedding.{name}"

    def translate(key: str) -> str:
        key = re.sub(r"^input_hint_block\.(\d+)", place, key)
        key = re.sub(r"^zero_convs\.(\d+)\.0", r"controlnet_down_blocks.\1", key)
        return encoder(key.replace("middle_block_out.0", "controlnet_mid_block"))

    return translate


def _autoencoder(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    """We count the decoder's levels from the finest, they from the coarsest."""
    coarsest = max((int(key.split(".")[2]) for key in state if key.startswith("decoder.up.")), default=0)

    def translate(key: str) -> str:
        key = re.sub(r"^decoder\.up\.(\d+)", lambda match: f"decoder.up_blocks.{coarsest - int(match[1])}", key)
        return _replace(key, AUTOENCODER)

    return translate


def _text_encoder(state: Mapping[str, Tensor]) -> Callable[[str], str]:
    return lambda key: _replace(key, TEXT_ENCODER)


TRANSLATORS = {"unet": _unet, "branch": _branch, "autoencoder": _autoencoder, "text_encoder": _text_encoder}


def config_json(role: str, network: nn.Module) -> dict:
    """Contents of the config.json from which diffusers or transformers builds the same network.

    Raises:
        ValueError: they cannot build it: an autoencoder of patches or without norms, a branch whose condition has other
            channels than the latent.
    """
    return CONFIGS[role](network)


def _encoder_config(net: nn.Module) -> dict:
    """What UNet2DConditionModel and ControlNetModel have in common."""
    widths = [width for width, _ in net.levels]
    blocks = net.middle_block[1].transformer_blocks
    head_channels = widths[-1] // blocks[0].attn1.heads
    return {
        "in_channels": net.input_blocks[0][0].in_channels,
        "block_out_channels": widths,
        "layers_per_block": len(net.input_blocks) // len(widths) - 1,
        "down_block_types": [
            "CrossAttnDownBlock2D" if factor in net.attention_factors else "DownBlock2D" for _, factor in net.levels
        ],
        "attention_head_dim": [width // head_channels for width in widths],  # the number of heads, despite its name
        "cross_attention_dim": blocks[0].attn2.to_k.in_features if blocks[0].has_text else 1,
        "transformer_layers_per_block": len(blocks),
        "use_linear_projection": True,
        "norm_num_groups": net.norm_groups,
    }


def _unet_config(net: nn.Module) -> dict:
    config = _encoder_config(net)
    return {
        "_class_name": "UNet2DConditionModel",
        **config,
        "up_block_types": [name.replace("Down", "Up") for name in reversed(config["down_block_types"])],
        "out_channels": net.out[2].out_channels,
    }


def _branch_config(net: nn.Module) -> dict:
    config = {"_class_name": "ControlNetModel", **_encoder_config(net)}
    if hasattr(net, "input_hint_block"):
        convolutions = [layer for layer in net.input_hint_block if isinstance(layer, nn.Conv2d)]
        channels, widths = convolutions[0].in_channels, [layer.out_channels for layer in convolutions[:-1:2]]
        return config | {"conditioning_channels": channels, "conditioning_embedding_out_channels": widths}
    channels = net.hint_channels
    if config["in_channels"] != 2 * channels:
        raise ValueError(f"{channels} channels of the condition to {config['in_channels'] - channels} of the latent")
    return config | {
        "in_channels": channels,
        "conditioning_channels": channels,
        "conditioning_embedding_out_channels": [2 * channels],
    }


def _autoencoder_config(net: nn.Module) -> dict:
    levels = net.encoder.down
    halves = net.encoder, net.decoder
    if max(net.patch, net.decoder_patch) > 1 or not all(hasattr(half.norm_out, "num_groups") for half in halves):
        raise ValueError("an autoencoder of patches, or without norms")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": net.encoder.conv_in.in_channels,
        "out_channels": net.decoder.conv_out.out_channels,
        "block_out_channels": [level.block[0].conv1.out_channels for level in levels],
        "layers_per_block": len(levels[0].block),
        "down_block_types": ["DownEncoderBlock2D"] * len(levels),
        "up_block_types": ["UpDecoderBlock2D"] * len(levels),
        "mid_block_add_attention": not isinstance(net.encoder.mid.attn_1, nn.Identity),
        "latent_channels": net.z_channels,
        "norm_num_groups": net.encoder.norm_out.num_groups,
        "scaling_factor": net.scale_factor,
    }


def _text_encoder_config(net: nn.Module) -> dict:
    clip = net.model
    layers = clip.transformer.resblocks
    vocab_size, width = clip.token_embedding.weight.shape
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": vocab_size,
        "max_position_embeddings": len(clip.positional_embedding),
        "hidden_size": width,
        "intermediate_size": layers[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(layers) - 1,  # the last is unused
        "num_attention_heads": layers[0].attn.num_heads,
        "hidden_act": "gelu",
    }


CONFIGS = {
    "unet": _unet_config,
    "branch": _branch_config,
    "autoencoder": _autoencoder_config,
    "text_encoder": _text_encoder_config,
}


def scheduler_json(diffusion: Diffusion) -> dict:
    """Contents of the scheduler_config.json with the same noise schedule and prediction."""
    return {
        "_class_name": "DDIMScheduler",
        "num_train_timesteps": diffusion.timesteps,
        "beta_schedule": "scaled_linear",
        "beta_start": diffusion.beta_start,
        "beta_end": diffusion.beta_end,
        "rescale_betas_zero_snr": bool(diffusion.alpha_bar[-1] == 0),
        "prediction_type": {"eps": "epsilon", "v": "v_prediction"}[diffusion.prediction],
        "timestep_spacing": "trailing",  # starts at the last step, as zero terminal SNR requires
        "clip_sample": False,
    }


SOURCES = {  # name in model_index.json -> library and class
    "unet": ["diffusers", "UNet2DConditionModel"],
    "controlnet": ["diffusers", "ControlNetModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


def model_index_json(present: Container[str], sampling: Mapping[str, Any]) -> dict:
    """Contents of the model_index.json with which `StableDiffusionControlNetPipeline` opens the folder.

    Args:
        present: components that are there, keys of `SOURCES`.
        sampling: options that the folder's own pipeline.py has other defaults for.
    """
    absent = [
        *(name for name in SOURCES if name not in present),
        "safety_checker",
        "feature_extractor",
        "image_encoder",
    ]
    return {
        "_class_name": "StableDiffusionControlNetPipeline",
        **{name: source for name, source in SOURCES.items() if name in present},
        **{name: [None, None] for name in absent},
        "requires_safety_checker": False,
        "sampling": dict(sampling),
    }


def tokenizer_files(encoder: Mapping[str, int], merges: Iterable[tuple[str, str]], length: int) -> dict[str, str]:
    """Name -> contents of the files from which CLIPTokenizer of transformers is built.

    Args:
        encoder: token -> number, with the two special ones at the end.
        merges: pairs of tokens that are joined, the first first.
        length: tokens of a prompt.
    """
    start, end = list(encoder)[-2:]
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": start,
        "eos_token": end,
        "unk_token": end,
        "pad_token": "!",  # number 0, with which OpenCLIP fills up prompts, and which Stable Diffusion 2 has here
        "model_max_length": length,
        "do_lower_case": True,
    }
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    return {
        "vocab.json": json.dumps(dict(encoder), ensure_ascii=False),
        "merges.txt": "\n".join(lines) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
