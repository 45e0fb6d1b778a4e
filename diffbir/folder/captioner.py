"""Prompts from a model that tells what a picture shows, by transformers."""

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from diffbir.utils.cli import UserError
from diffbir.utils.image import to_uint8

QUESTION = "Describe this image in one sentence."  # for models that answer
TOKENS = 75  # of a caption, as many as text encoders read


@dataclass
class Captioner:
    """Captions of pictures, each by itself; processes load the model when they first need it.

    Args:
        path: folder of an image-to-text model (BLIP and the like), or of one that answers questions about images, as
            transformers saves it. Nothing is fetched, and no code in it runs.
        device: where it computes.

    Raises:
        UserError: transformers is missing, or the folder.
    """

    path: str
    device: Any = "cpu"
    loaded: tuple[Any, Any] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if importlib.util.find_spec("transformers") is None:
            raise UserError("--captioner needs another package: pip install 'diffbir[captioner]'")
        if not Path(self.path).expanduser().is_dir():
            raise UserError(f"--captioner {self.path} is no folder; give one that transformers has saved a model to")

    @torch.no_grad()
    def __call__(self, image: Tensor) -> str:
        """What an image shows, (1, 3, H, W) in [0, 1], in one line.

        Raises:
            UserError: the folder holds no such model.
        """
        if self.loaded is None:
            self.loaded = self.load()
        processor, model = self.loaded
        picture, asked = {"images": Image.fromarray(to_uint8(image[0]))}, 0
        if getattr(processor, "chat_template", None):
            content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
            message = {"role": "user", "content": content}
            picture["text"] = processor.apply_chat_template([message], add_generation_prompt=True)
        inputs = processor(**picture, return_tensors="pt").to(self.device)
        if "text" in picture:
            asked = inputs["input_ids"].shape[1]  # which the answer repeats
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=TOKENS)
        (text,) = processor.batch_decode(tokens[:, asked:], skip_special_tokens=True)
        return " ".join(text.split())

    def load(self) -> tuple[Any, Any]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        where = Path(self.path).expanduser()
        try:
            processor = AutoProcessor.from_pretrained(where, local_files_only=True)
            model = AutoModelForImageTextToText.from_pretrained(where, local_files_only=True)
        except Exception as error:  # it raises whatever its many parts raise
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"--captioner {self.path} holds no model that captions images ({reason})") from error
        return processor, model.eval().to(self.device)
