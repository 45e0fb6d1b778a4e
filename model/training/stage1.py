"""Training of stage 1, degradation removal."""

from torch import Tensor, nn

from diffbir.model.training.base import Trainable
from diffbir.utils.metrics import psnr


def mse(x: Tensor, y: Tensor) -> Tensor:
    """Mean squared error per image: (B,)."""
    return (x - y).float().square().mean(dim=(1, 2, 3))


def mae(x: Tensor, y: Tensor) -> Tensor:
    """Mean absolute error per image: (B,)."""
    return (x - y).float().abs().mean(dim=(1, 2, 3))


def psnr_loss(x: Tensor, y: Tensor) -> Tensor:
    """-PSNR in nepers of the squared error, log MSE, per image: (B,).

    Every image counts by its relative error, so lightly degraded ones are not drowned by the hopeless.
    """
    return mse(x, y).add(1e-8).log()


LOSSES = {"l1": mae, "l2": mse, "psnr": psnr_loss}


class Stage1(Trainable):
    """Regresses the clean image: I_reg = network(I_lq), L2 loss (DiffBIR, equation 2), L1 or -PSNR.

    Args:
        stage1: the network, (B, 3, H, W) -> (B, 3, H, W) in [0, 1].
        loss: 'l2', 'l1' or 'psnr'.
    """

    def __init__(self, stage1: nn.Module, loss: str = "l2", **kwargs):
        super().__init__({"stage1": stage1}, {}, **kwargs)
        if loss not in LOSSES:
            raise ValueError(f"loss must be one of {', '.join(LOSSES)}, not '{loss}'")
        self.loss = LOSSES[loss]

    def training_step(self, batch: dict, _: int) -> Tensor:
        loss = self.loss(self.trained["stage1"](batch["lq"]), batch["hq"]).mean()
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict, _: int) -> None:
        restored = self.trained["stage1"](batch["lq"])
        figures = {"loss": self.loss(restored, batch["hq"]), "psnr_lq": psnr(batch["lq"], batch["hq"])}
        self.log_means(batch, prog_bar=False, **figures)
        self.log_scores(batch, restored)

    def images(self, batch: dict) -> dict[str, Tensor]:
        return {"lq": batch["lq"], "stage 1": self.trained["stage1"](batch["lq"]), "hq": batch["hq"]}
