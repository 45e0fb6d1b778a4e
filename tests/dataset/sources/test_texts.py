import os
import sys
from pathlib import Path

import pytest

from benchmarks.memory import own_over_a_pass, write_list
from diffbir.dataset.sources.files import Files
from diffbir.dataset.sources.texts import Paths, Texts


def test_texts_are_what_was_given():
    given = ["", "a", "ü 雪", None, os.fsdecode(b"caf\xe9.png"), "z" * 1000]
    texts = Texts(given)
    assert list(texts) == [text or "" for text in given]
    assert texts[-1] == "z" * 1000
    assert len(Texts()) == 0
    with pytest.raises(IndexError):
        texts[6]


def test_paths_are_below_their_folder_or_absolute():
    assert list(Paths(Path("a"), ["b/c.png", "../d.png", "/e.png"])) == [
        Path("a/b/c.png"),
        Path("a/../d.png"),
        Path("/e.png"),
    ]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loader_processes_share_the_paths_over_a_whole_pass(tmp_path):
    """A list of 100,000 paths is copied into each process; the buffer is not. (2 M: python benchmarks/memory.py.)"""
    write_list(tmp_path / "list.txt", 100_000)
    source = Files(tmp_path / "list.txt")
    buffer, paths = source.paths, list(source.paths)
    shared, copied = (own_over_a_pass(held, source, workers=2, batch=1000) for held in (buffer, paths))
    for own, own_of_list in zip(shared, copied, strict=True):
        assert own[-1] - own[len(own) // 4] < 1, "flat after what Python itself writes to"
        assert (own_of_list[-1] - own_of_list[0]) - (own[-1] - own[0]) > 8, "what a list of them costs is spared"
