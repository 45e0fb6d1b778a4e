"""Solvers against golden trajectories and closed forms, with an exact denoiser for Gaussian data."""

from itertools import count, pairwise

import diffusers
import pytest
import torch
from torch.testing import assert_close

from diffbir.model.networks.condition import Condition
from diffbir.model.options import Options
from diffbir.model.restorer import Restorer
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.model.sampling.schedule import alpha_bar_at, sigma_of, timestep_of
from diffbir.model.sampling.solvers import (
    CHAINS,
    SOLVERS,
    SPACINGS,
    ddim,
    ddpm,
    leading_timesteps,
    posterior,
    sample,
    spaced_timesteps,
    trailing_timesteps,
    unipc,
)
from tests.golden.fill import data

SHAPE = (2, 4, 8, 6)
EPS, V = Diffusion(), Diffusion(prediction="v", zero_terminal_snr=True)


def gaussian_denoiser(alpha_bar, mean, variance=0.25):
    """E[z_0 | z_t] for z_0 ~ N(mean, variance)."""

    def denoise(z_t, t):
        a2 = alpha_bar_at(alpha_bar, t)
        a = a2**0.5
        return mean + a * variance / (a2 * variance + 1 - a2) * (z_t - a * mean)

    return denoise


def golden_denoiser(alpha_bar, text="toy_c_txt"):
    return gaussian_denoiser(alpha_bar, data("toy_c_img", SHAPE) + 0.1 * data(text, (2, 77, 8)).mean())


def golden_noise():
    steps = count()
    return lambda: data(f"step_noise_{next(steps)}", SHAPE)


def run(solver, denoise, alpha_bar, timesteps, **options):
    z_T = data("toy_x_T", SHAPE)
    return solver(denoise, z_T, alpha_bar, timesteps, golden_noise(), lambda i, z_0: None, **options)


@pytest.mark.parametrize("n", [4, 10, 50])
def test_timesteps_and_posterior_variances_are_the_published_ones(n, numerics_golden):
    spaced = spaced_timesteps(EPS.alpha_bar, n)
    assert spaced[-2::-1] == numerics_golden[f"spaced_timesteps_{n}"].tolist()
    assert leading_timesteps(EPS.alpha_bar, n)[-2::-1] == numerics_golden[f"ddim_timesteps_{n}"].tolist()
    assert trailing_timesteps(EPS.alpha_bar, n)[:-1] == numerics_golden[f"edm_timesteps_{n}"].tolist()[:-1]
    variances = [posterior(EPS.alpha_bar, t, s)[2] for t, s in pairwise(spaced)][::-1]
    golden = numerics_golden[f"spaced_posterior_variance_{n}"]
    assert_close(torch.tensor(variances), golden, rtol=0, atol=1e-7, check_dtype=False)


@pytest.mark.parametrize("n", [4, 50])
def test_spaced_ddpm_trajectory(n, numerics_golden):
    z = run(ddpm, golden_denoiser(EPS.alpha_bar), EPS.alpha_bar, spaced_timesteps(EPS.alpha_bar, n))
    assert_close(z, numerics_golden[f"spaced_eps_{n}"], rtol=0, atol=1e-5)


def test_spaced_ddpm_trajectory_with_classifier_free_guidance(numerics_golden):
    positive, negative = golden_denoiser(EPS.alpha_bar), golden_denoiser(EPS.alpha_bar, "toy_u_txt")

    def guided(z, t):
        return negative(z, t) + 4 * (positive(z, t) - negative(z, t))

    z = run(ddpm, guided, EPS.alpha_bar, spaced_timesteps(EPS.alpha_bar, 10))
    assert_close(z, numerics_golden["spaced_eps_10_cfg4"], rtol=0, atol=1e-5)


