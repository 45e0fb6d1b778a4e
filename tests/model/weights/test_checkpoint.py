import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm
from torch.testing import assert_close

import diffbir.model.weights.checkpoint as checkpoint
from diffbir.model.networks.swinir import SwinIR
from diffbir.model.weights.checkpoint import CheckpointError, load_weights, read_state_dict, save_weights


def swinir(seed: int) -> SwinIR:
    torch.manual_seed(seed)
    return SwinIR(embed_dim=12, depths=[2], num_heads=[2], window_size=4, sf=1, upsampler="").eval()


@pytest.fixture
def source() -> SwinIR:
    return swinir(seed=0)


@pytest.fixture
def network() -> SwinIR:
    """Of the source's shape, with other weights."""
    return swinir(seed=1)


def write(state: dict[str, Tensor], path: Path) -> Path:
    save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return path


def assert_equal(state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert state.keys() == expected.keys()
    for key in state:
        assert_close(state[key], expected[key], rtol=0, atol=0, msg=key)


# Reading


@pytest.mark.parametrize("kind", ["safetensors", "bare", "state_dict", "legacy"])
def test_every_layout_of_a_weight_file_loads(kind, source, network, tmp_path):
    """`legacy` is what torch wrote before 1.6, as some published checkpoints still are."""
    state, path = source.state_dict(), tmp_path / "weights.ckpt"
    match kind:
        case "safetensors":
            save_file(state, path := path.with_suffix(".safetensors"))
        case "bare":
            torch.save(state, path)
        case "state_dict":
            torch.save({"state_dict": state, "global_step": 3, "optimizer_states": [{"lr": 0.1}]}, path)
        case "legacy":
            torch.save(state, path, _use_new_zipfile_serialization=False)
    x = torch.rand(1, 3, 8, 8)
    assert not torch.equal(network(x), source(x))
    assert load_weights(network, path) is network
    assert_equal(network.state_dict(), source.state_dict())
    assert_close(network(x), source(x), rtol=0, atol=0)


def test_half_precision_weights_load_into_a_float32_network(source, network, tmp_path):
    save_weights(source.state_dict(), tmp_path / "half.safetensors", torch.float16)
    load_weights(network, tmp_path / "half.safetensors")
    for key, value in network.state_dict().items():
        assert value.dtype == torch.float32
        assert_close(value, source.state_dict()[key].half().float(), rtol=0, atol=0)


def test_weights_survive_the_removal_of_their_file(source, network, tmp_path):
    """Torch files are mapped into memory; the network must hold its own copy."""
    path = write(source.state_dict(), tmp_path / "weights.pt")
    load_weights(network, path)
    path.write_bytes(bytes(path.stat().st_size))
    assert_equal(network.state_dict(), source.state_dict())


def test_published_files_with_derived_buffers_load(source, network, tmp_path):
    """SwinIR files carry masks and index tables; whatever they hold, the network computes its own."""
    block = "layers.0.residual_group.blocks.1"
    state = {
        **source.state_dict(),
        f"{block}.attn_mask": torch.full((4, 16, 16), 7.0),
        f"{block}.attn.relative_position_index": torch.zeros(16, 16, dtype=torch.int64),
    }
    load_weights(network, write(state, tmp_path / "published.pt"))
    x = torch.rand(1, 3, 8, 8)
    assert_close(network(x), source(x), rtol=0, atol=0)


# Files that cannot be used


@pytest.mark.parametrize("name", ["gone.safetensors", "gone.pt"])
def test_a_missing_file_is_named(network, tmp_path, name):
    with pytest.raises(CheckpointError, match=f"not found: {re.escape(str(tmp_path / name))}"):
        load_weights(network, tmp_path / name)


def test_a_folder_in_place_of_a_file_is_named(network, tmp_path):
    with pytest.raises(CheckpointError, match=re.escape(str(tmp_path))):
        load_weights(network, tmp_path)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.99])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_truncated_file_is_named(source, network, tmp_path, suffix, kept):
    path = write(source.state_dict(), tmp_path / f"cut{suffix}")
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data))])
    with pytest.raises(CheckpointError, match=re.escape(str(path)) + " is (damaged|empty)"):
        load_weights(network, path)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_a_text_file_is_named(network, tmp_path, suffix):
    """What is saved when a download answers with a page, or the large files of a git repository weren't fetched."""
    path = tmp_path / f"text{suffix}"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_weights(network, path)


