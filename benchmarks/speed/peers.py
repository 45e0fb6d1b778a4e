"""diffusers' classes over the weights of our networks: the same tensors, not copies."""

import torch
from torch import Tensor, nn

from diffbir.model.networks.condition import Condition
from diffbir.model.weights.diffusers_layout import config_json, to_diffusers
from diffbir.utils.cli import UserError


def peer(role: str, network: nn.Module) -> nn.Module:
    """The class of diffusers that computes the same, in its recommended layout (channels last).

    Args:
        role: 'unet', 'branch' or 'autoencoder'.

    Raises:
        UserError: diffusers isn't installed.
    """
    try:
        import diffusers
    except ImportError as error:
        raise UserError("this case compares with diffusers; pip install diffusers") from error
    config = config_json(role, network)
    with torch.device("meta"):
        model = getattr(diffusers, config.pop("_class_name")).from_config(config)
    model.load_state_dict(to_diffusers(role, network.state_dict()), assign=True)
    return model.requires_grad_(False).eval().to(memory_format=torch.channels_last)


class DiffusersDenoiser(nn.Module):
    """UNet2DConditionModel with ControlNetModel, called as StableDiffusionControlNetPipeline does."""

    def __init__(self, unet: nn.Module, controlnet: nn.Module | None):
        super().__init__()
        self.unet, self.controlnet = unet, controlnet

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """As `ControlledUNet.forward`; several texts for each latent repeat the latent."""
        n = len(condition.text) // len(z_t)
        z_t, t, latent = z_t.repeat(n, 1, 1, 1), t.repeat(n), condition.latent.repeat(n, 1, 1, 1)
        added = {}
        if self.controlnet is not None:
            down, middle = self.controlnet(z_t, t, condition.text, controlnet_cond=latent, return_dict=False)
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
        return self.unet(z_t, t, condition.text, return_dict=False, **added)[0]
