"""One-step training: what it computes against its parts, what it trains, and that it resumes to the bit."""

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.testing import assert_close

from diffbir.model.networks.condition import Condition
from diffbir.model.networks.lora import factors, merge_lora
from diffbir.model.training.one_step import OneStepTraining, off_grid, plain
from diffbir.model.training.run import build_module, train
from diffbir.model.weights.checkpoint import save_weights
from diffbir.utils.cli import UserError
from diffbir.utils.config import load_config
from diffbir.utils.metrics import psnr
from tests.runs import PHOTOS, ROOT, TINY, assert_equal, state

N = 2
SETTINGS = [
    *TINY,
    f"photos={PHOTOS}",
    "data.params.num_workers=0",
    "networks.stage1.params.depths=[2]",
    "networks.stage1.params.num_heads=[2]",
    "networks.autoencoder.params.channels=8",
    "networks.unet.params.model_channels=16",
    "networks.unet.params.head_channels=16",
    "networks.discriminator.params.features=4",
    *(f"weights.{name}=null" for name in ("stage1", "autoencoder", "unet", "branch")),
    "lr_schedule.params.max_lr=[0.001,0.001]",
    *(f"module.params.{key}" for key in ("lora=null", "train_decoder=false", "dists_weight=0.0")),
    "module.params.warm_up=1",
    "module.params.ramp=2",
    f"checkpoint_every={N}",
]


def config(run_dir: Path = Path("runs/never"), steps: int = 2 * N, *overrides: str):
    length = [f"run_dir={run_dir}", f"trainer.params.max_steps={steps}", f"validate_every={steps}"]
    return load_config(ROOT / "configs/train/mini/one_step.yaml", [*SETTINGS, *length, *overrides])


def module(*overrides: str) -> OneStepTraining:
    torch.manual_seed(0)
    return build_module(config(Path("runs/never"), 2 * N, *overrides))


def batch() -> dict:
    torch.manual_seed(1)
    return {"lq": torch.rand(2, 3, 32, 32), "hq": torch.rand(2, 3, 32, 32), "prompt": ["", ""]}


@pytest.mark.parametrize("lora", [None, 2])
def test_a_resumed_training_is_the_uninterrupted_one_to_the_bit(lora, tmp_path):
    """Generator, discriminator, vectors of the spectral norms, both groups of moments, average, exported files."""
    options = ["lr_schedule=null", *([f"module.params.lora={{unet: {lora}, branch: {lora}}}"] if lora else [])]
    train(config(tmp_path / "whole", 2 * N, *options))
    train(config(tmp_path / "parts", N, *options))
    train(config(tmp_path / "parts", 2 * N, *options, "resume=auto"))
    whole, parts = (state(tmp_path / name, 2 * N) for name in ("whole", "parts"))
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert_equal(whole[part], parts[part], part)
    assert_equal(whole["callbacks"]["EMA"], parts["callbacks"]["EMA"], "EMA")
    (optimizer,) = whole["optimizer_states"]
    assert [len(group["params"]) > 0 for group in optimizer["param_groups"]] == [True, True]
    assert any(key.startswith("discriminator.") and key.endswith("._u") for key in whole["state_dict"])
    for name in ("unet", "branch"):
        files = (load_file(tmp_path / run / "weights" / f"{name}.safetensors") for run in ("whole", "parts"))
        assert_equal(*files, name)
    logged = EventAccumulator(str(tmp_path / "whole" / "logs")).Reload().Tags()["scalars"]
    terms = ("reconstruction", "lpips", "adversarial", "discriminator", "accuracy")
    assert {f"train/{name}" for name in terms} <= set(logged)


def test_what_is_exported_has_the_network_s_own_names_and_no_discriminator(tmp_path):
    train(config(tmp_path, 2, "module.params.lora={unet: 2}"))
    assert sorted(p.stem for p in (tmp_path / "weights").glob("*.safetensors")) == ["branch", "lora", "unet"]
    exported = load_file(tmp_path / "weights/unet.safetensors")
    assert exported.keys() == module().trained["unet"].state_dict().keys()
    average = state(tmp_path, 2)["callbacks"]["EMA"]["average"]
    assert average and all(key.startswith("trained.") for key in average)


