"""DiffBIR as a pipeline of diffusers: degraded pictures in, restored pictures out.

    from diffusers import DiffusionPipeline
    pipeline = DiffusionPipeline.from_pretrained(FOLDER, custom_pipeline=FOLDER, trust_remote_code=True)
    pipeline(picture, upscale=4, steps=50).images[0].save("restored.png")

Needs torch, diffusers and transformers. Stage 1 is run by the package diffbir, from stage1.yaml and stage1.safetensors
in a local FOLDER; or give any function `stage1=`, (B, 3, H, W) in [0, 1] -> restored, of any size. So is an autoencoder
that diffusers has no class for, from autoencoder.yaml and autoencoder.safetensors. UNet and ControlNet are stock: the
ControlNet sees the latent of stage 1's result, and `StableDiffusionControlNetPipeline` runs them too.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ImagePipelineOutput, StableDiffusionControlNetPipeline
from PIL import Image, ImageOps

# What a call may say, and the folder's model_index.json under `sampling`.
DEFAULTS = {
    "steps": 50,
    "prompt": "",
    "negative_prompt": "",
    "cfg_scale": 1.0,  # classifier-free guidance by the prompts; 1 is off
    "guidance_scale": 0.0,  # latent guidance: larger is closer to stage 1
    "strength": 1.0,  # of the ControlNet
    "residual": 0.0,  # how much of the detail that the autoencoder loses of stage 1 is put back
    "color": "wavelet",  # or none
    "min_side": 0,  # shorter pictures are enlarged to this side for the diffusion model
}


def resize(x, size):
    shrink = size[0] < x.shape[-2]
    return (
        x if list(x.shape[-2:]) == list(size) else F.interpolate(x, size, mode="bicubic", antialias=shrink).clamp(0, 1)
    )


def low_frequencies(x, levels=5):
    kernel = x.new_tensor([[1, 2, 1], [2, 4, 2], [1, 2, 1]]).div(16).expand(3, 1, 3, 3)
    for r in (2**i for i in range(levels)):
        x = F.conv2d(F.pad(x, (r, r, r, r), mode="replicate"), kernel, groups=3, dilation=r)
    return x


class DiffBIRPipeline(StableDiffusionControlNetPipeline):
    _optional_components = [*StableDiffusionControlNetPipeline._optional_components, "text_encoder", "tokenizer", "vae"]  # noqa: RUF012

    def __init__(
        self,
        vae,
        text_encoder,
        tokenizer,
        unet,
        controlnet,
        scheduler,
        safety_checker=None,
        feature_extractor=None,
        image_encoder=None,
        requires_safety_checker=False,
        sampling=None,
    ):
        none = safety_checker, feature_extractor, image_encoder, requires_safety_checker
        super().__init__(vae, text_encoder, tokenizer, unet, controlnet, scheduler, *none)
        self.register_to_config(sampling=sampling or {})

    @torch.inference_mode()
    def __call__(self, image, upscale=1.0, seed=0, stage1=None, output_type="pil", **options):
        """image: a PIL image or (B, 3, H, W) in [0, 1]; output_type: pil, or pt for a tensor like it."""
        if unknown := set(options) - set(DEFAULTS):
            raise ValueError(f"unknown option {unknown.pop()}; there are {', '.join(DEFAULTS)}")
        o = DEFAULTS | {name: v for name, v in self.config.sampling.items() if name in DEFAULTS} | options
        if o["color"] not in ("wavelet", "none"):
            raise ValueError(f"color must be wavelet or none, not {o['color']}")
        if isinstance(image, Image.Image):
            pixels = np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
            image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None] / 255
        image = image.to(self._execution_device, torch.float32)
        size = [max(1, round(n * upscale)) for n in image.shape[-2:]]
        i_reg = resize(stage1(image) if stage1 else self.remove_degradation(image, upscale), size).clamp(0, 1)
        restored = self.generate(i_reg, seed, o).cpu()
        if output_type == "pil":
            array = (restored * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
            restored = [Image.fromarray(pixels) for pixels in array]
        return ImagePipelineOutput(images=restored)

    def preset(self, name, missing):
        """From which the package diffbir builds a network of the folder: its YAML, and where its weights are."""
        folder = Path(self.config._name_or_path)
        if not (folder / f"{name}.yaml").is_file():
            raise ValueError(f"{folder} is no local folder with {missing}")
        return folder / f"{name}.yaml", [f"weights.{name}={folder / name}.safetensors"]

    def autoencoder(self, device):
        """encode and decode, between pictures in [0, 1] and scaled latents, and the factor between their sizes."""
        if self.vae is not None:
            vae, scale = self.vae, self.vae.config.scaling_factor
            encode = lambda x: vae.encode((2 * x - 1).to(vae.dtype)).latent_dist.mode().float() * scale  # noqa: E731
            decode = lambda z: vae.decode((z / scale).to(vae.dtype)).sample.float() / 2 + 0.5  # noqa: E731
            return encode, decode, self.vae_scale_factor
        preset, overrides = self.preset("autoencoder", "an autoencoder.yaml")
        if getattr(self, "_autoencoder", None) is None:
            from diffbir.model.build import build_networks
            from diffbir.model.presets import load_preset

            networks = build_networks(load_preset(preset, overrides=overrides))
            self._autoencoder = networks["autoencoder"].eval().to(device)
        return self._autoencoder.encode, self._autoencoder.decode, self._autoencoder.factor

    def remove_degradation(self, image, upscale):
        preset, overrides = self.preset("stage1", "a stage1.yaml; give stage1=FUNCTION")
        if getattr(self, "_stage1", None) is None:
            from diffbir import Restorer

            self._stage1 = Restorer.from_preset(preset, image.device, stage="1", overrides=overrides)
        options = self._stage1.options(stage="1", upscale=upscale)
        return self._stage1.restore(image, options).image.to(image)

    def generate(self, i_reg, seed, o):
        """(B, 3, H, W) -> the same size."""
        size, dtype, device = i_reg.shape[-2:], self.unet.dtype, i_reg.device
        encode, decode, factor = self.autoencoder(device)
        multiple = factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        larger = max(1, o["min_side"] / min(size))
        i_reg = resize(i_reg, [round(n * larger) for n in size])
        height, width = i_reg.shape[-2:]
        right, bottom = -width % multiple, -height % multiple
        mode = "reflect" if right < width and bottom < height else "replicate"
        i_reg = F.pad(i_reg, (0, right, 0, bottom), mode=mode)

        latent, guided = encode(i_reg), o["cfg_scale"] > 1
        if self.text_encoder is None:  # a model without text: its attention to it is silent
            text = latent.new_zeros(len(latent), 1, self.unet.config.cross_attention_dim)
        else:
            prompts = [o["prompt"]] * len(latent), device, 1, guided, [o["negative_prompt"]] * len(latent)
            text, negative = self.encode_prompt(*prompts)
            text = torch.cat([negative, text]) if guided else text
        hint = torch.cat([latent] * (1 + guided)).to(dtype)

        self.scheduler.set_timesteps(o["steps"], device=device)
        noise = torch.randn(latent.shape[1:], generator=torch.Generator().manual_seed(seed))  # the same for each image
        z = noise.to(device).expand_as(latent)
        k = 2 * o["guidance_scale"] / (latent.shape[1] * (512 // factor) ** 2)
        for t in self.progress_bar(self.scheduler.timesteps):
            x = torch.cat([z] * (1 + guided)).to(dtype)
            down, middle = self.controlnet(
                x, t, text.to(dtype), hint, conditioning_scale=o["strength"], return_dict=False
            )
            added = {"down_block_additional_residuals": down, "mid_block_additional_residual": middle}
            output = self.unet(x, t, text.to(dtype), **added).sample.float()
            if guided:
                without, output = output.chunk(2)
                output = without + o["cfg_scale"] * (output - without)
            # Latent guidance pulls the estimate of z_0 towards the latent; then back to what the network predicts.
            alpha_bar = float(self.scheduler.alphas_cumprod[int(t)])
            a, s = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
            velocity = self.scheduler.config.prediction_type == "v_prediction"
            z_0 = a * z - s * output if velocity else (z - s * output) / a
            z_0 = z_0 - k / (1 + k) * (z_0 - latent)
            eps = (z - a * z_0) / s
            z = self.scheduler.step(a * eps - s * z_0 if velocity else eps, t, z).prev_sample
        image = decode(z)
        if o["residual"]:
            image = image + o["residual"] * (i_reg - decode(latent))
        if o["color"] == "wavelet":
            image = image - low_frequencies(image) + low_frequencies(i_reg)
        return resize(image.clamp(0, 1)[..., :height, :width], size)
