"""The slider from faithful to realistic, and the command line that says the same as the page."""

import shlex
from itertools import pairwise

import pytest

from diffbir.command import parse
from diffbir.model.options import Options
from diffbir.utils.cli import UserError
from diffbir.web.models import Offer
from diffbir.web.wish import MIDDLE, OWN, Wish, guidance_scale, realism

MINI = Offer("mini", "mini")
V2 = Offer("v2", "v2", ("auto", "sr", "face", "denoise"))


def test_the_slider_runs_from_all_guidance_to_none():
    scales = [guidance_scale(place) for place in range(101)]
    assert scales[100] == 0
    assert scales[50] == MIDDLE
    assert scales[70] == 3000  # what the embedded model's chain is used with
    assert all(a > b for a, b in pairwise(scales))
    assert scales[0] > 1e5


@pytest.mark.parametrize("place", [1, 7, 33, 50, 70, 99, 100])
def test_a_place_is_found_again_from_its_scale(place):
    assert realism(guidance_scale(place)) == place


def test_the_command_line_has_the_same_options():
    wish = Wish(V2, "sr", 70, 2.5, 2**53 - 1, "ddim", 12)
    name = "a photo; rm -rf $HOME's.jpg"
    words = shlex.split(wish.command(name))
    assert words[0] == "diffbir"
    args = parse(words[1:])
    assert (args.input, args.preset, args.task) == ([name], "v2", "sr")
    expected = {"upscale": 2.5, "guidance_scale": 3000.0, "seed": 2**53 - 1, "solver": "ddim", "steps": 12}
    assert {name: getattr(args, name) for name in expected} == expected
    assert wish.options() == expected
    Options(**expected)


def test_what_is_left_to_the_preset_is_not_said():
    wish = Wish(MINI, OWN, 100)
    assert wish.options() == {"upscale": 1, "seed": 0, "guidance_scale": 0.0}
    assert wish.chosen_task is None
    assert "--task" not in wish.command("a.png")
    assert "--solver" not in wish.command("a.png")


@pytest.mark.parametrize(
    "wish, words",
    [
        ({"offer": MINI, "task": "face"}, "preset mini has no task 'face'; it has one for everything"),
        ({"offer": V2, "task": "cats"}, "it knows auto, sr, face, denoise"),
        ({"offer": MINI, "realism": 101}, "between 0"),
        ({"offer": MINI, "realism": float("nan")}, "between 0"),
    ],
)
def test_a_wish_that_cannot_be_is_refused(wish, words):
    with pytest.raises(UserError, match=words.replace("(", r"\(")):
        Wish(**wish)