def test_the_exported_additions_make_the_exported_network_of_the_one_they_were_trained_on(tmp_path):
    decoder = "module.params.train_decoder=true"
    start = {name: network.state_dict() for name, network in module(decoder).trained.items()}
    files = {}
    for name, weights in start.items():
        files[name] = tmp_path / f"{name}.safetensors"
        save_weights(weights, files[name])
    given = [f"weights.{name}={file}" for name, file in files.items()]
    high = ["lr_schedule=null", "lr=0.01"]  # so that half precision sees a change
    lora = "module.params.lora={unet: 2, branch: 3, autoencoder: 2}"
    train(config(tmp_path / "run", 2, decoder, lora, *given, *high))
    additions = load_file(tmp_path / "run/weights/lora.safetensors")
    assert {key.partition(".")[0] for key in additions} == {"unet", "branch", "autoencoder"}
    assert not any(".encoder." in key for key in additions)
    for name, network in module(decoder).trained.items():
        network.load_state_dict(start[name])
        own = {k.removeprefix(f"{name}."): v for k, v in additions.items() if k.startswith(f"{name}.")}
        merge_lora(network, own)
        exported = load_file(tmp_path / "run/weights" / f"{name}.safetensors")
        moved = 0.0
        for key, value in network.state_dict().items():
            assert_close(value, exported[key].float(), rtol=1e-3, atol=1e-5)
            moved += float((value - start[name][key]).abs().sum())
        assert moved > 0.01


def test_a_training_begins_with_the_additions_of_another(tmp_path):
    adapted = ["module.params.train_decoder=true", "module.params.lora={unet: 2, branch: 2, autoencoder: 2}"]
    first = module(*adapted)
    for p in first.trained.parameters():
        p.data += 0.05 * torch.randn_like(p) * p.requires_grad
    additions = {f"{n}.{k}": v for n, m in first.trained.items() for k, v in factors(m.state_dict(), m).items()}
    save_weights(additions, tmp_path / "lora.safetensors")
    start = f"module.params.start={tmp_path / 'lora.safetensors'}"
    second, b = module(*adapted, start), batch()
    with torch.no_grad():
        expected = first.generate(b)[0]
        assert_close(second.generate(b)[0], expected)
        assert (module(*adapted).generate(b)[0] - expected).abs().max() > 1e-3
    with pytest.raises(UserError, match=r"module\.params\.start: .*lora\.safetensors, branch: .* is no layer"):
        module("module.params.train_decoder=true", "module.params.lora={unet: 2, autoencoder: 2}", start)


def test_a_training_begins_with_the_discriminator_in_the_checkpoint_of_another(tmp_path):
    """With the vectors of its spectral norms, which are no parameters."""
    train(config(tmp_path, 2))
    saved = {k: v for k, v in state(tmp_path, 2)["state_dict"].items() if k.startswith("discriminator.")}
    second = module(f"weights.discriminator={tmp_path}/checkpoints/{2:07d}.ckpt").discriminator.state_dict()
    assert any(key.endswith("._u") for key in second)
    assert_equal({f"discriminator.{k}": v for k, v in second.items()}, saved, "discriminator")


def test_dists_looks_at_some_pictures(vgg16):
    m, b, logged = module("module.params.dists_weight=0.6", "module.params.dists_images=1"), batch(), {}
    m.log_dict = lambda *args, **kwargs: None
    m.log = lambda name, value, **kwargs: logged.update({name: value})
    m._trainer = type("Trainer", (), {"global_step": 0})()
    m.training_step(b, 0)
    with torch.no_grad():
        assert_close(logged["train/dists"], m.dists(m.generate(b)[0][:1], b["hq"][:1]).mean())


def test_a_network_that_cannot_be_adapted_is_refused():
    with pytest.raises(ValueError, match="lora knows branch, unet, which are trained, not 'autoencoder'"):
        module("module.params.lora={autoencoder: 2}")


