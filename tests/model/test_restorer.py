"""The pipeline with the embedded model."""

import pytest
import torch
from torch.testing import assert_close

from model.restorer import Options, Restorer
from utils.cli import UserError
from utils.presets import load_preset


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    return Restorer.from_config(load_preset("mini"))


def photo(height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Smooth colours with an edge and noise."""
    g = torch.Generator().manual_seed(height * width)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, (x > y).float() * 0.8 + 0.1])
    return (image + 0.05 * torch.randn(batch, 3, height, width, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (33, 47), (64, 64)])
@pytest.mark.parametrize("upscale", [1.0, 1.5])
def test_output_size_is_input_size_times_upscale(restorer, size, upscale):
    result = restorer(photo(*size), restorer.options(steps=2, upscale=upscale))
    for image in (result.image, result.stage1, result.input):
        assert image.shape == (1, 3, round(size[0] * upscale), round(size[1] * upscale))
        assert image.isfinite().all()
        assert 0 <= image.min() <= image.max() <= 1


def test_an_image_does_not_depend_on_its_batch(restorer):
    images, options = torch.cat([photo(40, 56), photo(40, 56).flip(-1)]), restorer.options(steps=3, solver="ddpm")
    together = restorer(images, options, seeds=[5, 6]).image
    for i, seed in enumerate((5, 6)):
        assert_close(restorer(images[i : i + 1], options, seeds=[seed]).image[0], together[i], rtol=0, atol=1e-4)


def test_the_seed_fixes_the_result(restorer):
    def restore(seed):
        return restorer(photo(32, 32), restorer.options(steps=3, seed=seed)).image

    assert torch.equal(restore(1), restore(1))
    assert not torch.equal(restore(1), restore(2))


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_guidance_moves_the_result_monotonically_towards_stage_1(restorer, solver):
    """The distance of the sampled latent to E(I_reg); after decoding, the autoencoder's own error would be mixed in."""
    target = restorer.autoencoder.encode(restorer(photo(48, 48), restorer.options(stage="1")).image)
    distances = []
    for scale in (0, 2e3, 2e4, 2e5, 2e7):
        options, estimates = restorer.options(steps=5, solver=solver, guidance_scale=scale), []
        restorer(photo(48, 48), options, on_step=lambda i, z_0, estimates=estimates: estimates.append(z_0))
        distances.append((estimates[-1] - target).square().mean().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3 < distances[0]


def test_strong_guidance_ends_at_the_reconstruction_of_stage_1(restorer):
    options = restorer.options(steps=4, guidance_scale=1e12, color="none")
    result = restorer(photo(48, 48), options)
    reconstruction = restorer.autoencoder.decode(restorer.autoencoder.encode(result.stage1)).clamp(0, 1)
    assert_close(result.image, reconstruction, rtol=0, atol=1e-3)


def test_single_stages(restorer):
    x = photo(48, 48)
    first = restorer(x, restorer.options(stage="1"))
    assert torch.equal(first.image, first.stage1)
    assert_close(first.image, restorer.stage1(x).clamp(0, 1))
    second = restorer(x, restorer.options(stage="2", steps=2))
    assert_close(second.stage1, x)
    assert not torch.equal(second.image, x)


def test_large_images_are_sampled_in_windows_without_changing_small_ones(restorer):
    x = photo(96, 144)
    whole = restorer(x, restorer.options(steps=2, tile=0)).image
    assert torch.equal(restorer(x, restorer.options(steps=2, tile=144)).image, whole)
    windows = restorer(x, restorer.options(steps=2, tile=64)).image
    assert not torch.equal(windows, whole)
    assert (windows - whole).abs().mean() < 0.05


def test_bad_options_are_named():
    for changes, words in [
        (dict(steps=0), "steps must be at least 1"),
        (dict(solver="euler3"), "solver must be one of"),
        (dict(guidance_scale=-1.0), "guidance_scale must be at least 0"),
        (dict(upscale=99.0), "upscale must be at most 16"),
    ]:
        with pytest.raises(UserError, match=words):
            Options(**changes)


def test_an_unknown_sampling_key_is_named():
    config = load_preset("mini")
    config.sampling.stepz = 3
    with pytest.raises(UserError, match=r"sampling\.stepz"):
        Restorer.from_config(config)
