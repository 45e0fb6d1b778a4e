from pathlib import Path

import numpy as np
import pytest
import pytorch_lightning as L
import torch
from torch.utils.data import Dataset

from dataset.data_module import DataModule
from dataset.shards import Shards, write_shard
from dataset.sources import ImagePairs
from dataset.streams import StreamedPairs
from utils.image import write_png


class Recorder(L.LightningModule):
    """Trains one number and remembers the prompts that it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        self.seen.append(batch["prompt"])
        return self.weight.square()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shards")
    write_png(folder / "a.png", np.zeros((8, 8, 3), np.uint8))
    content = (folder / "a.png").read_bytes()
    for shard, count in enumerate((3, 2, 4)):
        write_shard(
            folder / f"{shard}.tar", [(f"{i}", {"png": content, "txt": b"%d-%d" % (shard, i)}) for i in range(count)]
        )
    return folder


def dataset(kind: str, shards: Path) -> Dataset:
    captions = {"txt": 1}
    if kind == "stream":
        pytest.importorskip("webdataset")
        return StreamedPairs(f"{shards}/{{0..2}}.tar", 8, captions=captions)
    return ImagePairs(Shards(shards, captions), 8)


def fit(data: Dataset, steps: int, folder: Path, workers: int, resume: Path | None = None) -> tuple[list, Path]:
    module = Recorder()
    trainer = L.Trainer(
        max_steps=steps,
        accumulate_grad_batches=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
    )
    trainer.fit(
        module, datamodule=DataModule(data, batch_size=2, num_workers=workers), ckpt_path=resume, weights_only=True
    )
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module.seen, folder / f"{steps}.ckpt"


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", ["indexed", "stream"])
def test_a_resumed_training_sees_the_batches_that_an_uninterrupted_one_does(kind, workers, shards, tmp_path):
    """Ten steps of two batches, past two epochs of nine samples; and three steps, a stop, and seven."""
    whole, _ = fit(dataset(kind, shards), 10, tmp_path, workers)
    first, checkpoint = fit(dataset(kind, shards), 3, tmp_path, workers)
    rest, _ = fit(dataset(kind, shards), 10, tmp_path, workers, checkpoint)
    assert len(whole) == 20
    assert first == whole[:6]
    assert rest == whole[6:]
