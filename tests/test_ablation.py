"""The ablations: every configuration builds, every small one trains, and the bare prior can be guided."""

import functools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.testing import assert_close

from benchmarks import ablation
from diffbir.evaluation.report import from_json
from diffbir.model.build import build_networks
from diffbir.model.presets import load_preset
from diffbir.model.restorer import Restorer
from diffbir.model.training.run import build_module, train
from diffbir.utils.config import instantiate, load_config, read_config
from diffbir.utils.image import list_images, read_rgb, to_tensor
from diffbir.utils.metrics import psnr

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "ablation"
TRAINED = ("no_restoration", "image_controlnet", "latent_branch", "unfrozen_decoder")
RESTORED = ("no_finetuning", "guidance_sweep")
PRIOR = "weights.unet=weights/mini/unet.safetensors"
SMALL = [
    "photos=inputs/demo",
    "data.params.batch_size=2",
    "data.params.num_workers=0",
    "data.params.train.params.crop_size=32",
    "data.params.val.params.crop_size=32",
    "trainer.params.max_steps=2",
]


def run(name: str, run_dir: Path) -> Path:
    start = [] if name == "prior" else [PRIOR]
    train(load_config(FOLDER / "mini" / f"{name}.yaml", [*SMALL, *start, f"run_dir={run_dir}"]))
    return run_dir


def photo(batch: int = 1) -> torch.Tensor:
    g = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(torch.linspace(0, 1, 48), torch.linspace(0, 1, 48), indexing="ij")
    image = torch.stack([x, y, (x > y).float() * 0.8 + 0.1])
    return (image + 0.05 * torch.randn(batch, 3, 48, 48, generator=g)).clamp(0, 1)


def test_there_is_a_small_one_of_every_full_size_one():
    full, mini = ({path.stem for path in folder.glob("*.yaml")} for folder in (FOLDER, FOLDER / "mini"))
    assert full == {*TRAINED, *RESTORED}
    assert mini == full | {"prior", "short"}


@pytest.mark.parametrize("name", TRAINED)
def test_full_size_trainings_build(name):
    config = load_config(FOLDER / f"{name}.yaml", ["photos=inputs/demo"])
    config.weights = {}
    with torch.device("meta"):
        module = build_module(config)
    millions = {"branch": 363.15 if name != "image_controlnet" else 364.2}
    if name == "unfrozen_decoder":
        unet = module.trained["unet"]
        millions["unet"] = sum(p.numel() for part in (unet.output_blocks, unet.out) for p in part.parameters()) / 1e6
    for key, network in module.trained.items():
        trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
        assert trained / 1e6 == pytest.approx(millions[key], abs=0.1)
    assert not any(p.requires_grad for p in module.frozen.parameters())
    assert isinstance(module.frozen["stage1"], torch.nn.Identity) == (name == "no_restoration")


