"""Files are told by what they hold, whatever they are called; what they are instead is said, and nothing runs."""

import argparse
import gzip
import json
import pathlib
import pickle
import re
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from diffbir.model.weights.checkpoint import CheckpointError, find_weights, load_weights, read_state_dict
from diffbir.model.weights.diffusers_layout import COMPONENTS, find_component

State = dict[str, Tensor]


def network(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Linear(4, 2))


@pytest.fixture
def state() -> State:
    return network().state_dict()


def assert_loads(path: Path, state: State, role: str | None = None) -> None:
    loaded = load_weights(network(seed=1), path, role).state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize("name", ["a.ckpt", "a.pth", "a.bin", "a.SAFETENSORS", "a", "a.pt.safetensors"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "legacy"])
def test_the_name_says_nothing(state, tmp_path, name, kind):
    path = tmp_path / name
    match kind:
        case "safetensors":
            save_file(state, path)
        case "torch":
            torch.save(state, path)
        case "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
    assert_loads(path, state)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a2146" * 8 + b"\nsize 5214865159\n"


@pytest.mark.parametrize("name", ["a.safetensors", "a.pth"])
@pytest.mark.parametrize(
    "content, what",
    [
        (LFS, "is a git-LFS pointer, which stands for the file; fetch the file itself: git lfs pull"),
        (b"<!DOCTYPE html>\n<html><head><title>Sign in", "is a web page, which was saved in place of the file"),
        (b"\xef\xbb\xbf\n  <html lang=en>", "is a web page"),
        (b'<?xml version="1.0"?><Error><Code>AccessDenied</Code>', "is a web page"),
        (b"Entry not found\n", "is a text ('Entry not found')"),
        ("Zugriff verweigert: bitte später".encode(), "is a text ('Zugriff verweigert: bitte später')"),
        (b'{"error": "Repository not found"}', "is not weights, and not an index of their parts"),
        (b"", "is empty"),
        (gzip.compress(b"weights" * 99, mtime=0), "is a gzip archive; unpack it"),
        (b"GGUF\x03\0\0\0" + bytes(99), "is a GGUF file"),
        (b"\x89HDF\r\n\x1a\n" + bytes(99), "is an HDF5 file"),
        (bytes(range(256)) * 9, "is damaged or not a weight file"),
    ],
)
def test_what_lies_in_the_place_of_weights_is_said(tmp_path, name, content, what):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=re.escape(f"{path} {what}")) as error:
        load_weights(network(), path)
    assert "\n" not in str(error.value)


def test_an_archive_and_a_program_are_said(tmp_path):
    with zipfile.ZipFile(tmp_path / "zipped.pth", "w") as file:
        file.writestr("model.pth", b"weights")
    with pytest.raises(CheckpointError, match=r"zipped.pth is a zip archive of model.pth; unpack it"):
        load_weights(network(), tmp_path / "zipped.pth")
    torch.jit.trace(network()[0], torch.rand(1, 3, 5, 5)).save(tmp_path / "program.pt")
    with pytest.raises(CheckpointError, match=r"program.pt is a TorchScript program, which is not run"):
        load_weights(network(), tmp_path / "program.pt")


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "beside, entry, kind",
    [
        ({"best": np.float64(31.2)}, "best", r"numpy\._?core\.multiarray\.scalar"),
        ({"metrics": {"psnr": [1.0, np.float32(31.2)]}}, "metrics.psnr.1", r"numpy\._?core\.multiarray\.scalar"),
        ({"curve": np.ones(3)}, "curve", r"numpy\._?core\.multiarray\._reconstruct"),
        ({"args": argparse.Namespace(lr=0.1)}, "args", r"argparse\.Namespace"),
        ({"hyper": {"args": argparse.Namespace(lr=0.1)}}, "hyper.args", r"argparse\.Namespace"),
        ({"folder": pathlib.PurePosixPath("runs")}, "folder", r"pathlib\.PurePosixPath"),
        ({"callbacks": {nn.Linear: 1, "kind": nn.Linear}}, "callbacks.kind", r"torch\.nn\.modules\.linear\.Linear"),
    ],
)
def test_the_entry_that_is_refused_is_named(state, tmp_path, beside, entry, kind, legacy):
    path = tmp_path / "a.pth"
    torch.save({"epoch": 3, "state_dict": state, **beside}, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(
        CheckpointError, match=rf"its entry '{re.escape(entry)}' holds {kind}, which is refused"
    ) as error:
        load_weights(network(), path)
    assert f"weights_only=False), drop '{entry.partition('.')[0]}', torch.save the rest" in str(error.value)


def test_the_advice_for_a_refused_entry_works(state, tmp_path):
    torch.save({"state_dict": state, "args": argparse.Namespace(lr=0.1)}, tmp_path / "a.pth")
    content = torch.load(tmp_path / "a.pth", weights_only=False)
    del content["args"]
    torch.save(content, tmp_path / "plain.pth")
    assert_loads(tmp_path / "plain.pth", state)


def test_a_whole_network_is_refused_with_its_class(tmp_path):
    torch.save(network(), tmp_path / "a.pth")
    with pytest.raises(CheckpointError, match=r"a.pth holds torch.nn.modules.container.Sequential.*its state_dict\(\)"):
        load_weights(network(), tmp_path / "a.pth")


def test_looking_for_the_refused_entry_runs_nothing(tmp_path):
    """The first call is refused by torch; the message must not come from building what the pickle asks for."""

    class Payload:
        def __reduce__(self):
            return pathlib.Path.touch, (tmp_path / "mark",)

    path = tmp_path / "a.pth"
    path.write_bytes(pickle.dumps({"best": np.float64(1), "x": Payload()}, protocol=2))
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_weights(network(), path)
    assert not (tmp_path / "mark").exists()
    pickle.loads(path.read_bytes())
    assert (tmp_path / "mark").exists()


# Several files, folders


def split(state: State, folder: Path, stem: str, suffix: str, index: str) -> Path:
    """The state in two files and an index, as diffusers and transformers write large ones."""
    folder.mkdir(parents=True, exist_ok=True)
    keys, weight_map = list(state), {}
    for i, part in enumerate((keys[::2], keys[1::2]), start=1):
        name = f"{stem}-0000{i}-of-00002.{suffix}"
        content = {key: state[key] for key in part}
        save_file(content, folder / name) if suffix == "safetensors" else torch.save(content, folder / name)
        weight_map |= dict.fromkeys(part, name)
    (folder / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}, indent=2))
    return folder / index