def test_one_pass_from_the_clean_latent_and_the_residual_in_its_parts():
    m, b = module(), batch()
    for p in m.trained.parameters():  # the branch begins at zero
        p.data += 0.02 * torch.randn_like(p)
    with torch.no_grad():
        i_reg = m.frozen["stage1"](b["lq"]).clamp(0, 1)
        latent = m.frozen["autoencoder"].encode(i_reg)
        t = torch.full((2,), 200)
        condition = Condition(latent, m.frozen["text_encoder"](b["prompt"]), i_reg)
        v = m.trained["unet"](latent, t, condition.text, m.trained["branch"](latent, t, condition))
        alpha_bar = float(m.diffusion.alpha_bar[200])
        z_0 = alpha_bar**0.5 * latent - (1 - alpha_bar) ** 0.5 * v  # Salimans and Ho 2022, appendix D
        decode = m.frozen["autoencoder"].decode
        expected = i_reg + decode(z_0) - decode(latent)
        assert_close(m.generate(b)[0], expected)
        assert (expected - i_reg).abs().mean() > 1e-4
        assert_close(m.restore(b).image, expected.clamp(0, 1))  # and inference computes the same
        plain = module("module.params.residual=false")
        plain.load_state_dict(m.state_dict(), strict=False)
        assert_close(plain.generate(b)[0], decode(z_0))


def test_the_generator_learns_against_the_discriminator_and_not_through_it():
    """Its loss moves no weight of the discriminator, the discriminator's none of the generator."""
    m, b = module(), batch()
    m.log_dict = lambda *args, **kwargs: None
    generator, discriminator = m.adversary(m.generate(b)[0], b["hq"])
    generator.backward(retain_graph=True)
    assert all(p.grad is None for p in m.discriminator.parameters())
    grads = [p.grad.clone() for p in m.trained.parameters() if p.grad is not None]
    assert sum(float(g.abs().sum()) for g in grads) > 0
    discriminator.backward()
    assert all(p.grad is not None for p in m.discriminator.parameters())
    for grad, p in zip(grads, (p for p in m.trained.parameters() if p.grad is not None), strict=True):
        assert torch.equal(grad, p.grad)


def minus_psnr(x, y):
    """In nepers of the squared error."""
    return -0.1 * math.log(10) * psnr(x, y).mean()


@pytest.mark.parametrize("reconstruction, function", [("l1", F.l1_loss), ("l2", F.mse_loss), ("psnr", minus_psnr)])
def test_the_loss_is_the_stated_sum(reconstruction, function):
    weights = {"reconstruction_weight": 0.4, "plain_weight": 0.6, "lpips_weight": 0.7}
    weights |= {"adversarial_weight": 0.3, "warm_up": 10, "ramp": 20}
    m = module(
        f"module.params.reconstruction={reconstruction}", *(f"module.params.{k}={v}" for k, v in weights.items())
    )
    b, logged = batch(), {}
    b["hq"] = 0.4 + 0.01 * b["hq"]  # plain
    m.log_dict = lambda values, **kwargs: logged.update(values)
    m.log = lambda name, value, **kwargs: logged.update({name: value})
    for step, share in [(0, 0.0), (10, 0.0), (15, 0.25), (30, 1.0), (99, 1.0)]:
        m._trainer = type("Trainer", (), {"global_step": step})()
        torch.manual_seed(step)
        loss = m.training_step(b, 0)
        fake, i_reg = m.generate(b)
        assert_close(i_reg, m.frozen["stage1"](b["lq"]).clamp(0, 1))
        torch.manual_seed(step)
        expected = 0.4 * function(fake, b["hq"]) + 0.7 * m.lpips(*off_grid(fake, b["hq"])).mean()
        expected = expected + 0.6 * (plain(b["hq"]) * (fake - i_reg).abs()).mean()
        expected = expected + 0.3 * share * logged["train/adversarial"]
        assert_close(logged["train/loss"], expected)
        assert_close(loss, expected + logged["train/discriminator"])


