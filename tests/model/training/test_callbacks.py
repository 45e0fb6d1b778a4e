"""What trainings log, and options that must not change what they compute."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import pytorch_lightning as L
import torch
from omegaconf import OmegaConf
from pytorch_lightning.plugins.precision import Precision
from safetensors.torch import load_file
from torch import nn

from diffbir.model.training.base import Trainable
from diffbir.model.training.ema import ExportWeights
from diffbir.model.training.flops import count_flops, on_meta
from diffbir.model.training.logging import ImageGrid
from diffbir.model.training.run import build_module, build_trainer
from diffbir.utils.cli import UserError
from diffbir.utils.config import instantiate, load_config
from tests.runs import ROOT, as_shipped, assert_equal, run, scalars, settings, state


def test_what_stage_2_logs(tmp_path):
    run("stage2", tmp_path, 4)
    logged = scalars(tmp_path)
    assert {"train/loss", "train/grad_norm", "lr-AdamW"} <= logged.keys()
    assert {"val/loss", "val/psnr", "val/ssim", "val/lpips"} <= logged.keys()
    assert all(value > 0 for _, value in logged["train/grad_norm"])
    assert all(0 <= value < 1 for _, value in logged["system/data_wait"])
    assert all(value > 0 for _, value in logged["system/images_per_s"])
    assert all(0.1 < value < 20 for _, value in logged["system/memory_gb"])
    left = [value for _, value in logged["system/hours_left"]]
    assert left[-1] == 0 and all(value > 0 for value in left[:-1])
    assert all(value > 0 for _, value in logged["system/tflops"])
    # Of a batch of two: one image in each of two ranges, or both in one. Either way the mean is the batch's loss.
    ranges = ["0-249", "250-499", "500-749", "750-999"]
    bins = {step: [] for step, _ in logged["train/loss"]}
    for step, value in (point for name in ranges for point in logged.get(f"train/loss_t{name}", [])):
        bins[step].append(value)
    for step, loss in logged["train/loss"]:
        assert sum(bins[step]) / len(bins[step]) == pytest.approx(loss, rel=1e-5)


def test_losses_by_timestep_are_means_since_the_last_log(tmp_path):
    run("stage2", tmp_path / "each", 4)
    run("stage2", tmp_path / "second", 4, "trainer.params.log_every_n_steps=4")
    each, second = (scalars(tmp_path / name) for name in ("each", "second"))
    for name in (tag for tag in second if tag.startswith("train/loss_t")):
        assert [step for step, _ in second[name]] == [3]
        low, high = min(v for _, v in each[name]), max(v for _, v in each[name])
        assert low - 1e-6 <= second[name][0][1] <= high + 1e-6


def test_validation_counts_steps_whatever_is_accumulated(tmp_path):
    run("stage1", tmp_path, 4, "validate_every=2", "trainer.params.accumulate_grad_batches=2")
    assert [path.stem for path in sorted((tmp_path / "images").iterdir())] == ["0000002", "0000004"]


def test_compiling_changes_neither_names_nor_results(tmp_path):
    """With the backend that only traces: it needs no compiler, and computes the same."""
    run("stage1", tmp_path / "plain", 2)
    run("stage1", tmp_path / "compiled", 2, "compile={backend: eager}")
    assert_equal(*(state(tmp_path / name, 2)["state_dict"] for name in ("plain", "compiled")), "state_dict")


def test_compiling_reaches_frozen_networks_by_whatever_they_are_called():
    options = [*settings("stage2", Path("runs/never"), 1), "compile={backend: eager}"]
    module = build_module(load_config(ROOT / "configs/train/mini/stage2.yaml", options))
    compiled = 0
    for network in [*module.trained.values(), *module.frozen.values()]:
        methods = getattr(network, "entry_points", ())
        assert network._compiled_call_impl is not None or methods
        for method in methods:
            assert hasattr(getattr(network, method), "_torchdynamo_orig_callable")
            compiled += 1
    assert compiled >= 2  # the autoencoder's
    plain = build_module(load_config(ROOT / "configs/train/mini/stage2.yaml", options[:-1]))
    autoencoders = [m.frozen["autoencoder"] for m in (module, plain)]
    autoencoders[1].load_state_dict(autoencoders[0].state_dict())
    image = torch.rand(1, 3, 32, 32)
    assert torch.equal(*(network.decode(network.encode(image)) for network in autoencoders))


def test_weights_of_some_steps_and_the_best_stay(tmp_path):
    """The score is a line that the test draws: lowest at step 4."""
    options = ["validate_every=2", "ema_decay=0.0", "keep_weights_every=4"]
    config = load_config(ROOT / "configs/train/mini/stage1.yaml", settings("stage1", tmp_path, 6, *options))
    kept = {}

    class Scores(L.Callback):
        def on_validation_epoch_end(self, trainer, module):
            score = torch.tensor({2: 3.0, 4: 1.0, 6: 2.0}[trainer.global_step])
            module.log("val/lpips", score)

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            kept[trainer.global_step] = module.trained["stage1"].norm.weight.detach().clone()

    for node in config.trainer.params.callbacks:
        if node.target.endswith("ExportWeights"):
            node.params.half = False
    trainer = build_trainer(config)
    trainer.callbacks.insert(0, Scores())
    trainer.fit(build_module(config), datamodule=instantiate(config.data, "data"))
    folder = tmp_path / "weights"
    assert sorted(p.name for p in folder.iterdir()) == ["0000004", "best", "stage1.safetensors"]
    for name in ("0000004", "best"):
        assert torch.equal(load_file(folder / name / "stage1.safetensors")["norm.weight"], kept[4])
    last = load_file(folder / "stage1.safetensors")["norm.weight"]
    assert not torch.equal(last, kept[4])
    export = next(c for c in trainer.callbacks if isinstance(c, ExportWeights))
    assert export.state_dict() == {"best_score": 1.0}  # which a resumed run goes on from


def test_an_unknown_score_is_named(tmp_path):
    with pytest.raises(UserError, match=r"best is 'val/lipps', which no validation logs; there are .*val/lpips"):
        run("stage1", tmp_path, 2, "best_weights=val/lipps")


def test_the_operations_of_a_step_are_counted_by_arithmetic():
    """A convolution of 3 x 3 over 8 x 8 positions: forward, gradient of the weight; none of its input is needed."""
    module = Line()
    batch = {"hq": torch.rand(2, 3, 8, 8), "prompt": ["", ""]}
    one = 2 * 2 * 8 * 8 * 5 * 3 * 9
    assert count_flops(on_meta(module), batch) == 2 * one
    assert all(not p.is_meta and p.grad is None for p in module.parameters())


class Line(Trainable):
    def __init__(self):
        super().__init__({"net": nn.Conv2d(3, 5, 3, padding=1)}, {}, torch.optim.SGD)

    def training_step(self, batch, _):
        return self.trained["net"](batch["hq"]).mean()


def test_pictures_also_go_to_weights_and_biases(tmp_path):
    class Recorder(L.loggers.WandbLogger):
        """Its interface, without a run that belongs to it."""

        def __init__(self):
            self.images = []

        def log_image(self, key, images, step=None):
            self.images.append((key, images[0].shape, step))

    logger = Recorder()
    picture = torch.rand(2, 3, 8, 8)
    trainer = SimpleNamespace(
        sanity_checking=False, is_global_zero=True, loggers=[logger], global_step=7, precision_plugin=Precision()
    )
    module = SimpleNamespace(images=lambda batch: {"lq": batch["hq"], "hq": batch["hq"]})
    ImageGrid(str(tmp_path)).on_validation_batch_end(trainer, module, None, {"hq": picture}, 0)
    assert logger.images == [("lq | hq", (2 * 8 + 6, 2 * 8 + 6, 3), 7)]


def test_frozen_networks_in_half_precision_give_almost_the_same_gradient(tmp_path):
    options = [*as_shipped("stage2"), "module.params.train_unet=false"]
    run("stage2", tmp_path / "full", 1, *options)
    run("stage2", tmp_path / "half", 1, *options, "frozen_dtype=bf16")
    full, half = (state(tmp_path / name, 1) for name in ("full", "half"))
    assert full["state_dict"].keys() == half["state_dict"].keys()
    # After one step the first moment is the gradient, but for a factor.
    moments = [[v["exp_avg"].flatten() for v in s["optimizer_states"][0]["state"].values()] for s in (full, half)]
    full, half = (torch.cat(m) for m in moments)
    assert full.norm() > 0
    assert torch.cosine_similarity(full, half, dim=0) > 0.98


def test_a_cpu_without_bf16_trains_in_float32(tmp_path, monkeypatch):
    run("stage1", tmp_path / "float32", 1, "trainer.params.precision=32-true")
    monkeypatch.setattr("diffbir.model.training.run.emulates_bf16", lambda trainer: True)
    run("stage1", tmp_path / "fallback", 1)
    assert OmegaConf.load(tmp_path / "fallback/run.yaml").precision == "32-true"
    assert_equal(*(state(tmp_path / name, 1)["state_dict"] for name in ("float32", "fallback")), "state_dict")
