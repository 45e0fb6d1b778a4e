"""The pipeline with the embedded model."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffbir.model.build import build_networks
from diffbir.model.options import Options
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.solvers import SPACINGS, timesteps_for
from diffbir.utils.cli import UserError
from diffbir.utils.precision import PRECISIONS, dtype_of


def chain(**kwargs) -> Restorer:
    """By sampling, not in one step."""
    return Restorer.from_config(load_preset("mini", overrides=["sampling.solver=ddim"]), **kwargs)


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    return chain()


def photo(height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Smooth colours with an edge and noise."""
    g = torch.Generator().manual_seed(height * width)
    y, x = torch.meshgrid(torch.linspace(0, 1, height), torch.linspace(0, 1, width), indexing="ij")
    image = torch.stack([x, y, (x > y).float() * 0.8 + 0.1])
    return (image + 0.05 * torch.randn(batch, 3, height, width, generator=g)).clamp(0, 1)


@pytest.mark.parametrize("size", [(1, 1), (3, 50), (33, 47), (64, 64)])
@pytest.mark.parametrize("upscale", [1.0, 1.5])
def test_output_size_is_input_size_times_upscale(restorer, size, upscale):
    result = restorer.restore(photo(*size), restorer.options(steps=2, upscale=upscale))
    for image in (result.image, result.stage1, result.input):
        assert image.shape == (1, 3, round(size[0] * upscale), round(size[1] * upscale))
        assert image.isfinite().all()
        assert 0 <= image.min() <= image.max() <= 1


def test_an_image_does_not_depend_on_its_batch(restorer):
    images, options = torch.cat([photo(40, 56), photo(40, 56).flip(-1)]), restorer.options(steps=3, solver="ddpm")
    together = restorer.restore(images, options, seeds=[5, 6]).image
    for i, seed in enumerate((5, 6)):
        assert_close(
            restorer.restore(images[i : i + 1], options, seeds=[seed]).image[0], together[i], rtol=0, atol=1e-4
        )


def test_the_seed_fixes_the_result(restorer):
    def restore(seed):
        return restorer.restore(photo(32, 32), restorer.options(steps=3, seed=seed)).image

    assert torch.equal(restore(1), restore(1))
    assert not torch.equal(restore(1), restore(2))


