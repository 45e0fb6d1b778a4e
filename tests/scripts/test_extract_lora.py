"""The difference of two sets of weights as additions of low rank."""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.testing import assert_close

from diffbir.model.build import with_additions
from diffbir.model.weights.checkpoint import save_weights
from tests.scripts.test_dataset_scripts import run


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(6, 9, 3), nn.GroupNorm(3, 9), nn.Conv2d(9, 2, 1), nn.Linear(5, 40))


def tuned(rank: int) -> tuple[nn.Module, nn.Module]:
    """A network, and what a training made of it: changes of this rank, biases and a norm too."""
    old, new = network(0), network(0)
    generator = torch.Generator().manual_seed(1)
    for p in new.parameters():
        change = torch.randn(p.shape, generator=generator)
        if p.ndim > 1:
            u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
            change = (0.01 * u[:, :rank] * s[:rank] @ v[:rank]).view_as(p)
        p.data += change
    return old, new


def save(folder, **networks: nn.Module):
    for name, own in networks.items():
        save_weights(own.state_dict(), folder / f"{name}.safetensors")
    return folder


@pytest.mark.parametrize("dtype, atol", [("fp32", 1e-6), ("fp16", 2e-5), ("fp8", 2e-3)])
def test_added_to_the_old_weights_they_give_the_new_ones(tmp_path, dtype, atol):
    old, new = tuned(2)
    folders = save(tmp_path / "old", unet=old, branch=old), save(tmp_path / "new", unet=new, branch=new)
    output = tmp_path / "change.safetensors"
    ranks = ["--rank", "unet=2", "branch=64"]
    assert run("extract_lora", *folders, *ranks, "--output", output, "--dtype", dtype) == 0
    stored = load_file(output)
    assert stored["unet.0.lora_A.weight"].shape == (2, 6, 3, 3)
    assert stored["unet.0.lora_B.weight"].shape == (9, 2, 1, 1)
    found = with_additions({"unet": old, "branch": old}, output, copied=True)
    for name in ("unet", "branch"):
        for key, value in new.state_dict().items():
            near = atol if value.ndim > 1 else 2e-3 if dtype != "fp32" else 0
            assert_close(found[name].state_dict()[key], value, rtol=0, atol=near)


def test_a_lower_rank_is_the_best_approximation_and_says_how_good(tmp_path, capsys):
    old, new = tuned(9)
    folders = save(tmp_path / "old", unet=old), save(tmp_path / "new", unet=new)
    assert run("extract_lora", *folders, "--rank", "unet=1", "--output", tmp_path / "a.safetensors") == 0
    found = with_additions({"unet": old}, tmp_path / "a.safetensors", copied=True)["unet"]
    kept = total = 0.0
    for layer in (0, 2, 3):
        change, own = (n[layer].weight.data - old[layer].weight.data for n in (new, found))
        kept, total = kept + float(own.square().sum()), total + float(change.square().sum())
        u, s, v = torch.linalg.svd(change.flatten(1), full_matrices=False)
        assert_close(own.flatten(1), s[0] * torch.outer(u[:, 0], v[0]), rtol=0, atol=1e-4)
    assert f"unet: {kept / total:.1%} of the change's energy" in capsys.readouterr().out
    assert 0.2 < kept / total < 0.9


def test_eight_bits_cost_little_whatever_the_size_of_a_change(tmp_path):
    """Far smaller and larger than what 8 bits hold by themselves."""
    for size in (1e-6, 1.0, 1e4):
        old, new = nn.Linear(64, 48), nn.Linear(64, 48)
        new.load_state_dict(old.state_dict())
        new.weight.data += size * torch.randn(48, 4) @ torch.randn(4, 64)
        change = new.weight.double() - old.weight.double()
        folders = (save(tmp_path / f"{size}{i}", unet=nn.Sequential(n)) for i, n in enumerate((old, new)))
        assert (
            run("extract_lora", *folders, "--rank", "unet=4", "--output", tmp_path / "a.safetensors", "--dtype", "fp8")
            == 0
        )
        zero = nn.Sequential(nn.Linear(64, 48))
        zero[0].weight.data.zero_()
        found = with_additions({"unet": zero}, tmp_path / "a.safetensors")["unet"][0].weight.double()
        assert (found - change).norm() / change.norm() < 0.05


def test_what_cannot_be_compared_is_refused(tmp_path, capsys):
    old, new = tuned(2)
    a, b = save(tmp_path / "a", unet=old), save(tmp_path / "b", unet=new[:1])
    output = ["--output", tmp_path / "out.safetensors"]
    assert run("extract_lora", a, b, "--rank", "unet=2", *output) == 1
    assert "differs between" in capsys.readouterr().err
    assert run("extract_lora", a, b, "--rank", "branch=2", *output) == 1
    assert "weights not found" in capsys.readouterr().err
    for rank in ("unet", "unet=0", "unet=x"):
        assert run("extract_lora", a, a, "--rank", rank, *output) == 1
        assert f"--rank {rank} must be" in capsys.readouterr().err
    assert run("extract_lora", a, a, "--rank", "unet=2", *output) == 1
    assert "no layer differs" in capsys.readouterr().err
    assert run("extract_lora", a, a, "--rank", "unet=2", "--output", tmp_path / "out.bin") == 1
    assert "is no .safetensors file" in capsys.readouterr().err
    save_weights({"unet.scale": torch.ones(2, 2), "unet.0.weight": torch.ones(2, 2)}, tmp_path / "c.safetensors")
    save_weights({"unet.scale": torch.zeros(2, 2), "unet.0.weight": torch.ones(2, 2)}, tmp_path / "d.safetensors")
    assert run("extract_lora", tmp_path / "c.safetensors", tmp_path / "d.safetensors", "--rank", "unet=2", *output) == 1
    assert "'scale' changed, which is no layer's weight or bias" in capsys.readouterr().err
    assert not (tmp_path / "out.safetensors").exists()
