"""A validation set that ranks share: every image counts once, and all ranks take the same number of steps."""

import numpy as np
import pytest

from diffbir.dataset.pairs import ImagePairs
from diffbir.dataset.validation import Part
from diffbir.utils.image import ImageError, write_png


@pytest.fixture
def photos(tmp_path):
    for level in range(5):
        write_png(tmp_path / f"{level}.png", np.full((8, 8, 3), level, np.uint8))
    return tmp_path


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
def test_every_image_counts_on_one_rank(photos, ranks):
    dataset = ImagePairs(photos, 8, flip=False, shuffle=False)
    parts = [Part(dataset, rank, ranks) for rank in range(ranks)]
    assert {len(part) for part in parts} == {-(-5 // ranks)}
    items = [item for part in parts for item in part.__getitems__(range(len(part)))]
    assert [item["number"] for item in items if item["counts"]] == [0, 1, 2, 3, 4]
    for item in items:
        assert item["hq"].mean().item() * 255 == pytest.approx(item["number"])


def test_an_unreadable_image_is_left_out_and_the_others_keep_their_numbers(photos):
    (photos / "1.png").write_bytes(b"no image")
    part = Part(ImagePairs(photos, 8, flip=False, shuffle=False, on_error="skip"), 0, 2)
    assert [item["number"] for item in part.__getitems__(range(3))] == [0, 2]
    with pytest.raises(ImageError, match=r"1\.png"):
        Part(ImagePairs(photos, 8), 0, 5).__getitems__([0, 1, 2, 3, 4])
