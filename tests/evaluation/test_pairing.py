"""Results and references find each other by name."""

from pathlib import Path

import pytest

from diffbir.evaluation.pairing import pair
from diffbir.utils.cli import UserError


def files(*names: str) -> dict[str, Path]:
    return {name: Path(name) for name in names}


@pytest.mark.parametrize(
    "result, reference",
    [
        ("a.png", "a.jpg"),
        ("0801x4.png", "0801.png"),
        ("Canon_001_LR4.png", "Canon_001_HR.png"),
        ("photo_x4_out.png", "photo.png"),
        ("b/a_SRx4.png", "b/a.png"),
        ("deep/folder/a.png", "a.png"),
        ("max4.png", "max4.jpg"),  # it ends like a suffix
    ],
)
def test_types_suffixes_and_folders_may_differ(result, reference):
    assert pair(files(result), files(reference)).pairs == {reference: (Path(result), Path(reference))}


def test_equal_names_come_first_and_the_rest_is_reported():
    found = pair(files("a.png", "a_x2.png", "c.png"), files("a.png", "b_x2.png"))
    assert found.pairs == {"a.png": (Path("a.png"), Path("a.png"))}
    assert found.lone_results == ("a_x2.png", "c.png")
    assert found.lone_references == ("b_x2.png",)


def test_the_same_name_in_two_folders_is_told_apart():
    found = pair(files("1/a.png", "2/a.png"), files("2/a.jpg", "1/a.jpg"))
    assert found.pairs["1/a.jpg"][0] == Path("1/a.png") and len(found.pairs) == 2


def test_what_is_ambiguous_or_has_nothing_in_common_is_refused():
    with pytest.raises(UserError, match=r"a_x2.png and a_x4.png have the same name"):
        pair(files("a_x2.png", "a_x4.png"), files("a.png"))
    with pytest.raises(UserError, match=r"no result has the name of a reference: there are a.png and b.png"):
        pair(files("a.png"), files("b.png"))
