"""Additions of low rank: zero at the start, small to train, exact to merge."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from diffbir.model.networks.lora import add_lora, begin_lora, factors, merge_lora, merged
from diffbir.model.networks.unet import UNet

RANK = 2


def unet() -> UNet:
    torch.manual_seed(0)
    return UNet(
        num_res_blocks=1,
        model_channels=16,
        channel_mult=[1, 2],
        attention_factors=[1, 2],
        head_channels=8,
        context_dim=8,
        norm_groups=8,
    )


def inputs() -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(2, 4, 8, 8, generator=g), torch.tensor([3, 700]), torch.randn(2, 5, 8, generator=g)


def disturb(network: nn.Module) -> None:
    """As a training would: every addition is something else than zero."""
    g = torch.Generator().manual_seed(2)
    for p in network.parameters():
        if p.requires_grad:
            p.data += 0.1 * torch.randn(p.shape, generator=g)


def test_nothing_changes_at_the_start():
    assert torch.equal(unet()(*inputs()), add_lora(unet(), RANK)(*inputs()))


def test_merged_weights_compute_exactly_what_the_adapted_network_does():
    plain, adapted = unet(), add_lora(unet(), RANK)
    disturb(adapted)
    merged_into = unet()
    merged_into.load_state_dict(merged(adapted.state_dict()))  # the names of the network without additions
    output = adapted(*inputs())
    assert torch.equal(merged_into(*inputs()), output)
    assert (output - plain(*inputs())).abs().max() > 1e-2


def test_a_layer_adds_the_product_of_two_thin_matrices():
    layer = add_lora(nn.Sequential(nn.Conv2d(3, 6, 3, padding=1)), RANK)[0]
    addition = layer.parametrizations.weight[0]
    disturb(layer)
    x = torch.randn(1, 3, 5, 5)
    low = torch.nn.functional.conv2d(x, addition.down.view(RANK, 3, 3, 3), padding=1)
    added = torch.einsum("or,brhw->bohw", addition.up, low)
    original = torch.nn.functional.conv2d(x, layer.parametrizations.weight.original, layer.bias, padding=1)
    assert_close(layer(x), original + added)


def test_only_the_additions_are_trained_and_their_number_follows_from_the_rank():
    network = add_lora(unet(), RANK)
    layers = [m for m in unet().modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    expected = sum(min(RANK, *m.weight.flatten(1).shape) * sum(m.weight.flatten(1).shape) for m in layers)
    assert sum(p.numel() for p in network.parameters() if p.requires_grad) == expected
    assert {n.rsplit(".", 1)[1] for n, p in network.named_parameters() if p.requires_grad} == {"up", "down"}


def test_what_a_file_holds_makes_the_same_network_of_the_plain_one():
    """The names and shapes are those of PEFT: A of a convolution has its kernel, B is 1 x 1."""
    adapted = add_lora(unet(), RANK)
    disturb(adapted)
    additions = factors(adapted.state_dict(), adapted)
    assert additions["input_blocks.0.0.lora_A.weight"].shape == (RANK, 4, 3, 3)
    assert additions["input_blocks.0.0.lora_B.weight"].shape == (16, RANK, 1, 1)
    assert additions["time_embed.0.lora_A.weight"].shape == (RANK, 16)
    expected, plain = merged(adapted.state_dict()), unet().state_dict()
    whole, half = merge_lora(unet(), additions).state_dict(), merge_lora(unet(), additions, 0.5).state_dict()
    for key, value in expected.items():
        assert torch.equal(whole[key], value)
        assert_close(half[key], (plain[key] + value) / 2)


def test_additions_begin_with_those_of_a_file_of_any_rank():
    """Of a higher rank, the best approximation there is: what is lost are its smallest singular values."""
    trained = add_lora(unet(), RANK)
    disturb(trained)
    additions, output = factors(trained.state_dict(), trained), trained(*inputs())
    for rank in (RANK, RANK + 3):
        network = begin_lora(add_lora(unet(), rank), additions)
        assert_close(network(*inputs()), output)
        if rank > RANK:  # the new directions are free to go anywhere, and nothing yet
            addition = network.time_embed[0].parametrizations.weight[0]
            assert (addition.down[RANK:] != 0).all() and (addition.up[:, RANK:] == 0).all()
    smaller = begin_lora(add_lora(unet(), 1), additions)
    for name, layer in trained.named_modules():
        if parametrize.is_parametrized(layer, "weight"):
            whole, part = (
                addition.up @ addition.down
                for network in (trained, smaller)
                for addition in [network.get_submodule(name).parametrizations.weight[0]]
            )
            assert_close(torch.linalg.matrix_norm(whole - part), torch.linalg.svdvals(whole)[1], rtol=1e-3, atol=1e-5)


def test_additions_cannot_begin_where_there_are_none():
    adapted = add_lora(unet(), RANK)
    additions = factors(adapted.state_dict(), adapted)
    with pytest.raises(ValueError, match="is no layer of UNet"):
        begin_lora(unet(), additions)
    key = "time_embed.0.lora_B.weight"
    with pytest.raises(ValueError, match=r"'time_embed\.0', .* do not fit its weight, \(64, 16\)"):
        begin_lora(adapted, {**additions, key: additions[key][1:]})


def test_additions_that_do_not_fit_are_named():
    adapted = add_lora(unet(), RANK)
    additions = factors(adapted.state_dict(), adapted)
    with pytest.raises(ValueError, match="'nowhere' is no layer of UNet"):
        merge_lora(unet(), {"nowhere.lora_A.weight": torch.ones(1, 2), "nowhere.lora_B.weight": torch.ones(2, 1)})
    key = "time_embed.0.lora_B.weight"
    with pytest.raises(ValueError, match=r"'time_embed\.0', .* do not fit its weight, \(64, 16\)"):
        merge_lora(unet(), {**additions, key: additions[key][1:]})
    with pytest.raises(ValueError, match=r"'time_embed\.0' .* not both"):
        merge_lora(unet(), {k: v for k, v in additions.items() if k != key})
