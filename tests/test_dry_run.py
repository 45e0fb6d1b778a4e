"""Every training configuration runs from end to end, its networks made tiny."""

import re
from pathlib import Path

import pytest
from pytorch_lightning.strategies import SingleDeviceStrategy

from diffbir.model.training.command import main
from diffbir.utils.config import load_config, read_config

ROOT = Path(__file__).parents[1]
CONFIGS = [
    path
    for folder in ("train", "ablation")
    for path in sorted((ROOT / "configs" / folder).rglob("*.yaml"))
    if "module" in read_config(path)  # base.yaml is a part, and what only restores isn't trained
    and "ablation/mini" not in path.as_posix()  # test_ablation.py trains them
]
TINY = {
    "stage1": {"embed_dim": 12, "depths": [1, 1], "num_heads": [2, 2], "num_feat": 8},
    "autoencoder": {"channels": 32, "num_res_blocks": 1},
    "unet": {"model_channels": 32, "head_channels": 16, "num_res_blocks": 1},
    "text_encoder": {"width": 32, "layers": 2, "heads": 2},
    "discriminator": {"features": 8},
}


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """A folder as scripts/train_mini.sh makes it, of photos that stage 1 and the teacher left as they are."""
    folder = tmp_path_factory.mktemp("pairs")
    for name in ("hq", "reg", "teacher"):
        (folder / name).symlink_to(ROOT / "inputs/demo")
    return folder


def data(path: Path, pairs: Path) -> list[str]:
    if "cached" in path.stem:
        return [f"pairs={pairs}", f"val_pairs={pairs}"]
    return ["photos=inputs/demo"]


def tiny(path: Path, run_dir: Path, pairs: Path) -> list[str]:
    config = load_config(path, data(path, pairs))
    sized = [name for name, node in config.networks.items() if node and "params" in node]
    params = {f"networks.{name}": TINY[name] for name in TINY if name in sized}
    if "diffusion" in config and "discriminator" not in config.networks:
        params["module"] = {"steps": 2}
    params["data"] = {"batch_size": 1, "num_workers": 0}
    params["data.params.train"] = {"crop_size": 64}
    params["data.params.val"] = {"crop_size": 64, "limit": 3}
    overrides = [f"{node}.params.{key}={value}" for node, values in params.items() for key, value in values.items()]
    return [
        *data(path, pairs),
        f"run_dir={run_dir}",
        *(f"weights.{name}=null" for name in config.weights),
        *overrides,
    ]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT / "configs")))
def test_a_dry_run_goes_through_everything_and_leaves_nothing(path, pairs, tmp_path, capsys, caplog, request):
    if any(key in path.read_text() for key in ("feature_heads", "dists_weight", "include: one_step.yaml")):
        request.getfixturevalue("vgg16")
    caplog.set_level("INFO")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/0000001.ckpt").write_bytes(b"of the real run")
    assert main("", str(path), [*tiny(path, tmp_path, pairs), "--dry-run"]) == 0, capsys.readouterr().err
    config = load_config(path, data(path, pairs))
    steps = config.trainer.params.max_steps
    assert f"{steps} steps and {steps // config.validate_every} validations" in caplog.text
    assert "everything ran" in caplog.text
    memory = float(re.search(r"peak memory: ([\d.]+) GB", caplog.text)[1])
    assert 0.2 < memory < 20
    assert [p.name for p in tmp_path.rglob("*")] == ["checkpoints", "0000001.ckpt"]


def test_what_ranks_may_still_read_is_removed_after_all_have_come_to_the_end(pairs, tmp_path, monkeypatch):
    events = []
    barrier = SingleDeviceStrategy.barrier

    def waits(self, *args, **kwargs):
        events.append("wait")
        barrier(self, *args, **kwargs)

    monkeypatch.setattr(SingleDeviceStrategy, "barrier", waits)
    monkeypatch.setattr("diffbir.model.training.dry_run.estimate", lambda *args: events.append("estimate"))
    monkeypatch.setattr("diffbir.model.training.dry_run.shutil.rmtree", lambda *args, **kwargs: events.append("remove"))
    path = ROOT / "configs/train/mini/stage1.yaml"
    assert main("", str(path), [*tiny(path, tmp_path, pairs), "--dry-run"]) == 0
    assert events[events.index("estimate") :] == ["estimate", "wait", "remove"]
