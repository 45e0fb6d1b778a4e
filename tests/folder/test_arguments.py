"""Command lines of any kind end in a result or in one sentence, and help is a page for newcomers."""

import os

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import inference
from diffbir.command import parse, parser
from tests.folder import mixed

SLOW = ("--help", "-h", "--devices", "--compile")
FLAGS = sorted(flag for action in parser()._actions for flag in action.option_strings if flag not in SLOW)
WORDS = [
    "1",
    "0",
    "-1",
    "2",
    "0.5",
    "1e309",
    "nan",
    "inf",
    "99999999999999999999999",
    "png",
    "same",
    "ddim",
    "one_step",
    "both",
    "3x4",
    "0x0",
    "mini",
    "v2",
    "sr",
    "auto",
    "cpu",
    "cuda:7",
    "fp16",
    "bf16",
    "in",
    "in/a.png",
    "in/list.txt",
    "in/*.png",
    "nothing.csv",
    "sidecar",
    "weights.stage1=x",
    "networks=1",
    "a.b.c=[",
    "sampling.steps=3",
    "sampling={}",
    "=",
    "=x",
    "include=x",
    "{}",
    "/",
    "..",
    "~nobody",
    "é",
    "�",
]
VALUES = st.one_of(st.sampled_from(WORDS), st.text(st.characters(exclude_categories=["Cs"]), max_size=8))
ARGS = st.lists(st.one_of(st.tuples(st.sampled_from(FLAGS)), st.tuples(st.sampled_from(FLAGS), VALUES)), max_size=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("fuzz")
    (path / "in").mkdir()
    (path / "in" / "a.png").write_bytes(mixed.encoded(mixed.crop(0, 8, 8), "PNG"))
    (path / "in" / "list.txt").write_text("a.png\n")
    before = os.getcwd()
    os.chdir(path)
    yield path
    os.chdir(before)


@settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(args=ARGS, dry=st.booleans())
def test_no_command_line_gives_a_traceback(folder, args, dry, capsys):
    words = [word for group in args for word in group]
    try:
        first = ["--input", "in", "--output", "out", "--device", "cpu", "--stage", "1"]
        code = inference.main([*first, *words, "--input", "in/a.png", *["--dry-run"] * dry])
    except SystemExit as error:  # argparse
        code = error.code
    assert code in (0, 1, 2)
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    if code == 1:
        assert [line for line in captured.err.splitlines() if line.startswith("error: ")]


def test_help_begins_with_the_five_flags_that_matter(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "90")
    with pytest.raises(SystemExit):
        parse(["--help"], "diffbir")
    text = capsys.readouterr().out
    groups = [line for line in text.splitlines() if line and not line[0].isspace() and line.endswith(":")]
    assert groups[0] == "the flags that matter first:"
    first = text.partition(groups[0])[2].partition(groups[1])[0]
    flags = [line.split()[0] for line in first.splitlines() if line.startswith("  --")]
    assert flags == ["--input", "--output", "--upscale", "--guidance-scale", "--preset"]
    assert max(len(line) for line in text.splitlines()) <= 90
    for action in parser()._actions:
        assert action.help, action.dest


def test_overrides_may_stand_anywhere(tmp_path):
    args = ["--input", "a", "b.c=1", "d", "--output", "e", "f.g=2"]
    found = parse(args)
    assert (found.input, found.overrides) == (["a", "d"], ["b.c=1", "f.g=2"])
    (tmp_path / "x=1.png").touch()
    found = parse(["--input", str(tmp_path / "x=1.png"), "--output", "e"])
    assert (found.input, found.overrides) == ([str(tmp_path / "x=1.png")], [])


@pytest.mark.parametrize(
    "args", [["--input", "a=1"], ["--input", ""], ["--input", "a", "--output", "b", "stray"], ["--size", "3x"]]
)
def test_stray_words_are_refused(args, capsys):
    with pytest.raises(SystemExit) as error:
        parse([*args, "--output", "x"])
    assert error.value.code == 2
    assert "error: " in capsys.readouterr().err


def test_compile_is_for_what_computes_most(tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(
        "diffbir.model.build.compile_network", lambda network, options: compiled.append(type(network).__name__)
    )
    (tmp_path / "a.png").write_bytes(mixed.encoded(mixed.crop(0, 16), "PNG"))
    line = ["--input", str(tmp_path / "a.png"), "--output", str(tmp_path / "out"), "--device", "cpu"]
    assert inference.main([*line, "--compile"]) == 0
    assert sorted(compiled) == ["LatentBranch"] * 2 + ["SwinIR"] + ["UNet"] * 2
    assert inference.main([*line, "--overwrite"]) == 0 and len(compiled) == 5
