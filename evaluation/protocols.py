"""Every choice that changes a published figure, under one name; read without torch."""

from dataclasses import dataclass

from diffbir.utils.cli import UserError

# Of one picture; those with a reference first. On request only. Of whole sets. What pyiqa adds: a name of its own after
# `pyiqa:`, too.
METRICS = ("psnr", "ssim", "lpips", "lpips-vgg", "dists", "niqe", "brisque")
MORE = ("ciede2000", "identity")
SET_METRICS = ("fid", "kid")
CHANNELS = ("rgb", "bgr", "grey")  # of what a face embedder sees
PYIQA = ("musiq", "maniqa", "clipiqa", "topiq_nr")


@dataclass(frozen=True)
class Protocol:
    """How pictures are compared.

    Args:
        channel: of PSNR and SSIM: 'rgb', or 'y', the luma of ITU-R BT.601 in 16 to 235 (MATLAB's `rgb2ycbcr`).
        crop: pixels that PSNR and SSIM leave out at each border.
        centre: side of the centre crop of result and reference that every metric sees, pixels; 0 is the whole picture.
        used_by: whose figures it reproduces.

    Raises:
        UserError: a value that makes no sense.
    """

    channel: str = "rgb"
    crop: int = 0
    centre: int = 0
    used_by: str = "chosen by flags"

    def __post_init__(self) -> None:
        if self.channel not in ("rgb", "y"):
            raise UserError(f"channel is rgb or y, not '{self.channel}'")
        if self.crop < 0 or self.centre < 0:
            raise UserError(f"crop and centre are pixels, 0 or more, not {self.crop} and {self.centre}")

    def describe(self) -> str:
        channel = {"rgb": "RGB", "y": "Y of BT.601 (16 to 235)"}[self.channel]
        crop = f"{self.crop} pixels of each border left out" if self.crop else "no border crop"
        centre = f"centre crop of {self.centre} pixels" if self.centre else "whole pictures"
        return f"PSNR and SSIM of {channel}, {crop}; every metric on {centre}; 8-bit pictures"


PROTOCOLS = {
    "rgb": Protocol(used_by="the figures of this repository and the validation of its trainings"),
    "y": Protocol("y", used_by="one-step and diffusion methods on the 512-pixel crops of RealSR, DRealSR and DIV2K"),
    "stablesr": Protocol("y", 4, 512, "StableSR: luma, four pixels off, on centres of 512"),
    "classical": Protocol("y", 4, used_by="x4 super-resolution since SRCNN: luma, without as many pixels as the scale"),
}
