"""The page of --compare."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

import inference
from tests.folder import mixed


class Page(HTMLParser):
    """Cards with their attributes, pictures and sliders."""

    def __init__(self, text: str):
        super().__init__()
        self.cards: list[dict] = []
        self.addresses: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.addresses += [attrs[key] for key in ("src", "href") if key in attrs]
        if tag == "article":
            self.cards.append({**attrs, "pictures": {}, "sliders": 0})
        elif tag == "img":
            data = attrs["src"].removeprefix("data:image/jpeg;base64,")
            self.cards[-1]["pictures"][attrs["class"]] = Image.open(io.BytesIO(base64.b64decode(data)))
        elif tag == "input" and attrs.get("type") == "range":
            self.cards[-1]["sliders"] += 1


@pytest.fixture
def page(tmp_path):
    names = ("a.png", "trip/<b> & 'c'.png", "wide.png")
    for i, name in enumerate(names):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        width = 1100 if name == "wide.png" else 20
        Image.fromarray(np.resize(mixed.crop(i, 16), (16, width, 3))).save(tmp_path / "in" / name)
    args = ["--input", tmp_path / "in", "--output", tmp_path / "out", "--stage", "1", "--device", "cpu"]
    for flags in (["--dry-run"], ["--compare"], ["--compare"]):  # again, when all is finished
        assert inference.main([*map(str, args), *flags]) == 0
    return tmp_path / "out" / "compare.html"


def test_the_page_stands_alone_and_shows_input_stage_1_and_result_of_every_image(page):
    text = page.read_text(encoding="utf-8")
    found = Page(text)
    assert [card["data-output"] for card in found.cards] == ["a.png", "trip/<b> & 'c'.png", "wide.png"]
    assert all(address.startswith("data:") for address in found.addresses)
    assert not re.search(r"https?://|@import|url\(", text)
    for card in found.cards:
        assert list(card["pictures"]) == ["input", "stage1", "result"] and card["sliders"] == 1
        assert float(card["data-seconds"]) > 0 and float(card["data-distance"]) > 0
    small, _, wide = found.cards
    assert small["pictures"]["input"].size == (20, 16) and small["data-pixels"] == "320"
    assert max(wide["pictures"]["result"].size) == 1024 and wide["data-pixels"] == "17600"
    shown = np.asarray(small["pictures"]["input"]).astype(int)
    assert np.abs(shown - mixed.crop(0, 16)).mean() < 12  # as JPEG


def test_every_figure_that_the_page_sorts_by_is_on_every_card(page):
    text = page.read_text(encoding="utf-8")
    keys = re.findall(r'<option value="(\w+)">', text.partition('id="key"')[2].partition("</select>")[0])
    assert keys[:3] == ["output", "seconds", "distance"]
    assert all(card[f"data-{key}"] for card in Page(text).cards for key in keys)
