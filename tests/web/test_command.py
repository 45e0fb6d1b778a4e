"""The flags of `diffbir web`."""

import pytest

from diffbir.command import main


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--share"], "refused without a password"),
        (["--share", "--password-file", "{empty}"], "is empty"),
        (["--password-file", "{missing}"], "cannot be read"),
        (["--preset", "none"], "there is no preset 'none'"),
        (["--device", "cuda:99"], "--device cuda:99 is not available"),
        (["--examples", "{missing}"], "is no folder"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence(flags, words, tmp_path, capsys):
    if words in ("there is no preset 'none'", "--device cuda:99 is not available", "is no folder"):
        pytest.importorskip("gradio", reason="pip install '.[web]'")
    (tmp_path / "empty").write_text("\n")
    names = {"empty": tmp_path / "empty", "missing": tmp_path / "missing"}
    assert main(["web", *(flag.format(**names) for flag in flags)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert words in line


@pytest.mark.parametrize("flags", [["--keep", "0"], ["--port", "0"], ["--max-mb", "x"], ["--por=1", "y"]])
def test_wrong_values_are_refused(flags, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["web", *flags])
    assert caught.value.code == 2
