"""Presets: which YAML a name means, and the choice of a task or of another stage 1."""

from collections.abc import Container, Iterable, Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffbir.utils.cli import UserError
from diffbir.utils.config import ROOT, apply_overrides, load_config, project_path, read_config

PRESETS = ROOT / "configs" / "inference"
STAGE1 = ROOT / "configs" / "stage1"
STAGE1_SUFFIXES = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")
# What inference reads.
KEYS = ("networks", "weights", "lora", "diffusion", "sampling", "one_step", "sweep", "tasks", "run_dir")


def names(folder: Path) -> list[str]:
    return sorted(path.stem for path in folder.glob("*.yaml"))


def load_preset(
    preset: str | Path,
    task: str | None = None,
    stage1: str | Path | None = None,
    overrides: Iterable[str] = (),
    lora: Sequence[str] = (),
) -> DictConfig:
    """Reads a preset.

    Args:
        preset: a name in configs/inference/, or a YAML: a preset of one's own, or the resolved `config.yaml` (or the
            YAML with its overrides) of a training, whose exported weights are then used.
        task: key of the preset's `tasks`, each of which has its own stage 1.
        stage1: a name in configs/stage1/, a YAML with `networks.stage1` and `weights.stage1`, or a weight file of any
            network that is known (`model.stage1_file`); in place of the task's.
        overrides: `key=value`, applied last.
        lora: FILE or FILE:scale of low-rank additions, after those of the preset.

    Raises:
        UserError: an unknown preset, task or stage 1, or a configuration that cannot be used.
    """
    path = _find(preset, PRESETS, "preset")
    config = read_config(path)
    if "module" in config:  # of a training: what only training needs may still be open (`???`)
        config = OmegaConf.masked_copy(config, [key for key in config if key in KEYS])
    tasks = config.pop("tasks", {})
    if task is not None:
        if task not in tasks:
            known = f"it knows {', '.join(tasks)}" if tasks else "it has no tasks"
            raise UserError(f"preset {preset} has no task '{task}'; {known}")
        stage1 = stage1 or tasks[task]
    if stage1 is not None:
        chosen = _stage1(stage1)
        for key in ("networks.stage1", "weights.stage1"):
            OmegaConf.update(config, key, OmegaConf.select(chosen, key), merge=False, force_add=True)
    if lora:
        own = config.get("lora") or []
        config.lora = [*([own] if isinstance(own, str) else own), *lora]
    overrides = list(overrides)
    config = apply_overrides(config, overrides, path)
    return use_trained_weights(config, given=[o.partition("=")[0] for o in overrides])


def tasks_of(preset: str | Path) -> list[str]:
    """The tasks that a preset knows; most know none.

    Raises:
        UserError: an unknown preset, or one that cannot be read.
    """
    return list(read_config(_find(preset, PRESETS, "preset")).get("tasks") or {})


def use_trained_weights(config: DictConfig, given: Container[str] = ()) -> DictConfig:
    """In the configuration of a training, puts the weights that it exported in place of those that it started from.

    Args:
        given: full keys that keep their values.
    """
    for name in config.get("networks", {}) if "run_dir" in config else ():
        exported = project_path(config.run_dir) / "weights" / f"{name}.safetensors"
        if exported.is_file() and f"weights.{name}" not in given:
            OmegaConf.update(config, f"weights.{name}", str(exported), force_add=True)
    return config


def _stage1(name: str | Path) -> DictConfig:
    if Path(name).suffix in STAGE1_SUFFIXES:
        from diffbir.model.stage1_file import stage1_config  # torch takes long to load

        return OmegaConf.create(stage1_config(name))
    return load_config(_find(name, STAGE1, "stage 1"))


def _find(name: str | Path, folder: Path, kind: str) -> Path:
    name = str(name)
    named = folder / f"{name}.yaml"
    if named.is_file():
        return named
    if Path(name).suffix in (".yaml", ".yml"):
        return Path(name)
    raise UserError(f"there is no {kind} '{name}'; give one of {', '.join(names(folder))}, or a YAML file")
