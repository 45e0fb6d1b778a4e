"""Whatever the size, tiles, batch and solver: the right size, finite, and the same for each image."""

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer
from diffbir.model.sampling.solvers import CHAINS, SPACINGS


@pytest.fixture(scope="module")
def restorer() -> Restorer:
    return Restorer.from_config(load_preset("mini", overrides=["sampling.solver=ddim"]))


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    height=st.integers(1, 90),
    width=st.integers(1, 90),
    tile=st.sampled_from([0, 32, 48, 80, 512]),
    solver=st.sampled_from(CHAINS),
    spacing=st.sampled_from(["auto", *SPACINGS]),
    steps=st.integers(1, 3),
    start=st.sampled_from([("noise", 999), ("latent", 999), ("latent", 250)]),
    guidance=st.sampled_from([0.0, 3e4]),
    every=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
)
@example(1, 1, 512, "ddpm", "auto", 2, ("noise", 999), 0.0, (1, 1))
@example(70, 50, 32, "unipc_3", "karras", 3, ("latent", 250), 3e4, (1, 2))
def test_any_image_any_way(restorer, height, width, tile, solver, spacing, steps, start, guidance, every):
    options = restorer.options(
        tile=tile,
        solver=solver,
        spacing=spacing,
        steps=steps,
        start=start[0],
        start_t=start[1],
        guidance_scale=guidance,
        branch_every=every[0],
        deep_every=every[1],
    )
    g = torch.Generator().manual_seed(height * 1000 + width)
    images, seeds = torch.rand(3, 3, height, width, generator=g), [4, 5, 6]
    together = restorer.restore(images, options, seeds).image
    assert together.shape == images.shape
    assert together.isfinite().all()
    split = [
        restorer.restore(images[:1], options, seeds[:1]).image,
        restorer.restore(images[1:], options, seeds[1:]).image,
    ]
    assert_close(torch.cat(split), together, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_a_large_image_in_small_tiles(restorer):
    image = torch.rand(1, 3, 450, 600, generator=torch.Generator().manual_seed(0))
    result = restorer.restore(image, restorer.options(steps=1, tile=128))
    assert result.image.shape == image.shape
    assert result.image.isfinite().all()
