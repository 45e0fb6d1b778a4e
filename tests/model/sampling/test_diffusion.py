import numpy as np
import pytest
import torch
from torch.testing import assert_close

from diffbir.model.sampling.diffusion import Diffusion

KINDS = [dict(prediction="eps"), dict(prediction="v"), dict(prediction="v", zero_terminal_snr=True)]


def test_schedules_are_the_published_ones(numerics_golden):
    plain, rescaled = Diffusion(), Diffusion(prediction="v", zero_terminal_snr=True)
    assert_close(torch.from_numpy(plain.alpha_bar), numerics_golden["alphas_cumprod"], rtol=0, atol=1e-14)
    assert_close(torch.from_numpy(rescaled.alpha_bar), numerics_golden["alphas_cumprod_zero_snr"], rtol=0, atol=1e-14)
    assert rescaled.alpha_bar[-1] == 0
    assert rescaled.alpha_bar[0] == pytest.approx(plain.alpha_bar[0], abs=1e-15)


@pytest.mark.parametrize("kind", KINDS)
def test_the_target_leads_back_to_the_clean_latent(kind):
    diffusion = Diffusion(**kind)
    z_0, eps = torch.randn(4, 4, 3, 3), torch.randn(4, 4, 3, 3)
    t = torch.tensor([0, 10, 500, 900])
    z_t = diffusion.diffuse(z_0, t, eps)
    assert_close(diffusion.to_z_0(z_t, t, diffusion.target(z_0, t, eps)), z_0, rtol=0, atol=2e-5)


def test_at_zero_terminal_snr_the_last_step_is_noise_and_v_is_minus_the_latent():
    diffusion = Diffusion(prediction="v", zero_terminal_snr=True)
    z_0, eps, t = torch.randn(1, 4, 3, 3), torch.randn(1, 4, 3, 3), torch.tensor([999])
    assert_close(diffusion.diffuse(z_0, t, eps), eps)
    assert_close(diffusion.target(z_0, t, eps), -z_0)


def test_forward_process_has_the_stated_mean_and_variance():
    """Over 40,000 draws the mean is within 5 standard errors, the variance within 5 %."""
    diffusion, z_0 = Diffusion(), torch.full((40000, 1, 1, 1), 1.5)
    z_t = diffusion.diffuse(z_0, torch.full((40000,), 400), torch.randn(40000, 1, 1, 1))
    a = diffusion.alpha_bar[400]
    assert abs(z_t.mean() - 1.5 * np.sqrt(a)) < 5 * np.sqrt((1 - a) / 40000)
    assert abs(z_t.var() / (1 - a) - 1) < 0.05


def test_loss_is_the_mean_square_per_image():
    diffusion = Diffusion()
    z_0, eps, t = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3), torch.tensor([5, 6])
    output = eps + torch.tensor([1.0, 2.0]).view(2, 1, 1, 1)
    assert_close(diffusion.loss(output, z_0, t, eps), torch.tensor([1.0, 4.0]))


def test_eps_at_zero_terminal_snr_is_refused():
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        Diffusion(prediction="eps", zero_terminal_snr=True)


def test_the_schedule_lives_where_the_timesteps_are():
    """No value is fetched from the device: a tensor of the meta device has none."""
    t = torch.tensor([0, 999], device="meta")
    a, s = Diffusion().scales(t)
    assert a.is_meta and s.is_meta and a.shape == s.shape == (2, 1, 1, 1)
    diffusion = Diffusion()
    with torch.inference_mode():
        diffusion.scales(torch.tensor([5]))
    z = torch.ones(1, 1, 1, 1, requires_grad=True)  # what a validation made serves a training too
    diffusion.diffuse(z, torch.tensor([5]), torch.zeros(1, 1, 1, 1)).sum().backward()
    assert z.grad.item() == pytest.approx(diffusion.alpha_bar[5] ** 0.5, rel=1e-6)
