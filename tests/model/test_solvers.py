"""Solvers against golden trajectories and closed forms, with an exact denoiser for Gaussian data."""

from itertools import count, pairwise

import pytest
import torch
from torch.testing import assert_close

from model.diffusion import Diffusion
from model.solvers import (
    SOLVERS,
    ddim,
    ddpm,
    dpmpp_2m,
    leading_timesteps,
    posterior,
    sample,
    spaced_timesteps,
    trailing_timesteps,
)
from tests.golden.fill import data

SHAPE = (2, 4, 8, 6)
EPS, V = Diffusion(), Diffusion(prediction="v", zero_terminal_snr=True)


def gaussian_denoiser(alpha_bar, mean, variance=0.25):
    """E[z_0 | z_t] for z_0 ~ N(mean, variance)."""

    def denoise(z_t, t):
        a2 = alpha_bar[t]
        a = a2**0.5
        return mean + a * variance / (a2 * variance + 1 - a2) * (z_t - a * mean)

    return denoise


def golden_denoiser(alpha_bar, text="toy_c_txt"):
    return gaussian_denoiser(alpha_bar, data("toy_c_img", SHAPE) + 0.1 * data(text, (2, 77, 8)).mean())


def golden_noise():
    steps = count()
    return lambda: data(f"step_noise_{next(steps)}", SHAPE)


def run(solver, denoise, alpha_bar, timesteps):
    return solver(denoise, data("toy_x_T", SHAPE), alpha_bar, timesteps, golden_noise(), lambda i, z_0: None)


