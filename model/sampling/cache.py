"""Step caching: neighbouring sampling steps need not compute everything anew.

Features change slowly along the chain, the deep ones most slowly (Ma et al. 2024, DeepCache,
https://arxiv.org/abs/2312.00858). Both reuses trade a little quality for speed; the figures are in docs/sampling.md.
"""

from dataclasses import dataclass, field

from torch import Tensor, nn

from diffbir.model.networks.condition import Condition
from diffbir.model.sampling.denoiser import ControlledUNet

SHALLOW = 3  # input blocks, and as many output blocks, that every step computes


@dataclass
class Kept:
    """What one call of a step left for the same call of later steps."""

    control: list[Tensor] | None = None
    deep: Tensor | None = None
    size: tuple[int, ...] = ()


@dataclass
class Memory:
    """Which step and which call within it (window of a tiled picture) is running."""

    t: float | None = None
    step: int = -1
    call: int = 0
    kept: dict[int, Kept] = field(default_factory=dict)

    def at(self, t: float) -> Kept:
        self.call += 1
        if t != self.t:
            self.t, self.step, self.call = t, self.step + 1, 0
        return self.kept.setdefault(self.call, Kept())

    def forget(self) -> None:
        """The running step begins again, with calls that are not those of the steps before (other windows)."""
        self.call = -1
        self.kept.clear()


class CachedControlledUNet(nn.Module):
    """A `ControlledUNet` for one sampling chain that computes the branch, or all deep blocks, only now and then.

    The calls of a step must come in the same order, and with the same sizes, in every step; where they don't (the
    number of texts changes with the guidance scale), everything is computed. Who cuts a picture anew in the middle of a
    chain tells `memory.forget`: windows of one size may still be other windows.

    Args:
        network: what is run; its weights are shared.
        branch_every: steps per evaluation of the branch; 1 is each.
        deep_every: steps per evaluation of the deep blocks of the UNet; 1 is each. In between, neither the middle nor
            the branch is needed: its last outputs serve for the shallow blocks.
    """

    def __init__(self, network: ControlledUNet, branch_every: int = 1, deep_every: int = 1):
        super().__init__()
        self.network, self.branch_every, self.deep_every = network, branch_every, deep_every
        self.memory = Memory()

    def forward(self, z_t: Tensor, t: Tensor, condition: Condition, strength: float = 1.0) -> Tensor:
        """As `ControlledUNet.forward`."""
        kept, unet, branch = self.memory.at(t[0].item()), self.network.unet, self.network.branch
        size = (len(z_t) if condition.text is None else len(condition.text), *z_t.shape[-2:])
        if kept.size != size:
            kept.control, kept.deep, kept.size = None, None, size
        shallow = self.memory.step % self.deep_every > 0 and kept.deep is not None
        fresh = not shallow and self.memory.step % self.branch_every == 0
        if branch is not None and (fresh or kept.control is None):
            kept.control = [strength * c for c in branch(z_t, t, condition)]

        emb, text = unet.embed(t), condition.text
        features = unet.encode(z_t, emb, text, blocks=SHALLOW if shallow else None)
        if kept.control is not None:
            features = [f + c for f, c in zip(features, kept.control, strict=False)]
        if shallow:
            skips = features
        else:
            *skips, h = features
            kept.deep = unet.decode(h, skips[SHALLOW:], emb, text, slice(None, -SHALLOW))
        h = unet.decode(kept.deep, skips[:SHALLOW], emb, text, slice(-SHALLOW, None))
        return unet.out(h)
