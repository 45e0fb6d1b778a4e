"""Restores whole photos with their faces: the background by one model, each face, aligned, by one for faces."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from diffbir.faces.align import SIDE, align, inverse, misfit, scaled, similarity
from diffbir.faces.detect import Detector, Face
from diffbir.faces.paste import paste
from diffbir.model.options import Options
from diffbir.model.restorer import Restorer, Result
from diffbir.utils.pictures import check_images

BATCH = 4  # faces that are restored at once
LARGEST = 2.0  # pixels of the result over those of the aligned face, above which pasting would lose detail
ODDEST = 60.0  # `misfit` of landmarks, in aligned pixels, above which they aren't those of a face that can be aligned


@dataclass(frozen=True)
class RestoredFace:
    """A face that was found.

    Args:
        face: where, in pixels of the photo before it is enlarged.
        aligned: (3, SIDE, SIDE) in [0, 1], cut from that photo.
        restored: the same, restored; None where the background was left as it is: the face has pixels enough in the
            photo, or its landmarks don't form a face.
    """

    face: Face
    aligned: Tensor
    restored: Tensor | None


@dataclass(frozen=True)
class FacesResult(Result):
    """Args:
    faces: those of each image, from left to right; an empty list where none was found.
    """

    faces: list[list[RestoredFace]]


class FaceRestorer:
    """A `Restorer` for whole photos with faces; it is called in the same ways.

        restorer = FaceRestorer(Restorer.from_preset("v1_general"), Restorer.from_preset("v1_face"), options={})
        restorer("group.jpg", upscale=2).save("restored.png")

    Args:
        background: restores the photo.
        faces: restores aligned faces of 512 pixels; the background's if None.
        detector: finds them, (3, H, W) in [0, 1] -> list of `Face`; the project's own if None.
        options: for faces: changes to the defaults of `faces`; None is the options that the background has. The seed
            is the background's, and faces aren't enlarged.
        only_center: restores just the face nearest to the photo's centre.
        batch: faces that are restored at once.

    Raises:
        UserError: an unknown option, or a value out of range.
    """

    def __init__(
        self,
        background: Restorer,
        faces: Restorer | None = None,
        detector: Callable[[Tensor], list[Face]] | None = None,
        options: Mapping[str, Any] | None = None,
        only_center: bool = False,
        batch: int = BATCH,
    ):
        self.background, self.faces = background, faces or background
        self.detector = detector or Detector(device=background.device)
        self.own = None if options is None else self.faces.options(**options)
        self.only_center, self.batch = only_center, batch

    # Written in terms of `options` and `restore`, which are below.
    __call__, stream = Restorer.__call__, Restorer.stream

    @property
    def device(self) -> torch.device:
        return self.background.device

    @property
    def text_encoder(self) -> torch.nn.Module | None:
        return self.background.text_encoder

    def options(self, **changes: Any) -> Options:
        """See `Restorer.options`."""
        return self.background.options(**changes)

    @torch.inference_mode()
    def restore(
        self,
        images: Tensor,
        options: Options | None = None,
        seeds: Sequence[int] | None = None,
        on_step: Callable[[int, Tensor], None] = lambda i, z_0: None,
    ) -> FacesResult:
        """See `Restorer.restore`.

        Args:
            on_step: called after the background's steps, and again after those of every batch of faces.
        """
        options = options or self.options()
        check_images(images)
        seeds = [options.seed] * len(images) if seeds is None else seeds
        result = self.background.restore(images, options, seeds, on_step)
        found = [self.find(image) for image in images]
        aligned = [[align(image, face.points) for face in faces] for image, faces in zip(images, found, strict=True)]

        grown = [new / old for new, old in zip(result.image.shape[-2:], images.shape[-2:], strict=True)]
        maps = [[scaled(similarity(face.points), grown[1], grown[0]) for face in faces] for faces in found]
        wanted = [[fits(face, matrix) for face, matrix in zip(*pair, strict=True)] for pair in zip(found, maps, strict=True)]
        crops = [x for xs, flags in zip(aligned, wanted, strict=True) for x, flag in zip(xs, flags, strict=True) if flag]
        crop_seeds = [seed for seed, flags in zip(seeds, wanted, strict=True) for flag in flags if flag]
        restored = iter(self.restore_aligned(crops, options, crop_seeds, on_step))
        results = [
            [RestoredFace(face, x, next(restored) if flag else None) for face, x, flag in zip(*one, strict=True)]
            for one in zip(found, aligned, wanted, strict=True)
        ]
        pasted = [
            paste(photo, [(one.restored, m) for one, m in zip(ones, ms, strict=True) if one.restored is not None])
            for photo, ones, ms in zip(result.image, results, maps, strict=True)
        ]
        return FacesResult(torch.stack(pasted), result.stage1, result.input, results)

    def find(self, photo: Tensor) -> list[Face]:
        """The faces of a photo (3, H, W), or the one nearest to its centre."""
        faces = self.detector(photo)
        if not self.only_center:
            return faces
        height, width = photo.shape[-2:]
        return sorted(faces, key=lambda f: (f.centre[0] - width / 2) ** 2 + (f.centre[1] - height / 2) ** 2)[:1]