@pytest.mark.parametrize("n", [4, 10, 50])
def test_timesteps_and_posterior_variances_are_the_published_ones(n, numerics_golden):
    spaced = spaced_timesteps(1000, n)
    assert spaced[-2::-1] == numerics_golden[f"spaced_timesteps_{n}"].tolist()
    assert leading_timesteps(1000, n)[-2::-1] == numerics_golden[f"ddim_timesteps_{n}"].tolist()
    assert trailing_timesteps(1000, n)[:-1] == numerics_golden[f"edm_timesteps_{n}"].tolist()[:-1]
    variances = [posterior(EPS.alpha_bar, t, s)[2] for t, s in pairwise(spaced)][::-1]
    golden = numerics_golden[f"spaced_posterior_variance_{n}"]
    assert_close(torch.tensor(variances), golden, rtol=0, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("n", [4, 50])
def test_spaced_ddpm_trajectory(n, numerics_golden):
    z = run(ddpm, golden_denoiser(EPS.alpha_bar), EPS.alpha_bar, spaced_timesteps(1000, n))
    assert_close(z, numerics_golden[f"spaced_eps_{n}"], rtol=0, atol=1e-5)


def test_spaced_ddpm_trajectory_with_classifier_free_guidance(numerics_golden):
    positive, negative = golden_denoiser(EPS.alpha_bar), golden_denoiser(EPS.alpha_bar, "toy_u_txt")

    def guided(z, t):
        return negative(z, t) + 4 * (positive(z, t) - negative(z, t))

    z = run(ddpm, guided, EPS.alpha_bar, spaced_timesteps(1000, 10))
    assert_close(z, numerics_golden["spaced_eps_10_cfg4"], rtol=0, atol=1e-5)


def test_spaced_ddpm_trajectory_at_zero_terminal_snr(numerics_golden):
    z = run(ddpm, golden_denoiser(V.alpha_bar), V.alpha_bar, spaced_timesteps(1000, 10))
    assert_close(z, numerics_golden["spaced_v_zsnr_10"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [4, 50])
def test_ddim_trajectory(n, numerics_golden):
    z = run(ddim, golden_denoiser(EPS.alpha_bar), EPS.alpha_bar, leading_timesteps(1000, n))
    assert_close(z, numerics_golden[f"ddim_eps_{n}"], rtol=0, atol=1e-5)


def test_dpmpp_2m_trajectory(numerics_golden):
    z = run(dpmpp_2m, golden_denoiser(V.alpha_bar), V.alpha_bar, trailing_timesteps(1000, 10))
    assert_close(z, numerics_golden["edm_dpmpp_2m_v_zsnr_10_eta0"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("t, s", [(999, 979), (500, 3), (20, 0), (5, -1)])
def test_posterior_keeps_the_forward_marginal(t, s):
    """Integrating out z_t must leave q(z_s | z_0)."""
    c_0, c_t, var = posterior(EPS.alpha_bar, t, s)
    a_t, a_s = EPS.alpha_bar[t], EPS.alpha_bar[s] if s >= 0 else 1.0
    assert c_0 + c_t * a_t**0.5 == pytest.approx(a_s**0.5, abs=1e-12)
    assert c_t**2 * (1 - a_t) + var == pytest.approx(1 - a_s, abs=1e-12)


def test_ddim_with_eta_1_on_neighbouring_steps_is_ddpm():
    timesteps = [*range(999, -1, -1), -1]
    denoise = golden_denoiser(EPS.alpha_bar)
    z_T, generator = data("toy_x_T", SHAPE), torch.Generator()

    def noise():
        return torch.randn(SHAPE, generator=generator)

    results = []
    for solver, kwargs in ((ddpm, {}), (ddim, {"eta": 1.0})):
        generator.manual_seed(0)
        results.append(solver(denoise, z_T, EPS.alpha_bar, timesteps, noise, lambda i, z_0: None, **kwargs))
    assert_close(*results, rtol=0, atol=1e-3)


@pytest.mark.parametrize("solver, order", [("ddim", 1), ("dpmpp_2m", 2)])
def test_deterministic_solvers_converge_at_their_order(solver, order):
    """Doubling the steps divides the error by 2^order. The exact flow maps N(0, 1) to N(mean, variance) affinely.

    Measured inside the schedule (t = 640 to 320) in float64, where its steep ends don't hide the order.
    """
    alpha_bar, mean, variance = EPS.alpha_bar, 0.3, 0.25
    denoise = gaussian_denoiser(alpha_bar, mean, variance)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def std(t):
        return (alpha_bar[t] * variance + 1 - alpha_bar[t]) ** 0.5

    exact = alpha_bar[320] ** 0.5 * mean + std(320) / std(640) * (z - alpha_bar[640] ** 0.5 * mean)
    run_solver = SOLVERS[solver].run
    errors = []
    for n in (10, 20, 40, 80):
        timesteps = [640 - 320 * i // n for i in range(n + 1)]
        end = run_solver(denoise, z, alpha_bar, timesteps, lambda: 0, lambda i, z_0: None)
        errors.append((end - exact).abs().max().item())
    for coarse, fine in pairwise(errors):
        assert coarse / fine == pytest.approx(2**order, rel=0.05)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("diffusion", [EPS, V], ids=["eps", "zero_terminal_snr"])
def test_every_solver_reaches_the_data_distribution(solver, diffusion):
    """1000 steps from the true z_T: mean and standard deviation of 20,000 samples within 3 % of the data's."""
    rng = torch.Generator().manual_seed(0)
    z_0 = 0.8 + 0.5 * torch.randn(20000, 1, 1, 1, generator=rng)
    z_T = diffusion.diffuse(z_0, torch.full((20000,), 999), torch.randn(z_0.shape, generator=rng))
    noise_rng = torch.Generator().manual_seed(1)
    z = sample(
        solver,
        gaussian_denoiser(diffusion.alpha_bar, 0.8),
        z_T,
        diffusion.alpha_bar,
        1000,
        lambda: torch.randn(z_T.shape, generator=noise_rng),
    )
    assert z.mean().item() == pytest.approx(0.8, rel=0.03)
    assert z.std().item() == pytest.approx(0.5, rel=0.03)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000])
def test_any_number_of_steps_is_finite_and_reported(solver, steps):
    seen = []
    z = sample(
        solver,
        golden_denoiser(V.alpha_bar),
        data("toy_x_T", SHAPE),
        V.alpha_bar,
        steps,
        lambda: torch.zeros(SHAPE),
        lambda i, z_0: seen.append(i),
    )
    assert z.isfinite().all()
    assert seen == list(range(steps))


def test_bad_requests_are_named():
    z = data("toy_x_T", SHAPE)
    with pytest.raises(ValueError, match="unknown solver 'euler3'"):
        sample("euler3", golden_denoiser(EPS.alpha_bar), z, EPS.alpha_bar, 4, lambda: z)
    with pytest.raises(ValueError, match="steps must lie in"):
        sample("ddim", golden_denoiser(EPS.alpha_bar), z, EPS.alpha_bar, 1001, lambda: z)