@pytest.mark.parametrize("name", RESTORED)
def test_full_size_presets_build(name):
    config = load_preset(str(FOLDER / f"{name}.yaml"))
    config.weights = {}
    with torch.device("meta"):
        restorer = Restorer.from_config(config, device="meta")
    assert (restorer.network.branch is None) == (name == "no_finetuning")
    assert (restorer.defaults.guidance_scale > 0) == (name == "no_finetuning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Callable[[str], Path]:
    """The folder of a small training of two steps, made once for every name."""
    return functools.cache(lambda name: run(name, tmp_path_factory.mktemp(name)))


@pytest.mark.parametrize("name", TRAINED)
def test_small_trainings_fit_and_drive_inference(name, trained):
    """Two steps; the run's own configuration, with the weights it exported, restores."""
    run_dir = trained(name)
    restorer = Restorer.from_config(load_preset(str(run_dir / "config.yaml")))
    result = restorer.restore(photo(), restorer.options(solver="ddim", steps=2))
    assert result.image.isfinite().all()
    assert torch.equal(result.stage1, result.input) == (name == "no_restoration")
    branch = load_file(run_dir / "weights" / "branch.safetensors")
    assert ("input_hint_block.0.weight" in branch) == (name == "image_controlnet")
    assert (run_dir / "weights" / "unet.safetensors").exists() == (name == "unfrozen_decoder")


def test_the_unfrozen_decoder_is_what_is_trained(trained):
    """Up path and output change, nothing else of the UNet does; the exported file is a whole UNet."""
    run_dir = trained("unfrozen_decoder")
    before = load_file(ROOT / "weights" / "mini" / "unet.safetensors")
    after = load_file(run_dir / "weights" / "unet.safetensors")
    assert before.keys() == after.keys()
    changed = {key for key in before if not torch.equal(before[key], after[key])}
    decoder = {key for key in before if key.startswith(("output_blocks.", "out."))}
    assert changed <= decoder
    assert {key for key in decoder if key.endswith("weight")} <= changed
    (checkpoint,) = (run_dir / "checkpoints").glob("*.ckpt")
    saved = {key.removeprefix("trained.unet.") for key in torch.load(checkpoint, weights_only=True)["state_dict"]}
    assert {key for key in saved if not key.startswith("trained.branch.")} == decoder


def test_other_parts_of_the_unet_are_not_offered():
    config = load_config("configs/train/mini/stage2.yaml", ["photos=inputs/demo", PRIOR])
    with pytest.raises(ValueError, match="true, false or decoder, not 'encoder'"):
        instantiate(config.module)(**build_networks(config), diffusion=None, train_unet="encoder")


@pytest.fixture(scope="module")
def bare() -> Restorer:
    return Restorer.from_config(load_preset(str(FOLDER / "mini" / "no_finetuning.yaml"), overrides=[PRIOR]))


@pytest.mark.parametrize(
    "changes",
    [
        {"guidance_form": "implicit"},
        {"guidance_form": "explicit", "guidance_scale": 8000},
        {"guidance_form": "mean", "solver": "ddpm", "guidance_scale": 8000},
        {"guidance_space": "rgb", "guidance_scale": 1e6},
        {"guidance_region": True},
        {"start": "latent", "start_t": 400},
    ],
    ids=["implicit", "explicit", "mean", "rgb", "region", "partial start"],
)
def test_guidance_alone_drives_the_bare_prior(bare, changes):
    """Without guidance the prior draws pictures that have nothing to do with the input."""
    assert bare.network.branch is None
    options = bare.options(steps=6, **changes)
    guided = bare.restore(photo(), options)
    free = bare.restore(photo(), bare.options(**{**vars(options), "guidance_scale": 0.0}))
    distances = [(result.image - result.stage1).square().mean() for result in (guided, free)]
    assert guided.image.isfinite().all()
    assert distances[0] < 0.7 * distances[1]


def test_a_sweep_is_one_row_for_each_value():
    config = read_config(FOLDER / "mini" / "guidance_sweep.yaml")
    options = Restorer.from_config(load_preset("mini", overrides=["sampling.solver=ddim"])).defaults
    rows = ablation.variants("guidance_sweep", config, options)
    assert [row.guidance_scale for row in rows.values()] == config.sweep.guidance_scale
    assert next(iter(rows)) == "guidance@0"
    assert ablation.variants("no_finetuning", read_config(FOLDER / "no_finetuning.yaml"), options) == {
        "no finetuning": options
    }


def test_one_command_trains_compares_and_goes_on(tmp_path, monkeypatch, capsys):
    """What is done isn't trained again; what was trained otherwise is not passed off as this."""
    monkeypatch.chdir(tmp_path)
    arguments = ["--input", str(ROOT / "inputs/demo"), "--photos", str(ROOT / "inputs/demo"), "--count", "2"]
    arguments += ["--only", "no_restoration", "latent_branch", "guidance_sweep", "--size", "32", "--pictures", "1", "7"]
    arguments += ["--sampling-steps", "2", "--pairs", "4", "--device", "cpu"]
    small = ["data.params.num_workers=0", "data.params.batch_size=2", "data.params.train.params.crop_size=32"]
    assert ablation.main([*arguments, "--steps", "2", *small]) == 0
    written = (tmp_path / "outputs/ablation/report.md").read_text()
    assert written in capsys.readouterr().out
    found = from_json(tmp_path / "outputs/ablation/report.json")
    trained, scales = ["latent branch", "no restoration"], (0, 1e3, 5e3, 2e4, 1e5)
    assert list(found["methods"]) == ["input", "stage 1", *trained, *(f"guidance@{s:g}" for s in scales)]
    assert [(c["a"], c["b"]) for c in found["comparisons"][:2]] == [(t, trained[0]) for t in ("input", "stage 1")]
    made = tmp_path / "outputs/ablation/results"
    stage1 = pictures(made / "stage_1")
    distances = [(pictures(made / f"guidance@{s:g}") - stage1).square().mean() for s in scales]
    assert distances == sorted(distances, reverse=True)
    clean = pictures(made / "clean")
    assert found["methods"]["stage 1"]["summary"]["psnr"]["mean"] == pytest.approx(psnr(stage1, clean).mean().item())
    sizes = {
        name: Image.open(tmp_path / f"outputs/ablation/{name}.jpg").size for name in ("ablation", "guidance_sweep")
    }
    assert sizes == {
        "ablation": (260 * 5 - 4, 278),
        "guidance_sweep": (260 * 8 - 4, 278),
    }  # one photo; there is no other

    checkpoint = tmp_path / "runs/ablation/mini/latent_branch/checkpoints/0000002.ckpt"
    made = checkpoint.stat().st_mtime_ns
    assert ablation.main([*arguments, "--steps", "2", *small]) == 0
    assert checkpoint.stat().st_mtime_ns == made
    again = from_json(tmp_path / "outputs/ablation/report.json")
    assert all(again["methods"][t]["checksum"] == m["checksum"] for t, m in found["methods"].items())
    assert ablation.main([*arguments, "--steps", "3", *small]) == 1
    assert "--fresh trains it anew" in capsys.readouterr().err

    pairs = tmp_path / "runs/ablation/mini/pairs/photos"
    seen = {name: load_config(f"runs/ablation/mini/{name.replace(' ', '_')}/config.yaml").photos for name in trained}
    assert [seen[name].params.lq.rpartition("/")[2] for name in trained] == ["reg", "lq"]
    lq, reg = (pictures(pairs / part) for part in ("lq", "reg"))
    config = load_preset("mini")
    own = build_networks(config, ("stage1",))["stage1"]
    with torch.no_grad():
        assert_close(reg, own(lq).clamp(0, 1), rtol=0, atol=0.51 / 255)


def pictures(folder: Path) -> torch.Tensor:
    return torch.stack([to_tensor(read_rgb(path)) for path in list_images(folder)])
