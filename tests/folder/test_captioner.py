"""Prompts by an image-to-text model: a tiny BLIP as transformers saves it."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import inference
from diffbir.folder.captioner import Captioner
from diffbir.folder.inputs import find_sources
from diffbir.folder.plan import Settings, make_plan
from diffbir.folder.prompts import read_prompts
from diffbir.folder.work import Share, work
from diffbir.model.networks.autoencoder import AutoencoderKL
from diffbir.model.networks.control import LatentBranch
from diffbir.model.networks.text import OpenClipTextEncoder
from diffbir.model.networks.unet import UNet
from diffbir.model.options import Options
from diffbir.model.restorer import Restorer
from diffbir.model.sampling.diffusion import Diffusion
from diffbir.utils.cli import UserError
from diffbir.utils.image import to_uint8
from diffbir.utils.pictures import open_picture
from tests.folder import mixed

transformers = pytest.importorskip("transformers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "cat", "on", "roof", "grey", "photo", "of"]
SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    """With random weights; what it says is nonsense, and depends on the picture."""
    folder = tmp_path_factory.mktemp("blip")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    tokenizer = transformers.BertTokenizer(str(folder / "vocab.txt"), additional_special_tokens=["[DEC]"])
    images = transformers.BlipImageProcessor(size={"height": 32, "width": 32})
    text = {"vocab_size": len(WORDS), "encoder_hidden_size": 32, "max_position_embeddings": 128}
    text |= {"bos_token_id": 5, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0, "initializer_range": 1.0}
    vision = {"image_size": 32, "patch_size": 16, "initializer_range": 1.0}
    torch.manual_seed(0)
    config = transformers.BlipConfig(text_config=text | SMALL, vision_config=vision | SMALL, projection_dim=32)
    transformers.BlipForConditionalGeneration(config).save_pretrained(folder)
    transformers.BlipProcessor(images, tokenizer).save_pretrained(folder)
    return folder


def photos(folder: Path) -> Path:
    for i, name in enumerate("abc"):
        (folder / "in").mkdir(exist_ok=True)
        Image.fromarray(mixed.crop(4 * i)).save(folder / "in" / f"{name}.png")
    return folder / "in"


def test_captions_are_those_of_transformers(blip, tmp_path):
    processor = transformers.BlipProcessor.from_pretrained(blip)
    model, said = transformers.BlipForConditionalGeneration.from_pretrained(blip).eval(), set()
    captioner = Captioner(str(blip))
    for path in photos(tmp_path).iterdir():
        image, _ = open_picture(path)
        inputs = processor(images=Image.open(path), return_tensors="pt")
        tokens = model.generate(**inputs, do_sample=False, max_new_tokens=75)
        caption = captioner(image)
        assert caption == processor.decode(tokens[0], skip_special_tokens=True)
        said.add(caption)
    assert len(said) > 1


def restorer() -> Restorer:
    """Tiny and random, but with a text encoder."""
    torch.manual_seed(0)
    sizes = {"in_channels": 4, "model_channels": 16, "channel_mult": [1], "num_res_blocks": 1, "head_channels": 16}
    sizes |= {"attention_factors": [1], "context_dim": 16, "norm_groups": 4}
    unet, branch = UNet(out_channels=4, **sizes), LatentBranch(**sizes)
    for p in unet.parameters():  # also of layers that start as zero
        nn.init.normal_(p, 0, 0.3)
    return Restorer(
        stage1=nn.Identity(),
        unet=unet,
        branch=branch,
        autoencoder=AutoencoderKL(channels=8, channel_mult=[1, 1], num_res_blocks=1, norm_groups=4),
        text_encoder=OpenClipTextEncoder(width=16, layers=2, heads=2),
        diffusion=Diffusion(),
        defaults=Options(solver="ddim", steps=2, prompt="sharp", color="none"),
    )


def test_a_caption_is_the_prompt_of_images_that_have_none_of_their_own(blip, tmp_path):
    folder, out, model = photos(tmp_path), tmp_path / "out", restorer()
    (folder / "b.txt").write_text("a roof\n")
    sources = find_sources([str(folder)], out)
    settings = Settings({}, vars(model.defaults), captioner=str(blip))
    plan = make_plan(sources, out, settings, read_prompts("sidecar", ("sharp", ""), sources), batch=3)
    out.mkdir()
    captioner = Captioner(str(blip))
    work(Share(out, plan.items, plan.batches, settings), lambda task: model, quiet=True, captioner=captioner)

    lines = {line["output"]: line for line in map(json.loads, out.glob("*jsonl").__next__().read_text().splitlines())}
    assert "caption" not in lines["b.png"] and lines["a.png"]["caption"]
    for name in "abc":
        image, _ = open_picture(folder / f"{name}.png")
        caption = lines[f"{name}.png"].get("caption")
        assert caption == (None if name == "b" else captioner(image))
        # Weights drawn at random may also find nothing to say.
        prompt = "a roof" if name == "b" else f"{caption}, sharp" if caption else "sharp"
        expected = model.restore(image, model.options(prompt=prompt)).image[0]
        other = model.restore(image, model.options(prompt="sharp")).image[0]
        written = np.asarray(Image.open(out / f"{name}.png"))
        assert (written != to_uint8(expected)).mean() < 0.01
        assert (written != to_uint8(other)).mean() > 0.01 or prompt == "sharp"


def test_a_model_without_text_says_so_once_and_loads_no_captioner(tmp_path, capsys):
    (tmp_path / "captioner").mkdir()  # which has nothing in it
    args = ["--input", photos(tmp_path), "--output", tmp_path / "out", "--device", "cpu", "--stage", "1"]
    assert inference.main([*map(str, args), "--captioner", str(tmp_path / "captioner")]) == 0
    assert capsys.readouterr().err.count("this model knows no text") == 1


def test_what_is_missing_is_said_before_anything_is_loaded(tmp_path, monkeypatch, capsys):
    with pytest.raises(UserError, match="nowhere is no folder"):
        Captioner("nowhere")
    with pytest.raises(UserError, match="holds no model that captions images"):
        Captioner(str(tmp_path))(torch.rand(1, 3, 8, 8))
    monkeypatch.setitem(sys.modules, "transformers", None)
    args = ["--input", photos(tmp_path), "--output", tmp_path / "out", "--device", "cpu", "--captioner", tmp_path]
    assert inference.main([*map(str, args)]) == 1
    assert "pip install 'diffbir[captioner]'" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
