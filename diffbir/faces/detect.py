"""Finds faces in a photo, each with five landmarks: MTCNN (Zhang et al. 2016), whose weights ship with the project."""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import nms

from diffbir.model.networks.mtcnn import MTCNN
from diffbir.model.weights.checkpoint import load_weights
from diffbir.utils.cli import UserError
from diffbir.utils.config import ROOT

WEIGHTS = ROOT / "weights" / "faces" / "mtcnn.safetensors"
SMALLEST = 20  # pixels of the side of a face: the smallest that is looked for
SHARE = 100  # in large photos: the longer side over that of the smallest face, which bounds time and memory
WINDOW, STRIDE = 12, 2  # pixels, of the network that proposes
STEP = 0.709  # from one level of the pyramid to the next: half the area
PROPOSED, REFINED = 0.6, 0.7  # probabilities that the first two networks ask for
CROPS = 512  # that are computed at once
MIRRORED = [1, 0, 2, 4, 3]  # the landmarks that a mirror makes of each


@dataclass(frozen=True)
class Face:
    """Where a face is, in pixels from the photo's top left corner (the first pixel's centre is at 0.5, 0.5).

    Args:
        box: left, top, right, bottom; it may reach out of the photo.
        points: (5, 2) float64, x and y of the eye on the left (as seen), the one on the right, the nose, and the
            corners of the mouth, left and right.
        score: how sure the detector is, 0 to 1.
    """

    box: tuple[float, float, float, float]
    points: Tensor
    score: float

    @property
    def centre(self) -> tuple[float, float]:
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2


