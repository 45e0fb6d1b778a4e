"""Text encoders: prompts -> (B, L, D), or None for models without text."""

from collections.abc import Sequence

import open_clip
import torch
from torch import Tensor, nn


class OpenClipTextEncoder(nn.Module):
    """The text tower of an OpenCLIP model, built without downloads; by default ViT-H/14, as in Stable Diffusion 2.1.

    Embeddings are the output of the layer before the last, then the final norm.

    Args:
        width, layers, heads: dimensions of the transformer.
        context_length: tokens per prompt; longer prompts are cut.
        vocab_size: size of the CLIP vocabulary.
    """

    def __init__(
        self, width: int = 1024, layers: int = 24, heads: int = 16, context_length: int = 77, vocab_size: int = 49408
    ):
        super().__init__()
        self.model = open_clip.transformer.TextTransformer(
            context_length, vocab_size, width, heads, layers, output_dim=width, output_tokens=True
        )
        self.model.logit_scale = nn.Parameter(torch.zeros(()))  # unused; published files carry it
        # Real also where the network is built on the meta device: it isn't in the weight file.
        self.model.attn_mask = torch.full((context_length, context_length), -torch.inf, device="cpu").triu(1)
        self.tokenize = open_clip.SimpleTokenizer(context_length=context_length)

    def forward(self, prompts: Sequence[str]) -> Tensor:
        """B prompts -> (B, context_length, width)."""
        clip = self.model
        tokens = self.tokenize(list(prompts)).to(clip.positional_embedding.device)
        x = clip.token_embedding(tokens) + clip.positional_embedding  # (B, L, D)
        mask = clip.attn_mask.to(x)
        for block in clip.transformer.resblocks[:-1]:
            x = block(x, attn_mask=mask)
        return clip.ln_final(x)


class NullTextEncoder(nn.Module):
    """For models without text."""

    def forward(self, prompts: Sequence[str]) -> None:
        return None
