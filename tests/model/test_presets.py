"""Presets: names, tasks, other first stages, and the configurations of trainings."""

from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from diffbir.model.presets import PRESETS, STAGE1, load_preset, names
from diffbir.model.restorer import Restorer
from diffbir.model.weights.checkpoint import save_weights
from diffbir.utils.cli import UserError


@pytest.mark.parametrize(
    "preset, task, network, file",
    [
        ("v1_general", None, "SwinIR", "general_swinir_v1.ckpt"),
        ("v1_face", None, "SwinIR", "face_swinir_v1.ckpt"),
        ("v2", None, "RRDBNet", "BSRNet.pth"),
        ("v2", "sr", "RRDBNet", "BSRNet.pth"),
        ("v2", "face", "SwinIR", "face_swinir_v1.ckpt"),
        ("v2", "denoise", "SCUNet", "scunet_color_real_psnr.pth"),
        ("v2.1", "sr", "SwinIR", "realesrgan_s4_swinir_100k.pth"),
        ("v2.1", "face", "SwinIR", "face_swinir_v1.ckpt"),
    ],
)
def test_each_version_and_task_has_its_stage_1(preset, task, network, file):
    config = load_preset(preset, task)
    assert config.networks.stage1.target.endswith(f".{network}")
    assert config.weights.stage1 == f"weights/{file}"


def test_versions_differ_in_schedule_solver_and_prompts():
    v1, v2, v21 = (load_preset(name) for name in ("v1_general", "v2", "v2.1"))
    assert (v1.diffusion.params.prediction, v1.sampling.solver, v1.sampling.steps) == ("eps", "ddpm", 50)
    assert "cfg_scale" not in v1.sampling
    assert (v2.sampling.cfg_scale, v2.sampling.negative_prompt[:11]) == (4, "low quality")
    assert v21.diffusion.params == {"prediction": "v", "zero_terminal_snr": True}
    assert (v21.sampling.solver, v21.sampling.steps) == ("dpmpp_3m_sde", 10)


@pytest.mark.parametrize("stage1", names(STAGE1))
@pytest.mark.parametrize("preset", names(PRESETS))
def test_any_stage_1_goes_in_front_of_any_preset(preset, stage1):
    config = load_preset(preset, stage1=stage1)
    alone = OmegaConf.load(STAGE1 / f"{stage1}.yaml")
    assert config.weights.stage1 == alone.weights.stage1
    assert config.weights.unet == load_preset(preset).weights.unet


def test_a_yaml_may_be_given_as_a_path():
    path, stage1 = PRESETS / "mini.yaml", STAGE1 / "bsrnet.yaml"
    assert load_preset(path) == load_preset(str(path)) == load_preset("mini")
    assert load_preset(path, stage1=stage1) == load_preset("mini", stage1="bsrnet")


@pytest.mark.parametrize(
    "args, words",
    [
        (dict(preset="v9"), "no preset 'v9'; give one of lora_one_step, mini"),
        (dict(preset="mini", task="sr"), "no task 'sr'; it has no tasks"),
        (dict(preset="v2", task="art"), "no task 'art'; it knows sr, face, denoise"),
        (dict(preset="v2", stage1="bsr"), "no stage 1 'bsr'"),
        (dict(preset="v2", overrides=["sampling.stepps=3"]), "unknown key 'sampling.stepps'"),
    ],
)
def test_bad_requests_are_named(args, words):
    with pytest.raises(UserError, match=words):
        load_preset(**args)


def test_the_yaml_of_a_training_drives_inference_with_the_weights_it_exported(tmp_path):
    """Unchanged: its data may even be left open, and where it has not exported a network the start is used."""
    overrides = [f"run_dir={tmp_path}", "weights.branch=weights/mini/branch.safetensors"]
    overrides += ["weights.unet=weights/mini/unet.safetensors"]
    x, seen = torch.rand(1, 3, 32, 32), {}
    for step in ("before", "after"):
        restorer = Restorer.from_config(load_preset("configs/train/mini/stage2.yaml", overrides=overrides))
        state = {k: torch.zeros_like(v) for k, v in restorer.network.branch.state_dict().items()}
        seen[step] = restorer.restore(x, restorer.options(steps=2)).image
        save_weights(state, tmp_path / "weights" / "branch.safetensors")
    # The file given by hand goes before the exported one.
    assert torch.equal(seen["before"], seen["after"])
    restorer = Restorer.from_config(
        load_preset("configs/train/mini/stage2.yaml", overrides=[overrides[0], overrides[2]])
    )
    assert all(not p.any() for p in restorer.network.branch.parameters())
    assert not torch.equal(restorer.restore(x, restorer.options(steps=2)).image, seen["before"])


def test_a_training_of_stage_1_serves_for_stage_1_alone(tmp_path):
    config = load_preset("configs/train/mini/stage1.yaml", overrides=["weights.stage1=weights/mini/stage1.safetensors"])
    restorer = Restorer.from_config(config, stage="1")
    x = torch.rand(1, 3, 24, 24)
    assert restorer.restore(x, restorer.options(stage="1")).image.shape == x.shape
    with pytest.raises(UserError, match="holds stage 1 alone"):
        restorer.restore(x)
    with pytest.raises(UserError, match="missing key 'diffusion'"):
        Restorer.from_config(config)


def test_the_table_of_files_and_its_readme_name_the_same_files():
    from diffbir.model.weights.published import table

    readme = Path("weights/README.md").read_text()
    for name, file in table().items():
        assert f"| `{name}` | {file.holds} |" in readme
    for preset in names(PRESETS):
        for path in load_preset(preset).weights.values():
            assert path.startswith("weights/mini/") or Path(path).name in table()
