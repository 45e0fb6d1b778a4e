"""Restores whole photos with their faces: the background by one model, each face, aligned, by one for faces."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from diffbir.faces.align import align, misfit, scaled, similarity
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
        matrix: (2, 3), the map from the restored photo to the aligned face, see `diffbir.faces.align`.
        aligned: (3, 512, 512) in [0, 1], cut from the photo.
        restored: the same, restored; None where the background was left as it is: the result has more pixels there than
            an aligned face, or the landmarks don't form a face.
    """

    face: Face
    matrix: Tensor
    aligned: Tensor
    restored: Tensor | None = None

    @property
    def fits(self) -> bool:
        enlarged = self.matrix[:, :2].det().abs().rsqrt().item()
        return enlarged <= LARGEST and misfit(self.face.points) <= ODDEST


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
        on_stage1: Callable[[Tensor], None] = lambda i_reg: None,
    ) -> FacesResult:
        """See `Restorer.restore`.

        Args:
            on_step: called after the background's steps, and again after those of every batch of faces.
            on_stage1: called for the background only.
        """
        options = options or self.options()
        check_images(images)
        seeds = [options.seed] * len(images) if seeds is None else seeds
        result = self.background.restore(images, options, seeds, on_step, on_stage1)
        y, x = (new / old for new, old in zip(result.image.shape[-2:], images.shape[-2:], strict=True))
        found = [
            [RestoredFace(f, scaled(similarity(f.points), x, y), align(photo, f.points)) for f in self.find(photo)]
            for photo in images
        ]
        places = [(i, k) for i, faces in enumerate(found) for k, face in enumerate(faces) if face.fits]
        for start in range(0, len(places), self.batch):
            part = places[start : start + self.batch]
            crops = torch.stack([found[i][k].aligned for i, k in part])
            restored = self.faces.restore(crops, self.face_options(options), [seeds[i] for i, _ in part], on_step)
            for (i, k), face in zip(part, restored.image, strict=True):
                found[i][k] = replace(found[i][k], restored=face)
        pasted = [
            paste(photo, [(face.restored, face.matrix) for face in faces if face.restored is not None])
            for photo, faces in zip(result.image, found, strict=True)
        ]
        return FacesResult(torch.stack(pasted), result.stage1, result.input, found)

    def face_options(self, options: Options) -> Options:
        """How faces are restored where the background is by `options`."""
        return replace(options if self.own is None else self.own, upscale=1.0, seed=options.seed)

    def find(self, photo: Tensor) -> list[Face]:
        """The faces of a photo (3, H, W), or the one nearest to its centre."""
        faces = self.detector(photo)
        if not self.only_center:
            return faces
        height, width = photo.shape[-2:]
        return sorted(faces, key=lambda f: (f.centre[0] - width / 2) ** 2 + (f.centre[1] - height / 2) ** 2)[:1]