@pytest.mark.parametrize("solver", ["ddpm", "ddim", "dpmpp_2m"])
def test_guidance_moves_the_result_monotonically_towards_stage_1(restorer, solver):
    """The distance of the sampled latent to E(I_reg); after decoding, the autoencoder's own error would be mixed in."""
    target = restorer.autoencoder.encode(restorer.restore(photo(48, 48), restorer.options(stage="1")).image)
    distances = []
    for scale in (0, 2e3, 2e4, 2e5, 2e7):
        options, estimates = restorer.options(steps=5, solver=solver, guidance_scale=scale), []
        restorer.restore(photo(48, 48), options, on_step=lambda i, z_0, estimates=estimates: estimates.append(z_0))
        distances.append((estimates[-1] - target).square().mean().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 1e-3 < distances[0]


def test_the_dial_of_one_step_ends_at_stage_1_to_the_pixel():
    restorer = Restorer.from_preset("mini", device="cpu")
    options = restorer.options()
    assert (options.solver, options.steps, options.residual) == ("one_step", 1, 1.0)
    distances = []
    for scale in (0, 1e3, 1e4, 1e5, 1e6, 1e12):
        result = restorer.restore(photo(48, 48), restorer.options(guidance_scale=scale))
        distances.append((result.image - result.stage1).abs().mean().item())
    assert distances == sorted(distances, reverse=True)
    assert distances[0] > 0.005 and distances[-1] < 1e-5


@pytest.mark.parametrize("residual", [0.0, 0.5, 1.0])
def test_strong_guidance_ends_at_stage_1_but_for_what_the_autoencoder_loses(restorer, residual):
    options = restorer.options(steps=4, guidance_scale=1e12, color="none", residual=residual)
    result = restorer.restore(photo(48, 48), options)
    reconstruction = restorer.autoencoder.decode(restorer.autoencoder.encode(result.stage1))
    expected = torch.lerp(reconstruction, result.stage1, residual).clamp(0, 1)
    assert_close(result.image, expected, rtol=0, atol=1e-3)
    assert (reconstruction - result.stage1).abs().max() > 0.01


def test_single_stages(restorer):
    x = photo(48, 48)
    first = restorer.restore(x, restorer.options(stage="1"))
    assert torch.equal(first.image, first.stage1)
    assert_close(first.image, restorer.stage1(x).clamp(0, 1))
    second = restorer.restore(x, restorer.options(stage="2", steps=2))
    assert_close(second.stage1, x)
    assert not torch.equal(second.image, x)


def test_large_images_are_sampled_in_windows_without_changing_small_ones(restorer):
    x = photo(96, 144)
    whole = restorer.restore(x, restorer.options(steps=2, tile=0)).image
    assert torch.equal(restorer.restore(x, restorer.options(steps=2, tile=144)).image, whole)
    windows = restorer.restore(x, restorer.options(steps=2, tile=64)).image
    assert not torch.equal(windows, whole)
    assert (windows - whole).abs().mean() < 0.05


@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(steps=0), "steps must be at least 1, not 0"),
        (dict(steps=10.5), "steps must be a whole number, not 10.5"),
        (dict(steps="10"), "steps must be a whole number, not '10'"),
        (dict(steps=None), "steps must be a whole number, not None"),
        (dict(steps=True), "steps must be a whole number, not True"),
        (dict(steps=10, start="latent", start_t=8), "steps must be at most 9 with start_t 8 and spacing auto, not 10"),
        (dict(steps=1000, spacing="leading"), "steps must be at most 999 with start_t 999 and spacing leading"),
        (dict(seed=1.5), "seed must be a whole number, not 1.5"),
        (dict(seed=2**64), "seed must be at most"),
        (dict(eta=5, solver="ddim"), "eta must be at most 1, not 5"),
        (dict(eta=-0.5, solver="ddim"), "eta must be -1"),
        (dict(guidance_region="false"), "guidance_region must be true or false, not 'false'"),
        (dict(guidance_region=1), "guidance_region must be true or false, not 1"),
        (dict(guidance_region=None), "guidance_region must be true or false, not None"),
        (dict(guidance_scale=-1.0), "guidance_scale must be at least 0"),
        (dict(guidance_scale=float("nan")), "guidance_scale must be a number, not nan"),
        (dict(guidance_scale=float("inf")), "guidance_scale must be a number, not inf"),
        (dict(guidance_start=100, guidance_stop=200), "guidance_start must be at least guidance_stop"),
        (dict(upscale=99.0), "upscale must be at most 16"),
        (dict(upscale="4"), "upscale must be a number, not '4'"),
        (dict(upscale=True), "upscale must be a number, not True"),
        (dict(solver="euler3"), "solver must be one of"),
        (dict(solver=["ddim"]), "solver must be text"),
        (dict(stage=1), "stage must be text, not 1"),
        (dict(prompt=None), "prompt must be text, not None"),
    ],
)
def test_bad_options_are_named(changes, words):
    with pytest.raises(UserError, match=words) as error:
        Options(**changes)
    assert "\n" not in str(error.value)


def test_no_option_takes_another_type():
    for spec in fields(Options):
        for value in (None, [], {}, b"1", object(), 1j):
            with pytest.raises(UserError, match=f"{spec.name} must be"):
                Options(**{spec.name: value})


def test_numbers_of_numpy_are_options_too(restorer):
    options = Options(steps=np.int64(2), seed=np.uint8(3), guidance_scale=np.float32(3000), upscale=1, solver="ddim")
    assert options == Options(steps=2, seed=3, guidance_scale=3000.0, upscale=1.0, solver="ddim")
    kinds = {type(getattr(options, spec.name)) for spec in fields(Options)}
    assert kinds == {int, float, str, bool}
    assert torch.equal(restorer.restore(photo(32, 32), options).image, restorer.restore(photo(32, 32), options).image)


def test_the_most_steps_that_are_allowed_can_be_sampled():
    for spacing in ("auto", *SPACINGS):
        for start_t in (1, 5, 999):
            steps = start_t + (spacing != "leading")
            options = Options(start="latent", start_t=start_t, steps=steps, spacing=spacing)
            alpha_bar = Diffusion().alpha_bar[: start_t + 1]
            timesteps = timesteps_for(options.solver, alpha_bar, steps, None if spacing == "auto" else spacing)
            assert len(timesteps) == steps + 1


