"""The distance between identities: how far apart a face embedder sees two pictures of aligned faces.

Embedders are other people's networks, with licences of their own, in a file that holds the network along with its
weights: TorchScript or ONNX.
"""

from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffbir.evaluation.protocols import CHANNELS
from diffbir.utils.cli import UserError

TORCHSCRIPT = (".pt", ".pth", ".ts", ".torchscript")


@dataclass(frozen=True)
class Embedder:
    """What a face embedder expects.

    Args:
        path: TorchScript or ONNX: (B, C, size, size) in [-1, 1] -> (B, N).
        size: side of its input, pixels.
        crop: side of the centre that it sees over that of the picture. ArcFace's template lies in the middle 0.78 of
            faces aligned as those of FFHQ; 1 where pictures are aligned as the embedder wants them.
        channels: rgb, bgr or grey (luma of BT.601).

    Raises:
        UserError: a value that makes no sense.
    """

    path: Path
    size: int = 112
    crop: float = 0.78
    channels: str = "rgb"

    def __post_init__(self) -> None:
        if self.size < 1 or not 0 < self.crop <= 1 or self.channels not in CHANNELS:
            raise UserError(
                f"an embedder's input has a size of 1 pixel or more, a crop in (0, 1] and channels rgb, bgr or grey, "
                f"not {self.size}, {self.crop:g} and {self.channels}"
            )

    def describe(self) -> str:
        return f"{self.path.name} on the middle {self.crop:g} of faces at {self.size} pixels, {self.channels}"


class IdentityDistance(nn.Module):
    """1 - the cosine between embeddings, 0 to 2: (B, 3, H, W) in [0, 1] each -> (B,).

    Raises:
        UserError: the file is missing, of another type, or doesn't hold a network that fits `embedder`.
    """

    def __init__(self, embedder: Embedder):
        super().__init__()
        self.embedder, path = embedder, embedder.path
        if not path.is_file():
            raise UserError(f"{path} does not exist; give a face embedder as TorchScript or ONNX (docs/quality.md)")
        if path.suffix.lower() == ".onnx":
            self.network = OnnxNetwork(path)
        elif path.suffix.lower() in TORCHSCRIPT:
            try:
                self.network = torch.jit.load(str(path), map_location="cpu").eval()
            except RuntimeError as error:  # a state dict has the same endings
                raise UserError(
                    f"{path} is no TorchScript; torch.jit.trace(network, example).save(FILE) writes one"
                ) from error
        else:
            raise UserError(f"{path} must be TorchScript ({', '.join(TORCHSCRIPT)}) or ONNX (.onnx)")
        self.embed(torch.zeros(1, 3, embedder.size, embedder.size))

    @torch.no_grad()
    def embed(self, x: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, N).

        Raises:
            UserError: the network doesn't take such an input, or gives something else.
        """
        e = self.embedder
        height, width = (max(1, round(e.crop * side)) for side in x.shape[2:])
        top, left = (x.shape[2] - height) // 2, (x.shape[3] - width) // 2
        x = x[..., top : top + height, left : left + width]
        x = F.interpolate(x, (e.size, e.size), mode="bilinear", antialias=True).clamp(0, 1)
        if e.channels == "grey":
            x = (x * x.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(dim=1, keepdim=True)
        elif e.channels == "bgr":
            x = x.flip(1)
        try:
            y = self.network(2 * x - 1)
        except (RuntimeError, cv2.error) as error:
            reason = str(error).strip().splitlines()[-1]
            raise UserError(f"{e.path} cannot embed {tuple(x.shape)} ({reason}); see --embedder-size") from error
        if not isinstance(y, Tensor) or y.ndim != 2 or len(y) != len(x):
            found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
            raise UserError(f"{e.path} gives {found} for {tuple(x.shape)}; an embedder gives a vector for each face")
        return y.float()

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return 1 - F.cosine_similarity(self.embed(x), self.embed(y))


class OnnxNetwork(nn.Module):
    """A network in an ONNX file, which OpenCV runs on the CPU.

    Raises:
        UserError: OpenCV can't read the file.
    """

    def __init__(self, path: Path):
        super().__init__()
        try:
            self.net = cv2.dnn.readNetFromONNX(str(path))
        except cv2.error as error:
            raise UserError(f"{path} is no ONNX file that OpenCV reads; export it anew, or as TorchScript") from error

    def forward(self, x: Tensor) -> Tensor:
        rows = []
        for picture in np.ascontiguousarray(x.cpu().numpy()):  # many files fix the batch at one
            self.net.setInput(picture[None])
            rows.append(torch.from_numpy(self.net.forward().copy()))
        return torch.cat(rows).to(x.device)
