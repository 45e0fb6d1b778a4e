"""The diffusion process: forward process, training targets and loss (Ho et al. 2020, DDPM)."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from diffbir.model.sampling.draws import ANEW, Anew
from diffbir.model.sampling.schedule import alpha_bar_at, rescale_to_zero_terminal_snr, scaled_linear_alpha_bar


class Diffusion:
    """z_t = sqrt(alpha_bar_t) z_0 + sqrt(1 - alpha_bar_t) eps, and what a network predicts about it.

    Args:
        timesteps: length T of the chain.
        beta_start: first beta.
        beta_end: last beta.
        prediction: 'eps' (noise), or 'v' = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) z_0 (Salimans and Ho 2022).
        zero_terminal_snr: rescales the schedule so that alpha_bar of the last step is 0; needs 'v'.
    """

    def __init__(
        self,
        timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        prediction: str = "eps",
        zero_terminal_snr: bool = False,
    ):
        if prediction not in ("eps", "v"):
            raise ValueError(f"prediction must be 'eps' or 'v', not '{prediction}'")
        if zero_terminal_snr and prediction == "eps":
            raise ValueError("zero_terminal_snr needs prediction 'v': at zero SNR the noise tells nothing about z_0")
        alpha_bar = scaled_linear_alpha_bar(timesteps, beta_start, beta_end)
        if zero_terminal_snr:
            alpha_bar = rescale_to_zero_terminal_snr(alpha_bar)
        self.alpha_bar = alpha_bar  # (T,), float64; float32 only where it meets a latent
        self.prediction, self.beta_start, self.beta_end = prediction, beta_start, beta_end
        self.tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @property
    def timesteps(self) -> int:
        return len(self.alpha_bar)

    def scales(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar_t) and sqrt(1 - alpha_bar_t), (B, 1, 1, 1) float32, for t (B,), not necessarily whole."""
        if not t.is_floating_point():
            a, s = self.table(t.device)
            return a[t].view(-1, 1, 1, 1), s[t].view(-1, 1, 1, 1)
        alpha_bar = torch.tensor([alpha_bar_at(self.alpha_bar, float(v)) for v in t], dtype=torch.float64)
        alpha_bar = alpha_bar.view(-1, 1, 1, 1)
        return alpha_bar.sqrt().float().to(t.device), (1 - alpha_bar).sqrt().float().to(t.device)

    def table(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Both scales of every timestep, (T,) float32 each, kept where they are used: no step waits for a copy."""
        if device not in self.tables:
            with torch.inference_mode(False):  # a training may use what a validation made
                alpha_bar = torch.from_numpy(self.alpha_bar)
                self.tables[device] = alpha_bar.sqrt().float().to(device), (1 - alpha_bar).sqrt().float().to(device)
        return self.tables[device]

    def diffuse(self, z_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """A draw from q(z_t | z_0) (DDPM, equation 4)."""
        a, s = self.scales(t)
        return a * z_0 + s * eps

    def target(self, z_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should say about z_t."""
        if self.prediction == "eps":
            return eps
        a, s = self.scales(t)
        return a * eps - s * z_0

    def to_z_0(self, z_t: Tensor, t: Tensor, output: Tensor) -> Tensor:
        """The clean latent that a network's output implies."""
        a, s = self.scales(t)
        return (z_t - s * output) / a if self.prediction == "eps" else a * z_t - s * output

    def training_loss(
        self, predict: Callable[[Tensor, Tensor], Tensor], z_0: Tensor, draws: Anew = ANEW
    ) -> tuple[Tensor, Tensor]:
        """Loss of `predict(z_t, t)` at drawn timesteps and noise, per image, and the timesteps: (B,), (B,)
        (DDPM, algorithm 1)."""
        t, eps = draws.timesteps(self.timesteps, z_0), draws.normal(z_0)
        return self.loss(predict(self.diffuse(z_0, t, eps), t), z_0, t, eps), t

    def loss(self, output: Tensor, z_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Mean squared error to the target, per image: (B,)."""
        return F.mse_loss(output.float(), self.target(z_0, t, eps), reduction="none").mean(dim=(1, 2, 3))