def test_an_unknown_sampling_key_is_named():
    config = load_preset("mini")
    config.sampling.stepz = 3
    with pytest.raises(UserError, match=r"sampling\.stepz"):
        Restorer.from_config(config)


# Precision and memory


@pytest.mark.parametrize("precision, tolerance", [("bf16", 0.02), ("fp16", 0.005)])
def test_half_precision_stays_close_to_float32(restorer, precision, tolerance):
    """Mean difference over the picture after a few deterministic steps."""
    half = chain(precision=precision)
    assert dtype_of(half.network) == dtype_of(half.stage1) == PRECISIONS[precision]
    assert dtype_of(half.autoencoder) == (torch.float32 if precision == "fp16" else torch.bfloat16)
    x, options = photo(40, 56), restorer.options(steps=3)
    result = half.restore(x, options)
    assert result.image.dtype == torch.float32
    assert (result.image - restorer.restore(x, options).image).abs().mean() < tolerance


@pytest.mark.parametrize("part", ["stage1", "network", "autoencoder"])
def test_what_overflows_in_half_precision_is_computed_again_in_float32(restorer, part, caplog):
    """The first weights scaled so far that what follows passes fp16's range; norms bring it back in float32."""
    broken = chain(precision="fp16")
    broken.autoencoder = build_networks(load_preset("mini"), ["autoencoder"])["autoencoder"].half()
    module = getattr(broken, part)
    first = {
        "stage1": lambda: module.conv_first[1],
        "network": lambda: module.unet.input_blocks[0][0],
        "autoencoder": lambda: module.decoder.conv_in,
    }[part]()
    with torch.no_grad():
        first.weight.mul_(60000)
    x, options = photo(40, 56), restorer.options(steps=2)
    result = broken.restore(x, options)
    assert result.image.isfinite().all()
    assert dtype_of(module) == torch.float32
    assert "overflows in torch.float16; it goes on in float32" in caplog.text


def test_offloading_changes_where_networks_rest_and_nothing_else(restorer):
    """The meta device would lose weights; the CPU itself stands for a GPU, and moves are watched."""
    offloaded = chain(offload=True)
    moves = []
    for name in ("stage1", "autoencoder", "text_encoder", "network"):
        module = getattr(offloaded, name)
        module.register_module("probe", Probe(name, moves))
    x, options = photo(40, 56), restorer.options(steps=2)
    assert torch.equal(offloaded.restore(x, options).image, restorer.restore(x, options).image)
    order = ["stage1", "autoencoder", "text_encoder", "network", "autoencoder"]
    assert moves == [name for name in order for _ in ("to the device", "back")]


class Probe(torch.nn.Module):
    """Writes down when the module that it is part of is moved."""

    def __init__(self, name, moves):
        super().__init__()
        self.name, self.moves = name, moves

    def _apply(self, fn, recurse=True):
        self.moves.append(self.name)
        return super()._apply(fn, recurse)


def test_small_images_are_enlarged_for_stage_2_and_come_back(restorer):
    x, sizes = photo(20, 30), []
    options = restorer.options(steps=2, min_side=64)
    result = restorer.restore(x, options, on_step=lambda i, z_0: sizes.append(tuple(z_0.shape[-2:])))
    assert sizes == [(16, 24), (16, 24)]  # 64 x 96 pixels over the autoencoder's factor
    assert result.image.shape == x.shape


def test_a_stage_1_that_enlarges_sees_the_image_before_it_is_enlarged(restorer):
    class Fourfold(torch.nn.Module):
        scale = 4

        def forward(self, x):
            self.seen = x.shape
            return torch.nn.functional.interpolate(x, scale_factor=4.0, mode="nearest")

    stage1 = Fourfold()
    x = photo(10, 12)
    result = Restorer(stage1).restore(x, Options(stage="1", upscale=4))
    assert stage1.seen == x.shape
    assert torch.equal(result.image, torch.nn.functional.interpolate(x, scale_factor=4.0, mode="nearest"))
    assert Restorer(stage1).restore(x, Options(stage="1", upscale=2)).image.shape == (1, 3, 20, 24)
