"""The models that the page offers; the one that was used last stays in memory."""

import copy
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffbir.faces.restorer import FaceRestorer
from diffbir.folder.restorers import AUTO, Faces, Restorers
from diffbir.model.build import weight_files
from diffbir.model.options import Options
from diffbir.model.presets import PRESETS, load_preset, names, tasks_of
from diffbir.model.restorer import Restorer, options_of
from diffbir.model.weights.checkpoint import find_weights
from diffbir.utils.cli import UserError
from diffbir.utils.device import pick_device, pick_precision

EMBEDDED = "mini"


@dataclass(frozen=True)
class Offer:
    """A preset on the page.

    Args:
        name: what visitors call it.
        preset: as `--preset` takes it.
        tasks: those whose weights are here, after `auto`; none for a preset without tasks.
    """

    name: str
    preset: str
    tasks: tuple[str, ...] = ()


class Models:
    """Args:
        presets: names or YAMLs; None is the embedded one and whichever has its weights here.
        device, precision, offload: see `Restorer.from_preset`.

    Raises:
        UserError: a preset that was asked for can't be used, or the device doesn't exist.
    """

    def __init__(self, presets: Sequence[str] | None, device: str, precision: str, offload: bool):
        self.device, self.offload = device, offload
        self.precision = pick_precision(precision, pick_device(device))
        asked = presets or [EMBEDDED, *(name for name in names(PRESETS) if name != EMBEDDED and whole(name))]
        self.offers = {offer.name: offer for offer in map(make_offer, asked)}
        self.lock = threading.RLock()
        self.kept: tuple[Offer, Restorers] | None = None

    def offer(self, name: Any) -> Offer:
        """Raises:
        UserError: there is none of this name.
        """
        if name not in self.offers:
            raise UserError(f"there is no preset '{name}' here; choose one of {', '.join(self.offers)}")
        return self.offers[name]

    def defaults(self, offer: Offer, **changes: Any) -> Options:
        """What the preset would do by itself, with some options changed."""
        return options_of(load_preset(offer.preset), changes)

    def is_loaded(self, offer: Offer) -> bool:
        return self.kept is not None and self.kept[0] == offer

    def restorer(self, offer: Offer, task: str | None) -> Restorer:
        """The restorer of a preset for a task, which is loaded now if it isn't yet.

        Raises:
            UserError: it can't be loaded.
        """
        with self.lock:
            if not self.is_loaded(offer):
                self.kept = None  # before the next needs room
                self.kept = (
                    offer,
                    Restorers(
                        offer.preset, None, None, None, self.precision, self.offload, (),
                        device=self.device, faces=Faces(),
                    ),
                )  # fmt: skip
            return self.kept[1].whole(task)

    def with_faces(self, offer: Offer, task: str | None, options: Mapping[str, Any]) -> FaceRestorer:
        """What `--faces` would restore with; see `restorer`.

        Args:
            options: what the visitor changes, also for a preset of the faces' own.

        Raises:
            UserError: it can't be loaded.
        """
        with self.lock:
            self.restorer(offer, task)
            whole = copy.copy(self.kept[1](task))
        if whole.own is not None:
            whole.own = whole.faces.options(**options)
        return whole


def make_offer(preset: str) -> Offer:
    """Raises:
    UserError: the preset is wrong, or its weights are missing.
    """
    check_weights(preset)
    tasks = [task for task in tasks_of(preset) if has_weights(preset, task)]
    auto = [AUTO] if {"sr", "denoise"} <= set(tasks) else []
    return Offer(Path(preset).stem, preset, (*auto, *tasks))


def check_weights(preset: str, task: str | None = None) -> None:
    """Raises:
    UserError: the preset is wrong, or its weights are missing.
    """
    for network, path in weight_files(load_preset(preset, task)).items():
        find_weights(path, network)


def has_weights(preset: str, task: str | None = None) -> bool:
    try:
        check_weights(preset, task)
    except UserError:
        return False
    return True


def whole(preset: str) -> bool:
    """Whether a preset has its weights, and something that steers its prior: some only wait for a file of additions."""
    return load_preset(preset).networks.get("branch") is not None and has_weights(preset)