class Payload:
    """Leaves a mark where it is unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f'touch "{self.mark}"',)


@pytest.mark.parametrize("kind", ["zip", "legacy", "pickle", "named safetensors", "inside a state dict"])
def test_code_in_a_file_is_refused_and_does_not_run(network, tmp_path, kind):
    mark, path = tmp_path / "mark", tmp_path / "evil.pt"
    payload = Payload(mark)
    match kind:
        case "zip":
            torch.save(payload, path)
        case "legacy":
            torch.save(payload, path, _use_new_zipfile_serialization=False)
        case "pickle":
            path.write_bytes(pickle.dumps(payload, protocol=2))
        case "named safetensors":
            (path := path.with_suffix(".safetensors")).write_bytes(pickle.dumps(payload))
        case "inside a state dict":
            torch.save({"state_dict": {**network.state_dict(), "extra": payload}}, path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_weights(network, path)
    assert not mark.exists()
    pickle.loads(pickle.dumps(payload))
    assert mark.exists(), "the payload must be one that works, or the test shows nothing"


@pytest.mark.parametrize(
    "content", [[torch.ones(1)], torch.ones(1), {}, {"a": 1}, {"a": {"b": torch.ones(1)}}, {"state_dict": [1]}, 7]
)
def test_a_file_without_a_state_dict_is_named(network, tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        load_weights(network, path)


# Files of another network


def broken(state: dict[str, Tensor], problem: str) -> dict[str, Tensor]:
    match problem:
        case "missing":
            del state["conv_first.weight"]
        case "unexpected":
            state["conv_second.weight"] = torch.zeros(1)
        case "of another shape":
            state["norm.weight"] = torch.zeros(24)
    return state


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    "problem, key",
    [("missing", "conv_first.weight"), ("unexpected", "conv_second.weight"), ("of another shape", "norm.weight")],
)
def test_a_key_that_does_not_fit_is_named_and_nothing_is_loaded(source, network, tmp_path, problem, key, suffix):
    path = write(broken(source.state_dict(), problem), tmp_path / f"other{suffix}")
    before = {k: v.clone() for k, v in network.state_dict().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(network, path)
    assert f"{path} does not fit SwinIR: 1 {problem} ({key}" in str(error.value)
    assert "missing" in problem or "missing" not in str(error.value)
    assert_equal(network.state_dict(), before)


def test_all_kinds_of_misfit_are_told_at_once(source, network, tmp_path):
    state = source.state_dict()
    for problem in ("missing", "unexpected", "of another shape"):
        state = broken(state, problem)
    with pytest.raises(CheckpointError, match=r"1 missing .*, 1 unexpected .*, 1 of another shape "):
        load_weights(network, write(state, tmp_path / "other.pt"))


def test_a_file_of_derived_buffers_alone_does_not_count_as_weights(network, tmp_path):
    path = write({"layers.0.attn_mask": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=f"{len(network.state_dict())} missing"):
        load_weights(network, path)


# Writing


def test_saved_weights_are_read_back_as_they_were(source, tmp_path):
    path = tmp_path / "new" / "folder" / "weights.safetensors"
    save_weights(source.state_dict(), path)
    assert_equal(read_state_dict(path), source.state_dict())
    assert os.listdir(path.parent) == [path.name]


def test_only_floating_point_tensors_change_their_type(tmp_path):
    state = {"float": torch.tensor([1 / 3, 65504.0]), "step": torch.tensor([2**40 + 1]), "mask": torch.tensor([True])}
    save_weights(state, tmp_path / "half.safetensors", torch.float16)
    half = load_file(tmp_path / "half.safetensors")
    assert_equal(half, {**state, "float": state["float"].half()})
    assert half["float"].dtype == torch.float16
    assert state["float"].dtype == torch.float32


def test_tensors_of_any_memory_layout_are_saved_by_value(tmp_path):
    x = torch.arange(2 * 3 * 4 * 5.0).view(2, 3, 4, 5)
    state = {
        "channels_last": x.to(memory_format=torch.channels_last),
        "transposed": x.transpose(0, 3),
        "view": x[:, ::2],
        "expanded": torch.ones(1).expand(3),
        "tied_a": x,
        "tied_b": x,
        "trained": nn.Parameter(x),
    }
    save_weights(state, tmp_path / "weights.safetensors")
    assert_equal(read_state_dict(tmp_path / "weights.safetensors"), {k: v.detach() for k, v in state.items()})


def test_on_the_meta_device_buffers_stay_buffers_and_parameters_keep_their_gradient(tmp_path):
    def network() -> nn.Module:  # spectral norm keeps its singular vectors in buffers
        frozen, normed = nn.Conv2d(2, 2, 1).requires_grad_(False), spectral_norm(nn.Conv2d(2, 4, 3))
        return nn.Sequential(frozen, normed)

    source = network()
    file = write(source.state_dict(), tmp_path / "network.safetensors")
    with torch.device("meta"):
        loaded = network()
    load_weights(loaded, file)
    assert_equal(loaded.state_dict(), source.state_dict())
    assert list(dict(loaded.named_buffers())) == list(dict(source.named_buffers())) != []
    gradients = [{name: p.requires_grad for name, p in n.named_parameters()} for n in (loaded, source)]
    assert gradients[0] == gradients[1]


def test_a_network_in_channels_last_is_saved_and_loaded(source, network, tmp_path):
    save_weights(source.to(memory_format=torch.channels_last).state_dict(), tmp_path / "weights.safetensors")
    assert_equal(load_weights(network, tmp_path / "weights.safetensors").state_dict(), source.state_dict())


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
def test_a_failed_write_leaves_the_old_file_and_no_part_of_the_new_one(source, tmp_path, monkeypatch, error):
    path = tmp_path / "weights.safetensors"
    old = {"a": torch.ones(2)}
    save_weights(old, path)

    def fail_halfway(state: dict[str, Tensor], part: Path) -> None:
        save_file(state, part)
        os.truncate(part, 100)
        raise error

    monkeypatch.setattr(checkpoint, "save_file", fail_halfway)
    with pytest.raises(type(error)):
        save_weights(source.state_dict(), path)
    assert os.listdir(tmp_path) == [path.name]
    assert_equal(read_state_dict(path), old)


def test_a_target_that_cannot_be_replaced_leaves_no_part(tmp_path):
    path = tmp_path / "weights.safetensors"
    path.mkdir()
    with pytest.raises(OSError):
        save_weights({"a": torch.ones(2)}, path)
    assert os.listdir(tmp_path) == [path.name]
