"""Batches, and how processes share them."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from diffbir.folder.inputs import Source
from diffbir.folder.plan import TODO, Item, Plan, Settings, make_batches, pixels_of, split
from diffbir.folder.sizes import Target, enlarged

SETTINGS = Settings({}, {"upscale": 2.0, "seed": 0})
SIZES = st.sampled_from([(3, 4), (4, 3), (40, 30), (7, 7), None])


def items(sizes: list, prompts: list | None = None) -> list[Item]:
    prompts = prompts or [("", "")] * len(sizes)
    return [
        Item(Source(f"/{i}", f"{i}"), f"{i}.png", s, p) for i, (s, p) in enumerate(zip(sizes, prompts, strict=True))
    ]


def test_images_of_equal_size_and_prompt_are_batched_in_order():
    sizes = [(3, 4), (4, 3), (3, 4), None, (3, 4), None, (4, 3)]
    prompts = [("", "")] * 6 + [("cat", "")]
    assert make_batches(items(sizes, prompts), SETTINGS, 2) == [[0, 2], [1], [3], [4], [5], [6]]
    assert make_batches(items(sizes, prompts), SETTINGS, 1) == [[0], [1], [2], [3], [4], [5], [6]]


def test_a_gpu_is_given_batches_of_a_bounded_number_of_pixels():
    """8 results of 512 x 512 at once."""
    batches = make_batches(items([(256, 256)] * 20 + [(5000, 5000)] * 2), SETTINGS, 0)
    assert [len(batch) for batch in batches] == [8, 8, 4, 1, 1]


@given(st.lists(SIZES, min_size=1, max_size=20), st.integers(1, 5), st.integers(1, 4))
def test_every_image_is_in_one_share_and_no_share_could_give_a_batch_away(sizes, processes, batch):
    """The largest load exceeds the smallest by at most its own smallest batch."""
    all_items = items(sizes)
    plan = Plan(all_items, {}, make_batches(all_items, SETTINGS, batch), SETTINGS)
    shares = split(plan, processes)
    assert len(shares) == processes
    flat = [i for share in shares for one in share for i in one]
    assert sorted(flat) == list(range(len(sizes)))
    pixels = lambda one: sum(pixels_of(all_items[i], SETTINGS) for i in one)  # noqa: E731
    loads = [sum(map(pixels, share)) for share in shares]
    for (a, share), b in itertools.product(zip(loads, shares, strict=True), loads):
        assert not share or a - b <= min(map(pixels, share))


def test_sizes_are_exact():
    for width, height in itertools.product(range(1, 40), (1, 7, 31)):
        long = Target(long_side=1000)
        assert max(enlarged((width, height), long.factor((width, height), 1))) == 1000
        fitted = enlarged((width, height), Target(box=(640, 480)).factor((width, height), 1))
        assert fitted[0] <= 640 and fitted[1] <= 480 and (fitted[0] == 640 or fitted[1] == 480)


def test_pending_items_are_to_do():
    assert items([(1, 1)])[0].state == TODO
