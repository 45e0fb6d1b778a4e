"""No two inputs share the name of a result."""

from hypothesis import given
from hypothesis import strategies as st

from diffbir.folder.inputs import Source
from diffbir.folder.names import result_names


def named(*names: str, ending: str = ".png", owner=lambda name, source: None) -> list[str]:
    return result_names([Source(f"/in/{i}/{name}", name) for i, name in enumerate(names)], lambda s: ending, owner)


def test_inputs_that_differ_only_in_suffix_or_case_keep_the_suffix():
    assert named("a.jpg", "a.png", "b.jpg") == ["a.jpg.png", "a.png.png", "b.png"]
    assert named("A.jpg", "a.png") == ["A.jpg.png", "a.png.png"]
    assert named("x/a.jpg", "y/a.jpg") == ["x/a.png", "y/a.png"]


def test_what_is_still_equal_is_numbered():
    assert named("a.jpg", "a.jpg", "a.jpg.jpg") == ["a.jpg_2.png", "a.jpg_3.png", "a.jpg.png"]


def test_a_suffix_stands_before_the_ending():
    assert named("a.jpg", "b.c.jpg", ending="_big.webp") == ["a_big.webp", "b.c_big.webp"]


def test_a_result_keeps_its_name_when_a_neighbour_comes_and_is_not_taken_by_another_input():
    assert named("a.jpg", "a.png", owner=lambda name, source: {"a.png": source.path == "/in/1/a.png"}.get(name)) == [
        "a.jpg.png",
        "a.png",
    ]
    assert named("a.jpg", owner=lambda name, source: {"a.png": False, "a.jpg.png": False}.get(name)) == ["a.jpg_2.png"]


@given(st.lists(st.text("aA._1", min_size=1, max_size=6).map(lambda s: s + ".png"), max_size=12))
def test_names_are_always_different(names):
    results = [name.casefold() for name in named(*names)]
    assert len(set(results)) == len(names)