def test_a_teacher_s_weight_fades():
    m, b, losses = module("module.params.teacher_weight=0.8", "module.params.teacher_steps=40"), batch(), {}
    b["teacher"] = b["hq"].flip(-1)
    m.log_dict = m.log = lambda *args, **kwargs: None
    fake, _ = m.generate(b)
    for step in (0, 10, 40, 99):
        m._trainer = type("Trainer", (), {"global_step": step})()
        for m.teacher_weight in (0.8, 0.0):
            torch.manual_seed(step)
            losses[m.teacher_weight] = m.training_step(b, 0)
        torch.manual_seed(step)
        off_grid(fake, b["hq"])
        distance = (fake - b["teacher"]).abs().mean() + m.lpips(*off_grid(fake, b["teacher"])).mean()
        assert distance > 0.1
        assert_close(losses[0.8] - losses[0.0], 0.8 * max(0.0, 1 - step / 40) * distance, rtol=1e-3, atol=1e-5)


def test_a_teacher_that_the_data_lacks_is_refused():
    m = module("module.params.teacher_weight=0.8", "module.params.teacher_steps=40")
    m.log_dict = m.log = lambda *args, **kwargs: None
    m._trainer = type("Trainer", (), {"global_step": 0})()
    with pytest.raises(UserError, match=r"module\.params\.teacher_weight: .* `teacher`"):
        m.training_step(batch(), 0)


def test_skies_are_plain_and_textures_are_not():
    photo = torch.full((1, 3, 32, 64), 0.5) + torch.linspace(0, 0.1, 64)  # a sky ...
    photo[..., 32:] += 0.3 * (torch.arange(32) // 2 % 2)  # ... and stripes
    weight = plain(photo)
    assert weight.shape == (1, 1, 32, 64)
    assert weight[..., 2:30].min() > 0.8 and weight[..., 34:62].max() < 0.01
    grain = photo + torch.randn(photo.shape, generator=torch.Generator().manual_seed(0)) / 255
    expected = plain(grain)
    with torch.autocast("cpu", torch.bfloat16):  # which would take its own rounding for grain
        assert torch.equal(plain(grain), expected)


def test_lpips_looks_from_every_origin():
    places = torch.arange(40 * 40).view(1, 1, 40, 40)
    origins = set()
    for seed in range(200):
        torch.manual_seed(seed)
        one, other = off_grid(places, places + 1)
        assert torch.equal(one + 1, other)
        assert torch.equal(one, places[..., -one.shape[-2] :, -one.shape[-1] :])
        origins.add(int(one[0, 0, 0, 0]))
    assert origins == {40 * top + left for top in range(4) for left in range(4)}
    for side in (31, 32):  # as small as LPIPS takes
        assert min(off_grid(torch.rand(1, 3, side, side))[0].shape[-2:]) >= 31


def test_the_discriminator_sees_what_a_file_would_hold():
    m, seen = module(), []
    m.log_dict = lambda *args, **kwargs: None
    m.logits = lambda x: seen.append(x) or [x.mean()]
    m.adversary(3 * torch.randn(2, 3, 32, 32), torch.rand(2, 3, 32, 32))
    assert len(seen) == 3 and all(x.min() >= 0 and x.max() <= 1 for x in seen)


def test_a_trained_decoder_leaves_the_encoder_alone():
    m = module("module.params.train_decoder=true")
    trained = {n for n, p in m.named_parameters() if p.requires_grad and n.startswith("trained.autoencoder.")}
    assert trained and all(".decoder." in n or ".post_quant_conv." in n for n in trained)
    m.generate(batch())[0].sum().backward()
    assert all(p.grad is not None for n, p in m.named_parameters() if n in trained)


def test_heads_on_features_judge_beside_the_picture(vgg16):
    m = module("module.params.feature_heads=true")
    assert len(m.logits(torch.rand(1, 3, 32, 32))) == 6
    assert not any(p.requires_grad for p in m.vgg16.parameters())
    assert not any("vgg16" in key for key in m.state_dict())


def test_sharding_is_refused_in_a_sentence():
    m = module()
    m._device_mesh = object()  # what Lightning sets with such a strategy
    with pytest.raises(UserError, match="ddp"):
        m.configure_model()
