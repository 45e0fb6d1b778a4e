"""MTCNN (Zhang et al. 2016): three small networks that propose, refine and judge faces; Caffe's layout of the authors.

Attributes are named as in the PyTorch port whose weights ship with this project. All three take RGB in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def normalised(x: Tensor) -> Tensor:
    return (x * 255 - 127.5) / 128


class ProposalNet(nn.Module):
    """Slides a window of 12 pixels over an image, with a stride of 2."""

    def __init__(self):
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 10, 3), nn.PReLU(10)
        self.conv2, self.prelu2 = nn.Conv2d(10, 16, 3), nn.PReLU(16)
        self.conv3, self.prelu3 = nn.Conv2d(16, 32, 3), nn.PReLU(32)
        self.conv4_1 = nn.Conv2d(32, 2, 1)
        self.conv4_2 = nn.Conv2d(32, 4, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 3, H, W), sides of at least 12 -> probabilities (B, h, w) and shifts of the box's sides (B, 4, h, w)."""
        x = F.max_pool2d(self.prelu1(self.conv1(normalised(x))), 2, ceil_mode=True)
        x = self.prelu3(self.conv3(self.prelu2(self.conv2(x))))
        return self.conv4_1(x).softmax(1)[:, 1], self.conv4_2(x)


class RefinementNet(nn.Module):
    """Sorts out proposals."""

    def __init__(self):
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 28, 3), nn.PReLU(28)
        self.conv2, self.prelu2 = nn.Conv2d(28, 48, 3), nn.PReLU(48)
        self.conv3, self.prelu3 = nn.Conv2d(48, 64, 2), nn.PReLU(64)
        self.dense4, self.prelu4 = nn.Linear(576, 128), nn.PReLU(128)
        self.dense5_1 = nn.Linear(128, 2)
        self.dense5_2 = nn.Linear(128, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, 24, 24) -> probabilities (N,), shifts (N, 4)."""
        x = F.max_pool2d(self.prelu1(self.conv1(normalised(x))), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = self.prelu3(self.conv3(x))  # (N, 64, 3, 3)
        x = self.prelu4(self.dense4(columns_first(x)))
        return self.dense5_1(x).softmax(1)[:, 1], self.dense5_2(x)


class OutputNet(nn.Module):
    """Judges what is left, and finds the five landmarks."""

    def __init__(self):
        super().__init__()
        self.conv1, self.prelu1 = nn.Conv2d(3, 32, 3), nn.PReLU(32)
        self.conv2, self.prelu2 = nn.Conv2d(32, 64, 3), nn.PReLU(64)
        self.conv3, self.prelu3 = nn.Conv2d(64, 64, 3), nn.PReLU(64)
        self.conv4, self.prelu4 = nn.Conv2d(64, 128, 2), nn.PReLU(128)
        self.dense5, self.prelu5 = nn.Linear(1152, 256), nn.PReLU(256)
        self.dense6_1 = nn.Linear(256, 2)
        self.dense6_2 = nn.Linear(256, 4)
        self.dense6_3 = nn.Linear(256, 10)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, 3, 48, 48) -> probabilities (N,), shifts (N, 4), landmarks (N, 5, 2) as fractions of the box's sides."""
        x = F.max_pool2d(self.prelu1(self.conv1(normalised(x))), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu2(self.conv2(x)), 3, 2, ceil_mode=True)
        x = F.max_pool2d(self.prelu3(self.conv3(x)), 2, ceil_mode=True)
        x = self.prelu4(self.conv4(x))  # (N, 128, 3, 3)
        x = self.prelu5(self.dense5(columns_first(x)))
        points = self.dense6_3(x).unflatten(1, (2, 5)).transpose(1, 2)  # all x, then all y
        return self.dense6_1(x).softmax(1)[:, 1], self.dense6_2(x), points


class MTCNN(nn.Module):
    """The three networks; `diffbir.faces.detect` runs them one after the other."""

    def __init__(self):
        super().__init__()
        self.pnet, self.rnet, self.onet = ProposalNet(), RefinementNet(), OutputNet()


def columns_first(x: Tensor) -> Tensor:
    """(N, C, H, W) -> (N, W H C): the order in which the authors' framework flattens."""
    return torch.flatten(x.permute(0, 3, 2, 1), 1)