def test_spaced_ddpm_trajectory_at_zero_terminal_snr(numerics_golden):
    z = run(ddpm, golden_denoiser(V.alpha_bar), V.alpha_bar, spaced_timesteps(EPS.alpha_bar, 10))
    assert_close(z, numerics_golden["spaced_v_zsnr_10"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("n", [4, 50])
def test_ddim_trajectory(n, numerics_golden):
    z = run(ddim, golden_denoiser(EPS.alpha_bar), EPS.alpha_bar, leading_timesteps(EPS.alpha_bar, n))
    assert_close(z, numerics_golden[f"ddim_eps_{n}"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("solver", ["euler", "dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_trajectories_in_sigma(solver, numerics_golden):
    timesteps = trailing_timesteps(V.alpha_bar, 10)
    z = run(SOLVERS[solver].run, golden_denoiser(V.alpha_bar), V.alpha_bar, timesteps, **without_noise(solver))
    assert_close(z, numerics_golden[f"edm_{solver}_v_zsnr_10_eta0"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("steps", [4, 10, 25])
def test_unipc_agrees_with_diffusers(order, steps):
    scheduler = diffusers.UniPCMultistepScheduler(
        beta_start=EPS.beta_start,
        beta_end=EPS.beta_end,
        beta_schedule="scaled_linear",
        solver_order=order,
        prediction_type="sample",
        timestep_spacing="trailing",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    denoise, z = golden_denoiser(EPS.alpha_bar), data("toy_x_T", SHAPE)
    timesteps = [*scheduler.timesteps.tolist(), -1]
    ours = run(unipc, denoise, EPS.alpha_bar, timesteps, order=order)
    for t in timesteps[:-1]:
        z = scheduler.step(denoise(z, t), t, z).prev_sample
    assert_close(ours, z, rtol=0, atol=1e-4)


def test_heun_trajectory(numerics_golden):
    """The published float32 run cancels two numbers of size 10^4 in its first step, which costs it two digits (0.013 of
    an output with deviation 1.1); in float64, and in our form also in float32, the same step keeps them."""
    timesteps, denoise = trailing_timesteps(V.alpha_bar, 10), golden_denoiser(V.alpha_bar)
    z = run(SOLVERS["heun"].run, denoise, V.alpha_bar, timesteps)
    assert_close(z, numerics_golden["edm_heun_v_zsnr_10_eta0"], rtol=0, atol=0.02)
    z_T = data("toy_x_T", SHAPE).double()
    exact = SOLVERS["heun"].run(denoise, z_T, V.alpha_bar, timesteps, lambda: 0, lambda i, z_0: None)
    assert_close(z.double(), exact, rtol=0, atol=1e-5)


def test_sigmas_are_the_published_ones(numerics_golden):
    for n in (4, 10, 50):
        sigmas = [sigma_of(V.alpha_bar, t) for t in trailing_timesteps(V.alpha_bar, n)]
        assert_close(torch.tensor(sigmas), numerics_golden[f"edm_sigmas_{n}"], rtol=1e-5, atol=1e-7, check_dtype=False)


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


# The multistep solvers of higher order start with one first-order step, which leaves an error of second order.
FIRST = ("ddim", "euler", "euler_ancestral")
ORDERS = {solver: 1 if solver in FIRST else 2 for solver in CHAINS if solver != "ddpm"}  # ddpm cannot do without noise


def without_noise(solver):
    return {} if SOLVERS[solver].eta is None else {"eta": 0.0}


def errors_inside(solver, counts):
    """Largest error after going from t = 640 to 320 in float64, where the schedule's steep ends don't hide the order.

    The exact flow maps N(0, 1) to N(mean, variance) affinely.
    """
    alpha_bar, mean, variance = EPS.alpha_bar, 0.3, 0.25
    denoise = gaussian_denoiser(alpha_bar, mean, variance)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)

    def std(t):
        return (alpha_bar[t] * variance + 1 - alpha_bar[t]) ** 0.5

    exact = alpha_bar[320] ** 0.5 * mean + std(320) / std(640) * (z - alpha_bar[640] ** 0.5 * mean)
    for n in counts:
        timesteps = [640 - 320 * i / n for i in range(n + 1)]
        options = without_noise(solver)
        end = SOLVERS[solver].run(denoise, z, alpha_bar, timesteps, lambda: 0, lambda i, z_0: None, **options)
        yield (end - exact).abs().max().item()


@pytest.mark.parametrize("solver", ORDERS)
def test_solvers_converge_at_their_order(solver):
    """Doubling the steps divides the error by 2^order."""
    for coarse, fine in pairwise(errors_inside(solver, (10, 20, 40, 80))):
        assert coarse / fine == pytest.approx(2 ** ORDERS[solver], rel=0.08)


@pytest.mark.parametrize("solver", CHAINS)
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


@pytest.mark.parametrize("solver", CHAINS)
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


@pytest.mark.parametrize("T", [1000, 401])
def test_leading_spacing_covers_the_chain_with_any_number_of_steps(T):
    """No gap, at either end or inside, is longer than T / steps rounded up."""
    for steps in range(1, T):
        timesteps = leading_timesteps(EPS.alpha_bar[:T], steps)
        assert len(timesteps) == steps + 1
        assert all(0 < t - s <= -(-T // steps) for t, s in pairwise([T, *timesteps]))
    assert leading_timesteps(EPS.alpha_bar, 600)[0] == leading_timesteps(EPS.alpha_bar, 501)[0] == 999


class Exact(Restorer):
    """Samples with the exact denoiser of N(0.8, 0.25), which writes down what it is first given."""

    def denoiser(self, negative, options):
        exact = gaussian_denoiser(self.diffusion.alpha_bar, 0.8)
        self.first = None

        def denoise(z_t, t, condition):
            self.first = self.first or (t, z_t.mean().item(), z_t.std().item())
            return exact(z_t, t)

        return denoise


def restored(diffusion, **options):
    """A pipeline, and what it makes of a latent whose 20,000 values are drawn from N(0.8, 0.25)."""
    latent = 0.8 + 0.5 * torch.randn(1, 1, 100, 200, generator=torch.Generator().manual_seed(0))
    pipeline, options = Exact(diffusion=diffusion), Options(start="latent", **options)
    return pipeline, pipeline.sample(Condition(latent), None, options, [1], lambda i, z_0: None)


@pytest.mark.parametrize("solver", CHAINS)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("start_t, steps", [(400, 4), (400, 7), (999, 3)])
def test_a_latent_is_noised_to_where_the_solver_begins(solver, spacing, start_t, steps):
    for diffusion in (EPS, V):
        t, mean, std = restored(diffusion, solver=solver, spacing=spacing, start_t=start_t, steps=steps)[0].first
        alpha_bar = alpha_bar_at(diffusion.alpha_bar, t)
        assert mean == pytest.approx(0.8 * alpha_bar**0.5, abs=0.02)
        assert std == pytest.approx((0.25 * alpha_bar + 1 - alpha_bar) ** 0.5, abs=0.02)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_noised_latent_becomes_the_data_again(spacing):
    """The mean with any number of steps; the deviation, which few steps shrink, with many."""
    for steps in (4, 100):
        z = restored(EPS, solver="dpmpp_2m", spacing=spacing, start_t=400, steps=steps)[1]
        assert z.mean().item() == pytest.approx(0.8, abs=0.01)
    assert z.std().item() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("diffusion", [EPS, V], ids=["eps", "zero_terminal_snr"])
def test_spacings_descend_from_the_noisiest_step(spacing, diffusion):
    for steps in (2, 5, 40):
        timesteps = SPACINGS[spacing](diffusion.alpha_bar, steps)
        assert len(timesteps) == steps + 1
        assert all(t > s for t, s in pairwise(timesteps))
        assert timesteps[0] == 999 or spacing == "leading"
        assert timesteps[-1] == -1 or spacing == "leading"


def test_karras_and_exponential_spacings_agree_with_diffusers():
    for name, flag in (("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas")):
        scheduler = diffusers.EulerDiscreteScheduler(
            beta_start=EPS.beta_start, beta_end=EPS.beta_end, beta_schedule="scaled_linear", **{flag: True}
        )
        scheduler.set_timesteps(12)
        sigmas = [sigma_of(EPS.alpha_bar, t) for t in SPACINGS[name](EPS.alpha_bar, 12)]
        # They take the ends from their own spacing of 12 steps; the inside follows from the ends.
        low, high = scheduler.sigmas[-2].item(), scheduler.sigmas[0].item()
        assert sigmas[0] == pytest.approx(high, rel=0.02)
        assert sigmas[-2] == pytest.approx(low, rel=0.02)
        assert_close(torch.tensor(sigmas), scheduler.sigmas, rtol=0.03, atol=1e-6)


def test_timesteps_between_integers_invert_sigma():
    for t in (0, 3.25, 500, 998.9):
        assert timestep_of(EPS.alpha_bar, sigma_of(EPS.alpha_bar, t)) == pytest.approx(t, abs=1e-6)


def test_bad_requests_are_named():
    z = data("toy_x_T", SHAPE)
    with pytest.raises(ValueError, match="unknown solver 'euler3'"):
        sample("euler3", golden_denoiser(EPS.alpha_bar), z, EPS.alpha_bar, 4, lambda: z)
    with pytest.raises(ValueError, match="'euler' has no eta"):
        sample("euler", golden_denoiser(EPS.alpha_bar), z, EPS.alpha_bar, 4, lambda: z, eta=0.5)
    with pytest.raises(ValueError, match="unknown spacing 'even'"):
        sample("euler", golden_denoiser(EPS.alpha_bar), z, EPS.alpha_bar, 4, lambda: z, spacing="even")
    with pytest.raises(ValueError, match="steps must lie in"):
        sample("ddim", golden_denoiser(EPS.alpha_bar), z, EPS.alpha_bar, 1001, lambda: z)


@pytest.mark.parametrize("solver", CHAINS)
def test_marginals_converge_with_noise_too(solver):
    """Mean and deviation, computed exactly: twice the steps, an error smaller by 2^order."""
    from benchmarks.convergence import errors, order

    means, deviations = zip(*errors(solver), strict=True)
    assert max(means) < 1e-12
    assert order(deviations) == pytest.approx(1 if solver in (*FIRST, "ddpm") else 2, abs=0.1)


def test_one_step_is_one_pass_from_the_clean_latent():
    z, seen = torch.randn(2, 4, 8, 8), []

    def denoise(z, t):
        seen.append((z, t))
        return 2 * z + 1

    alpha_bar = V.alpha_bar[:201]
    end = sample("one_step", denoise, z, alpha_bar, 1, lambda: pytest.fail("it needs no noise"))
    assert torch.equal(end, 2 * z + 1)
    assert len(seen) == 1 and torch.equal(seen[0][0], z) and seen[0][1] == 200


def test_more_of_one_step_noises_each_estimate_anew():
    """Algorithm 1 of Consistency Models, with the schedule of latent diffusion."""
    z, noise, seen = torch.randn(1, 4, 8, 8), torch.randn(1, 4, 8, 8), []

    def denoise(z, t):
        seen.append((z, t))
        return 0.5 * z

    end = sample("one_step", denoise, z, V.alpha_bar[:201], 2, lambda: noise)
    (_, first), (again, t) = seen
    assert (first, t) == (200, 100)
    a = float(V.alpha_bar[100])
    assert_close(again, a**0.5 * 0.5 * z + (1 - a) ** 0.5 * noise)
    assert_close(end, 0.5 * again)