SHARDED = [
    ("diffusion_pytorch_model", "safetensors", "diffusion_pytorch_model.safetensors.index.json"),
    ("diffusion_pytorch_model.fp16", "safetensors", "diffusion_pytorch_model.safetensors.index.fp16.json"),
    ("pytorch_model", "bin", "pytorch_model.bin.index.json"),
]


@pytest.mark.parametrize("stem, suffix, index", SHARDED)
@pytest.mark.parametrize("given", ["index", "sub-folder", "folder"])
def test_weights_in_several_files(state, tmp_path, stem, suffix, index, given):
    path = split(state, tmp_path / "unet", stem, suffix, index)
    assert_loads({"index": path, "sub-folder": path.parent, "folder": tmp_path}[given], state, "unet")
    assert read_state_dict(path).keys() == state.keys()


def test_a_missing_part_is_named(state, tmp_path):
    path = split(state, tmp_path, *SHARDED[0])
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"index.json names 2 files, and 1 of them are missing \(.*-00002-of-"):
        load_weights(network(), path)


def test_a_damaged_part_is_named(state, tmp_path):
    path = split(state, tmp_path, *SHARDED[0])
    (tmp_path / "diffusion_pytorch_model-00002-of-00002.safetensors").write_bytes(LFS)
    with pytest.raises(CheckpointError, match=r"-00002-of-00002.safetensors is a git-LFS pointer"):
        load_weights(network(), path)


ORDER = [  # each is preferred to those after it
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.fp16.safetensors",
    "diffusion_pytorch_model.bf16.safetensors",
    "diffusion_pytorch_model.nightly.safetensors",
    "diffusion_pytorch_model.non_ema.safetensors",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.fp16.bin",
    "diffusion_pytorch_model.bf16.bin",
]


def test_every_variant_is_found_and_the_best_taken(tmp_path):
    folder = tmp_path / "unet"
    folder.mkdir()
    (folder / "config.json").touch()
    (folder / "diffusion_pytorch_model-00001-of-00002.safetensors").touch()  # a part alone is nothing
    assert find_component(tmp_path, "unet") == folder / ORDER[0]
    for name in reversed(ORDER):
        (folder / name).touch()
        assert find_component(tmp_path, "unet") == folder / name
        assert find_weights(folder, "unet") == folder / name
        assert find_weights(folder / ORDER[-1], "unet") == folder / ORDER[-1]  # a file is what it is


@pytest.mark.parametrize("variant", ["bf16", "non_ema", "fp16", "anything"])
def test_variants_load_from_the_folder_and_its_part(state, tmp_path, variant):
    for role, component in COMPONENTS.items():
        path = (tmp_path / component).with_suffix(f".{variant}.safetensors")
        path.parent.mkdir()
        save_file({key: value.bfloat16() if variant == "bf16" else value for key, value in state.items()}, path)
        expected = {key: value.bfloat16().float() if variant == "bf16" else value for key, value in state.items()}
        assert_loads(tmp_path, expected, role)
        assert_loads(path.parent, expected, role)


def test_a_controlnet_is_found_by_folder_and_part(state, tmp_path):
    (tmp_path / "controlnet").mkdir()
    save_file(state, tmp_path / "controlnet" / "diffusion_pytorch_model.fp16.safetensors")
    assert_loads(tmp_path, state, "branch")
    assert_loads(tmp_path / "controlnet", state, "branch")
    shutil.rmtree(tmp_path / "controlnet")
    save_file(state, tmp_path / "branch.safetensors")
    assert_loads(tmp_path, state, "branch")
