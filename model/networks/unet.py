"""The Stable Diffusion UNet (Rombach et al. 2022, https://arxiv.org/abs/2112.10752).

Attribute names are those of the published Stable Diffusion 2.1 checkpoints.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from diffbir.model.networks.attention import attention
from diffbir.model.networks.layers import SiLU, Upsample, plus, repeat_to, timestep_embedding, zero_module


class ResBlock(nn.Module):
    """Two convolutions with a skip; the timestep embedding is added between them."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int, groups: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, in_channels),
            SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(groups, out_channels),
            SiLU(),
            nn.Identity(),  # published checkpoints count a dropout here
            zero_module(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        if in_channels != out_channels:
            self.skip_connection = nn.Conv2d(in_channels, out_channels, 1)
        else:
            self.skip_connection = nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        """x: (n B, in, H, W), emb: (B, emb_dim) -> (n B, out, H, W)."""
        h = plus(self.in_layers(x), repeat_to(self.emb_layers(emb), len(x))[..., None, None])
        return plus(self.out_layers(h), self.skip_connection(x))


class CrossAttention(nn.Module):
    """Attention of x to a context, or to itself where there is none."""

    def __init__(self, dim: int, context_dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """x: (B, L, dim), context: (B, S, context_dim) -> (B, L, dim)."""
        context = x if context is None else context
        return self.to_out(attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        x, gate = self.proj(x).chunk(2, dim=-1)
        return x * F.gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        # The identity keeps the published numbering, which counts a dropout.
        self.net = nn.Sequential(GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text (left out in a model without text), feed-forward; pre-norm, residual.

    Several texts for each image (classifier-free guidance) part ways here: what comes before is computed once.
    """

    def __init__(self, dim: int, context_dim: int | None, heads: int):
        super().__init__()
        self.attn1 = CrossAttention(dim, dim, heads)
        self.ff = FeedForward(dim)
        self.norm1 = nn.LayerNorm(dim)
        self.norm3 = nn.LayerNorm(dim)
        self.has_text = context_dim is not None
        if self.has_text:
            self.attn2 = CrossAttention(dim, context_dim, heads)
            self.norm2 = nn.LayerNorm(dim)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x: (B, L, dim), context: (n B, S, context_dim) -> (n B, L, dim)."""
        x = plus(self.attn1(self.norm1(x)), x)
        if self.has_text:
            x = repeat_to(x, len(context))
            x = plus(self.attn2(self.norm2(x), context), x)
        return plus(self.ff(self.norm3(x)), x)


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, with linear projections and a skip."""

    def __init__(self, channels: int, context_dim: int | None, heads: int, depth: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context_dim, heads) for _ in range(depth))
        self.proj_out = zero_module(nn.Linear(channels, channels))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """x: (B, C, H, W), context: (n B, L, context_dim) -> (n B, C, H, W)."""
        h = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (B, HW, C)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h).transpose(1, 2).reshape(len(h), *x.shape[1:])
        return plus(h, repeat_to(x, len(h)))


class Downsample(nn.Module):
    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Block(nn.Sequential):
    """Layers in a row; each gets the inputs that its kind takes."""

    def forward(self, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, emb)
            elif isinstance(layer, SpatialTransformer):
                x = layer(x, context)
            else:
                x = layer(x)
        return x


class UNetEncoder(nn.Module):
    """Time embedding, down path and middle: what the UNet and its parallel branch have in common.

    Args:
        in_channels: channels of the input.
        model_channels: width at the finest level.
        channel_mult: width of each level over `model_channels`; each level halves the size of the one before.
        num_res_blocks: residual blocks per level (one more in the up path).
        attention_factors: downsampling factors at which transformers follow the residual blocks.
        head_channels: width of an attention head.
        context_dim: width of the text embedding; None for a model without text.
        transformer_depth: transformer blocks in a row.
        norm_groups: groups of every GroupNorm.
        checkpointing: in training, keeps only what goes from block to block and computes the rest again in the backward
            pass: slower, far less memory.
    """

    packs = True  # layers are only called, so that `model.networks.packed` may replace them

    def __init__(
        self,
        in_channels: int = 4,
        model_channels: int = 320,
        channel_mult: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_factors: Sequence[int] = (1, 2, 4),
        head_channels: int = 64,
        context_dim: int | None = 1024,
        transformer_depth: int = 1,
        norm_groups: int = 32,
        checkpointing: bool = False,
    ):
        super().__init__()
        self.model_channels, self.checkpointing = model_channels, checkpointing
        self.emb_dim, self.norm_groups = 4 * model_channels, norm_groups
        self.time_embed = nn.Sequential(
            nn.Linear(model_channels, self.emb_dim), nn.SiLU(), nn.Linear(self.emb_dim, self.emb_dim)
        )

        self.attention_factors = tuple(attention_factors)
        self._transformer_args = (context_dim, head_channels, transformer_depth, norm_groups)
        channels, factor = model_channels, 1
        self.input_blocks = nn.ModuleList([Block(nn.Conv2d(in_channels, channels, 3, padding=1))])
        self.skip_channels, self.levels = [channels], []
        for i, mult in enumerate(channel_mult):
            width = mult * model_channels
            self.levels.append((width, factor))
            for _ in range(num_res_blocks):
                res = ResBlock(channels, width, self.emb_dim, norm_groups)
                self.input_blocks.append(Block(res, *self._transformers(width, factor)))
                channels = width
                self.skip_channels.append(channels)
            if i < len(channel_mult) - 1:
                self.input_blocks.append(Block(Downsample(channels)))
                self.skip_channels.append(channels)
                factor *= 2
        self.factor = factor  # sizes must be multiples of it
        self.middle_block = Block(
            ResBlock(channels, channels, self.emb_dim, norm_groups),
            self._transformer(channels),
            ResBlock(channels, channels, self.emb_dim, norm_groups),
        )

    def _transformer(self, channels: int) -> SpatialTransformer:
        context_dim, head_channels, depth, groups = self._transformer_args
        return SpatialTransformer(channels, context_dim, channels // head_channels, depth, groups)

    def _transformers(self, channels: int, factor: int) -> list[SpatialTransformer]:
        return [self._transformer(channels)] if factor in self.attention_factors else []

    def run(self, block: Block, x: Tensor, emb: Tensor, context: Tensor | None) -> Tensor:
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(block, x, emb, context, use_reentrant=False)
        return block(x, emb, context)

    def embed(self, t: Tensor) -> Tensor:
        """(B,) -> (B, emb_dim)."""
        return self.time_embed(timestep_embedding(t, self.model_channels).to(self.time_embed[0].weight.dtype))

    def encode(
        self,
        x: Tensor,
        emb: Tensor,
        context: Tensor | None,
        hint: Tensor | None = None,
        blocks: int | None = None,
    ) -> list[Tensor]:
        """Output of every input block, then of the middle block; of the first `blocks` input blocks if given.

        Args:
            x: (B, in_channels, H, W).
            emb: (B, emb_dim).
            context: text, (n B, L, context_dim), or None; from the first transformer on, the batch is n B.
            hint: added after the first convolution, (B, model_channels, H, W), or None.
        """
        features, h = [], x
        for i, block in enumerate(self.input_blocks[:blocks]):
            h = self.run(block, h, emb, context)
            if i == 0 and hint is not None:
                h = h + hint
            features.append(h)
        return features if blocks else [*features, self.run(self.middle_block, h, emb, context)]


class UNet(UNetEncoder):
    """Predicts noise or velocity from a noisy latent.

    Args:
        out_channels: channels of the prediction.
        **encoder: see `UNetEncoder`.
    """

    def __init__(self, in_channels: int = 4, out_channels: int = 4, num_res_blocks: int = 2, **encoder):
        super().__init__(in_channels=in_channels, num_res_blocks=num_res_blocks, **encoder)
        skips, channels = list(self.skip_channels), self.skip_channels[-1]
        self.output_blocks = nn.ModuleList()
        for width, factor in reversed(self.levels):
            for j in range(num_res_blocks + 1):
                layers = [ResBlock(channels + skips.pop(), width, self.emb_dim, self.norm_groups)]
                layers += self._transformers(width, factor)
                if j == num_res_blocks and factor > 1:
                    layers.append(Upsample(width))
                self.output_blocks.append(Block(*layers))
                channels = width
        self.out = nn.Sequential(
            nn.GroupNorm(self.norm_groups, channels),
            SiLU(),
            zero_module(nn.Conv2d(channels, out_channels, 3, padding=1)),
        )

    def forward(
        self, z_t: Tensor, t: Tensor, context: Tensor | None = None, control: Sequence[Tensor] | None = None
    ) -> Tensor:
        """Predicts.

        Args:
            z_t: noisy latent, (B, C, H, W), H and W multiples of `factor`.
            t: timesteps, (B,).
            context: text, (n B, L, context_dim), or None.
            control: one tensor for each skip and one for the middle, added to them.

        Returns:
            (n B, out_channels, H, W), n texts one after the other.
        """
        emb = self.embed(t)
        features = self.encode(z_t, emb, context)
        if control is not None:
            features = [f + c for f, c in zip(features, control, strict=True)]
        *skips, h = features
        return self.out(self.decode(h, skips, emb, context))

    def decode(
        self, h: Tensor, skips: Sequence[Tensor], emb: Tensor, context: Tensor | None, blocks: slice = slice(None)
    ) -> Tensor:
        """The up path, or the part of it that `blocks` names, with as many skips (the last is used first)."""
        for block, skip in zip(self.output_blocks[blocks], reversed(skips), strict=True):
            h = self.run(block, torch.cat([h, repeat_to(skip, len(h))], dim=1), emb, context)
        return h