class Detector:
    """Photo -> faces, from left to right.

        faces = Detector()(photo)  # (3, H, W) RGB in [0, 1]

    Args:
        weights: a file with the keys of `MTCNN`; the project's own by default.
        threshold: the least score of a face, 0 to 1.

    Raises:
        UserError: the file is missing or holds something else, or the threshold is out of range.
    """

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu", threshold: float = 0.9):
        if not 0 <= threshold <= 1:
            raise UserError(f"the threshold of faces must lie in 0 .. 1, not {threshold}")
        self.threshold, self.device = threshold, torch.device(device)
        self.network = MTCNN()
        load_weights(self.network, WEIGHTS if weights is None else weights)
        self.network.requires_grad_(False).eval().to(self.device)

    @torch.inference_mode()
    def __call__(self, photo: Tensor) -> list[Face]:
        """Args:
        photo: (3, H, W) float32 RGB in [0, 1], upright.
        """
        photo = photo.to(self.device, torch.float32)
        boxes = self.propose(photo)
        boxes = self.refine(photo, boxes)
        boxes, points, scores = self.judge(photo, boxes)
        found = [
            Face(tuple(box), point, score)
            for box, point, score in zip(boxes.tolist(), points.double().cpu(), scores.tolist(), strict=True)
        ]
        return sorted(found, key=lambda face: face.centre)

    def propose(self, photo: Tensor) -> Tensor:
        """Square boxes (N, 4) from a pyramid of the photo."""
        size = photo.shape[-2:]
        scale = WINDOW / max(SMALLEST, max(size) / SHARE)
        boxes, scores, shifts = [photo.new_zeros(0, 4)], [photo.new_zeros(0)], [photo.new_zeros(0, 4)]
        while min(size) * scale >= WINDOW:
            small = [int(n * scale + 1) for n in size]
            probability, shift = self.network.pnet(resized(photo, small)[None])
            y, x = torch.nonzero(probability[0] >= PROPOSED, as_tuple=True)
            corner = torch.stack([x, y], 1) * STRIDE
            box = torch.cat([corner + 1, corner + WINDOW], 1).div(scale).floor()
            score = probability[0, y, x]
            kept = nms(box, score, 0.5)
            for found, new in ((boxes, box), (scores, score), (shifts, shift[0, :, y, x].T)):
                found.append(new[kept])
            scale *= STEP
        boxes, scores, shifts = torch.cat(boxes), torch.cat(scores), torch.cat(shifts)
        kept = nms(boxes, scores, 0.7)
        return squares(moved(boxes[kept], shifts[kept], 0))

    def refine(self, photo: Tensor, boxes: Tensor) -> Tensor:
        """Square boxes (N, 4) -> fewer and better ones."""
        inside, crops = cut(photo, boxes, 24)
        boxes = boxes[inside]
        scores, shifts = in_parts(self.network.rnet, crops, (4,))
        sure = scores > REFINED
        boxes, scores, shifts = boxes[sure], scores[sure], shifts[sure]
        kept = nms(boxes, scores, 0.7)
        return squares(moved(boxes[kept], shifts[kept], 1))

    def judge(self, photo: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Square boxes (N, 4) -> boxes (M, 4), landmarks (M, 5, 2) and scores (M,) of the faces among them."""
        inside, crops = cut(photo, boxes, 48)
        boxes = boxes[inside]
        scores, shifts, _ = in_parts(self.network.onet, crops, (4,), (5, 2))
        sure = scores > self.threshold
        boxes, scores = moved(boxes[sure], shifts[sure], 1), scores[sure]
        kept = apart(boxes, scores, 0.7)
        boxes, scores = boxes[kept], scores[kept]
        inside, points = self.landmarks(photo, boxes)
        return boxes[inside], points, scores[inside]

    def landmarks(self, photo: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Which boxes (N, 4) reach into the photo, (N,), and the landmarks (M, 5, 2) of those.

        The networks of the paper leave it at those of the box before it is moved. Here they are looked for in the final
        box, and are the mean with what a mirror shows: a mirrored photo then gives the same but for a few percent.
        """
        boxes = squares(boxes)
        inside, crops = cut(photo, boxes, 48)
        *_, points = in_parts(self.network.onet, crops, (4,), (5, 2))
        *_, mirrored = in_parts(self.network.onet, crops.flip(-1), (4,), (5, 2))
        mirrored = (mirrored * points.new_tensor([-1, 1]) + points.new_tensor([1, 0]))[:, MIRRORED]
        boxes = boxes[inside]
        sides = boxes[:, 2:] - boxes[:, :2] + 1
        return inside, (points + mirrored) / 2 * sides[:, None] + boxes[:, None, :2] - 0.5  # boxes count pixels from 1


def resized(photo: Tensor, size: list[int]) -> Tensor:
    """Each new pixel is the mean over the old ones that it touches, as the networks were trained with."""
    return F.interpolate(photo[None], size, mode="area")[0]


def cut(photo: Tensor, boxes: Tensor, side: int) -> tuple[Tensor, Tensor]:
    """Which boxes (N, 4) reach into the photo, (N,), and what they show there, (M, 3, side, side)."""
    height, width = photo.shape[-2:]
    left, top = boxes[:, 0].trunc().clamp(min=1), boxes[:, 1].trunc().clamp(min=1)
    right, bottom = boxes[:, 2].trunc().clamp(max=width), boxes[:, 3].trunc().clamp(max=height)
    inside = (right >= left) & (bottom >= top)
    corners = torch.stack([left, top, right, bottom], 1)[inside].long().tolist()
    crops = [resized(photo[:, t - 1 : b, x - 1 : r], [side, side]) for x, t, r, b in corners]
    return inside, torch.stack(crops) if crops else photo.new_zeros(0, 3, side, side)


def in_parts(network: torch.nn.Module, crops: Tensor, *shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    """Runs a network on any number of crops, also none; `shapes` are those of what follows the probabilities."""
    if not len(crops):
        return tuple(crops.new_zeros(0, *shape) for shape in ((), *shapes))
    return tuple(map(torch.cat, zip(*map(network, crops.split(CROPS)), strict=True)))


def moved(boxes: Tensor, shifts: Tensor, pixel: int) -> Tensor:
    """Moves each side by a fraction of the box's; `pixel` is 1 where the last one counts as inside."""
    sides = boxes[:, 2:] - boxes[:, :2] + pixel
    return boxes + shifts * sides.repeat(1, 2)


def squares(boxes: Tensor) -> Tensor:
    """Squares around the boxes, with their centres."""
    sides = boxes[:, 2:] - boxes[:, :2]
    longer = sides.max(1, keepdim=True).values
    corner = boxes[:, :2] + (sides - longer) / 2
    return torch.cat([corner, corner + longer], 1)


def apart(boxes: Tensor, scores: Tensor, most: float) -> Tensor:
    """Indices of the boxes of which at most so much, of the smaller, lies in one with a higher score."""
    order = scores.argsort(descending=True)
    boxes = boxes[order]
    sides = boxes[:, 2:] - boxes[:, :2] + 1
    area = sides.prod(1)
    low = torch.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = torch.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    shared = (high - low + 1).clamp(min=0).prod(-1) / torch.minimum(area[:, None], area[None])
    kept: list[int] = []
    for i in range(len(boxes)):
        if all(shared[i, k] <= most for k in kept):
            kept.append(i)
    return order[torch.tensor(kept, dtype=torch.long, device=order.device)]
