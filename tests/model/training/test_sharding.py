"""Two processes (gloo) that share the weights of a network."""

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.swinir import SwinIR
from diffbir.model.training.sharding import ON_CPU, shard, sharded_like, whole
from tests.forks import CONTEXT

pytestmark = pytest.mark.skipif(not ON_CPU, reason="needs torch 2.9")


def restore(network: nn.Module, image: Tensor) -> Tensor:
    return network(image)


def reconstruct(network: nn.Module, image: Tensor) -> Tensor:
    return network.reconstruct(network.posterior(image).mean)


CASES = {
    "forward": (restore, SwinIR, {"embed_dim": 24, "depths": [2], "num_heads": [2], "sf": 4, "unshuffle_scale": 4}),
    "other methods": (reconstruct, AutoencoderKL, {"channels": 16, "channel_mult": [1, 2], "norm_groups": 4}),
}


def check(rank: int, store: Path, case: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    call, network, sizes = CASES[case]
    network = network(**sizes).to(memory_format=torch.channels_last)
    images = torch.rand(2, 3, 32, 32)
    reference = copy.deepcopy(network)
    shard(network, init_device_mesh("cpu", (2,)))

    weights = dict(network.named_parameters())
    assert all(isinstance(p, DTensor) for p in weights.values())
    held = sum(p.to_local().numel() for p in weights.values())
    assert held < 0.6 * sum(p.numel() for p in reference.parameters())

    assert_close(call(network, images), call(reference, images))
    call(network, images[rank : rank + 1]).square().mean().backward()  # each rank its image: the mean of both
    call(reference, images).square().mean().backward()
    for name, p in reference.named_parameters():
        assert_close(whole(weights[name].grad), p.grad, msg=name)
        assert_close(whole({"x": [weights[name]]})["x"][0], p, rtol=0, atol=0)
        share = sharded_like(p.detach(), weights[name])
        assert torch.equal(share.to_local(), weights[name].to_local())
    dist.destroy_process_group()


def check_half(rank: int, store: Path, case: str) -> None:
    """Weights travel and compute in bf16; what is kept, and its gradient, is float32."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    torch.manual_seed(0)
    call, network, sizes = CASES[case]
    network, images = network(**sizes), torch.rand(2, 3, 32, 32)
    reference, seen = copy.deepcopy(network), []
    shard(network, init_device_mesh("cpu", (2,)), torch.bfloat16)
    layer = next(m for m in network.modules() if isinstance(m, nn.Conv2d))
    layer.register_forward_pre_hook(lambda module, _: seen.append(module.weight.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        output, expected = call(network, images).float(), call(reference, images).float()
    assert set(seen) == {torch.bfloat16}
    assert_close(output, expected, rtol=0, atol=0.05)
    assert (output - images).abs().max() > 0.05
    output.square().mean().backward()
    for p in network.parameters():
        assert p.dtype == p.grad.dtype == torch.float32
    dist.destroy_process_group()


@pytest.mark.parametrize("case, check", [*((case, check) for case in CASES), ("forward", check_half)])
def test_a_shared_network_computes_what_the_whole_one_does(case, check, tmp_path):
    processes = [CONTEXT.Process(target=check, args=(rank, tmp_path / "store", case)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
