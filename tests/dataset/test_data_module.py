from pathlib import Path

import cv2
import numpy as np
import pytest
import pytorch_lightning as L
import torch
from skimage.data import astronaut
from torch.utils.data import Dataset

from diffbir.dataset.data_module import DataModule
from diffbir.dataset.degradations.batched import Batched
from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.sources.shards import Shards, write_shard
from diffbir.dataset.streams import StreamedPairs
from diffbir.utils.config import instantiate, load_config
from diffbir.utils.image import write_png


class Recorder(L.LightningModule):
    """Trains one number and remembers the prompts and the degraded images that it saw."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen: list[list[str]] = []
        self.hq: list[torch.Tensor] = []
        self.lq: list[torch.Tensor] = []
        self.validated: list[torch.Tensor] = []

    def training_step(self, batch: dict, _: int) -> torch.Tensor:
        self.seen.append(batch["prompt"])
        self.hq += batch.get("hq", [])
        self.lq += batch.get("lq", [])
        return self.weight.square()

    def validation_step(self, batch: dict, _: int) -> None:
        self.validated += batch["lq"]

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


# Degradation on the accelerator


RECIPE = instantiate(load_config("configs/dataset/mini.yaml").degradation)


def deferred(photos: Path, **kwargs) -> ImagePairs:
    return ImagePairs(photos, **{"crop_size": 48, "degradation": RECIPE, "seed": 3, "defer": True, **kwargs})


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for i in range(3):
        write_png(folder / f"{i}.png", astronaut()[80 * i : 80 * i + 64, 150:230].copy())
    return folder


def fit_deferred(data: DataModule, steps: int, **kwargs) -> Recorder:
    module = Recorder()
    quiet = dict.fromkeys(
        ["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary", "use_distributed_sampler"],
        False,
    )
    trainer = L.Trainer(max_steps=steps, accelerator="cpu", num_sanity_val_steps=0, **quiet, **kwargs)
    trainer.fit(module, datamodule=data)
    return module


def assert_same(a: list[torch.Tensor], b: list[torch.Tensor]) -> None:
    """To rounding, which differs with the other images of a batch and may move a JPEG's coefficient by one step."""
    assert len(a) == len(b) > 0
    for x, y in zip(a, b, strict=True):
        assert (x - y).abs().mean() < 0.05 / 255


@pytest.mark.parametrize("batch_size, workers", [(1, 0), (2, 2), (6, 1)])
def test_a_deferred_pair_depends_on_its_seed_alone(photos, batch_size, workers):
    """Twelve draws in batches of any size are the twelve that single images of the same seeds give."""
    dataset = deferred(photos)
    items = [dataset[n] for n in range(12)]
    expected = [Batched(RECIPE)(item["hq"][None], [np.random.default_rng(item["seed"])])[0] for item in items]
    seen = fit_deferred(DataModule(dataset, batch_size=batch_size, num_workers=workers), 12 // batch_size).lq
    assert_same(seen, expected)
    assert len({item["seed"] for item in items}) == 12
    for item, lq in zip(items, seen, strict=True):
        assert 0.002 < (item["hq"] - lq).abs().mean() < 0.3


def test_a_validation_set_has_its_own_degradation_on_the_accelerator(photos):
    noise = {"target": "dataset.degradations.noise.RandomNoise", "params": {"sigma": [0, 0]}}
    params = {
        "blur": {"target": "dataset.degradations.blur.RandomBlur", "params": {"sizes": [7, 7], "kinds": {"iso": 1}}}
    }
    params["blur"]["params"] |= {"sigma": [1, 1], "prob": 0}
    plain = instantiate(
        {"target": "dataset.degradations.recipes.Classical", "params": {**params, "scale": [1], "noise": noise}}
    )
    val = deferred(photos, degradation=plain, crop="centre", flip=False, shuffle=False, limit=2)
    module = fit_deferred(DataModule(deferred(photos), val, batch_size=2, num_workers=0), 2, val_check_interval=2)
    assert len(module.validated) == 2
    for n, lq in enumerate(module.validated):  # this one changes nothing
        torch.testing.assert_close(lq, val[n]["hq"], rtol=0, atol=1e-6)


def test_a_stream_can_defer_too(shards):
    stream = StreamedPairs(f"{shards}/{{0..2}}.tar", 8, RECIPE, defer=True)
    item = next(iter(stream))
    assert item.keys() == {"hq", "prompt", "seed"}
    assert next(iter(stream))["seed"] == item["seed"]
    assert len(fit_deferred(DataModule(stream, batch_size=2, num_workers=0), 2).lq) == 4


class Numbered(Dataset):
    """Draw n is its own number."""

    def __getitem__(self, n: int) -> dict:
        return {"prompt": str(n)}


def test_a_run_that_goes_on_with_another_batch_size_uses_every_draw_once(tmp_path):
    """As after a move from 8 to 4 ranks: what was used is counted in draws, not in steps."""
    seen = []
    for steps, batch in ((2, 3), (4, 2), (5, 4)):
        recorder, options = Recorder(), {"enable_progress_bar": False, "logger": False, "enable_model_summary": False}
        checkpoint = tmp_path / "last.ckpt"
        trainer = L.Trainer(max_steps=steps, accelerator="cpu", enable_checkpointing=False, **options)
        data = DataModule(Numbered(), batch_size=batch, num_workers=0)
        trainer.fit(recorder, datamodule=data, ckpt_path=checkpoint if seen else None, weights_only=True)
        trainer.save_checkpoint(checkpoint)
        seen += [int(prompt) for prompts in recorder.seen for prompt in prompts]
    assert seen == list(range(2 * 3 + 2 * 2 + 1 * 4))


# Loader processes


class Threads(Dataset):
    """Draw n tells how many threads OpenCV has in the process that makes it."""

    def __getitem__(self, n: int) -> dict:
        return {"prompt": str(cv2.getNumThreads())}


def test_opencv_takes_no_threads_in_loader_processes():
    before = cv2.getNumThreads()
    cv2.setNumThreads(3)
    try:
        seen = fit_deferred(DataModule(Threads(), batch_size=1, num_workers=2), 4).seen
        assert cv2.getNumThreads() == 3
    finally:
        cv2.setNumThreads(before)
    assert seen == [["1"]] * 4


@pytest.mark.parametrize("prefetch", [1, 3])
def test_every_loader_process_has_so_many_batches_ahead(prefetch, photos):
    module = DataModule(ImagePairs(photos, 32), batch_size=2, num_workers=2, prefetch=prefetch)
    fit_deferred(module, 1)
    assert module.trainer.train_dataloader.prefetch_factor == prefetch


@pytest.mark.parametrize("defer", [False, True])
def test_pairs_travel_as_bytes_and_arrive_as_they_were(photos, defer):
    data = DataModule(deferred(photos, defer=defer), batch_size=2, num_workers=1)
    module = fit_deferred(data, 3)
    (raw, *_), expected = data.trainer.train_dataloader, [data.train[n] for n in range(6)]
    assert raw["hq"].dtype == torch.uint8
    assert defer or raw["lq"].dtype == torch.uint8
    assert torch.equal(torch.stack(module.hq), torch.stack([item["hq"] for item in expected]))
    if not defer:
        assert torch.equal(torch.stack(module.lq), torch.stack([item["lq"] for item in expected]))
