"""The mean of weight files: of whole weights, and of what additions of low rank add."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from diffbir.model.weights.checkpoint import save_weights
from diffbir.model.weights.lora_file import write_lora
from tests.scripts.test_dataset_scripts import run

A, B = "unet.in.lora_A.weight", "unet.in.lora_B.weight"


def additions(seed: int, rank: int) -> dict[str, torch.Tensor]:
    """Of a convolution of 5 to 7 channels."""
    g = torch.Generator().manual_seed(seed)
    return {A: torch.randn(rank, 5, 3, 3, generator=g), B: torch.randn(7, rank, 1, 1, generator=g)}


def product(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.einsum("oryx,rihw->oihw", state[B], state[A])


def test_shares_of_whole_weights_count_relatively(tmp_path):
    one, other = ({"a": torch.full((2, 3), v), "b.c": torch.tensor([v, -v])} for v in (1.0, 5.0))
    for name, state in {"one": one, "other": other}.items():
        save_weights(state, tmp_path / f"{name}.safetensors", torch.float16)
    output = tmp_path / "new" / "mean.safetensors"
    files = f"{tmp_path}/one.safetensors:6", f"{tmp_path}/other.safetensors:2"
    assert run("average_weights", *files, "--output", output) == 0
    found = load_file(output)
    assert found["a"].dtype == torch.float16
    assert_close(found, {"a": torch.full((2, 3), 2.0).half(), "b.c": torch.tensor([2.0, -2.0]).half()})


@pytest.mark.parametrize("rank", [3, 5])
def test_the_mean_of_additions_is_that_of_what_they_add(tmp_path, rank):
    one, other = additions(0, rank), additions(1, 2)
    save_weights(one, tmp_path / "one.safetensors")
    save_weights(other, tmp_path / "other.safetensors")
    output = tmp_path / "mean.safetensors"
    assert run("average_weights", tmp_path / "one.safetensors", tmp_path / "other.safetensors", "--output", output) == 0
    found, expected = load_file(output), (product(one) + product(other)) / 2
    assert found[A].shape == one[A].shape and found[B].shape == one[B].shape
    u, s, v = torch.linalg.svd(expected.flatten(1), full_matrices=False)
    best = (u[:, :rank] * s[:rank] @ v[:rank]).view_as(expected)
    assert (best - expected).norm() > 0.01
    assert_close(product(found), best, rtol=1e-4, atol=1e-4)


def test_alphas_are_part_of_what_is_added(tmp_path):
    """Of files that differ in them, and of such in 8 bits, which stay in 8 bits."""
    one, other = additions(0, 3), additions(1, 3)
    save_weights({**one, "unet.in.alpha": torch.tensor(1.5)}, tmp_path / "one.safetensors")
    write_lora(other, tmp_path / "other.safetensors", torch.float8_e4m3fn)
    files = [tmp_path / f"{name}.safetensors" for name in ("one", "other")]
    u, s, v = torch.linalg.svd((0.5 * product(one) + product(other)).flatten(1) / 2, full_matrices=False)
    best = (u[:, :3] * s[:3] @ v[:3]).view(7, 5, 3, 3)
    for order in (files, files[::-1]):
        assert run("average_weights", *order, "--output", tmp_path / "mean.safetensors") == 0
        found = load_file(tmp_path / "mean.safetensors")
        coarse = order is not files
        assert (found[A].dtype == torch.float8_e4m3fn) == coarse and ("unet.in.alpha" in found) == coarse
        scale = float(found.get("unet.in.alpha", 3.0)) / 3
        own = {key: value.float() for key, value in found.items()}
        assert (scale * product(own) - best).norm() < (0.1 if coarse else 0.05) * best.norm()


def test_files_of_other_networks_are_refused(tmp_path, capsys):
    for name, state in {
        "one": additions(0, 3),
        "wider": {A: torch.ones(3, 6, 3, 3), B: torch.ones(7, 3, 1, 1)},
        "more": {**additions(0, 3), "alpha": torch.ones(1)},
    }.items():
        save_weights(state, tmp_path / f"{name}.safetensors")
    output = tmp_path / "mean.safetensors"
    for other, message in {
        "wider": rf"'{A}' is (3, 6, 3, 3) in {tmp_path}/wider.safetensors and (3, 5, 3, 3) in ",
        "more": f"'alpha' is in one of {tmp_path}/one.safetensors and {tmp_path}/more.safetensors only",
        "none": f"weights not found: {tmp_path}/none.safetensors",
        "one.safetensors:-1": "shares add up to 0",
    }.items():
        file = f"{tmp_path}/{other}" + ("" if ":" in other else ".safetensors")
        assert run("average_weights", tmp_path / "one.safetensors", file, "--output", output) == 1
        assert message in capsys.readouterr().err
    save_weights({A: torch.ones(1, 5, 3, 3)}, tmp_path / "one.safetensors")
    assert run("average_weights", tmp_path / "one.safetensors", "--output", output) == 1
    assert f"{tmp_path}/one.safetensors: only one of the factors of 'unet.in' is there" in capsys.readouterr().err
    assert run("average_weights", tmp_path / "one.safetensors", "--output", tmp_path / "mean.ckpt") == 1
    assert "is no .safetensors file" in capsys.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["more.safetensors", "one.safetensors", "wider.safetensors"]
