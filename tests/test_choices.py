"""The command line's choices: all of ``Options``, each with its value, by one declaration."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from blastnn import cli
from blastnn.choices import JobChoices, unpacked
from blastnn.compress.options import Options
from tests.made_up import TEXT, make_folder, make_model


def test_every_option_can_be_chosen_on_the_command_line() -> None:
    assert {f.name for f in fields(JobChoices)} == {f.name for f in fields(Options)} | {"preset"}


def test_a_command_gets_its_choices_and_its_own_parameters() -> None:
    app, seen = typer.Typer(), []

    @app.command()
    @unpacked
    def command(name: str, choices: JobChoices, number: int = 1) -> None:
        seen.append((name, choices.options(), number))

    words = "x --keep 0.5 --blocks 2,3 --targets a --targets b --calibration-tokens 9 --number 7"
    result = CliRunner().invoke(app, [*words.split(), "--preset", "fast"], catch_exceptions=False)
    assert result.exit_code == 0
    own = {"keep": 0.5, "blocks": (2, 3), "targets": ("a", "b"), "tokens": 9}
    expected = Options(**own, sweeps=20, gradient_windows=4)
    assert seen == [("x", expected, 7)]
    assert CliRunner().invoke(app, ["x"]).exit_code == 0
    assert seen[1:] == [("x", Options(blocks=(8, 8), sweeps=60), 1)]


def test_a_dry_run_needs_no_more_than_a_configuration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a calibration text its tokens are those asked for; with ``none`` there are none."""
    make_model("llama").config.save_pretrained(tmp_path)
    words = ["compress", str(tmp_path), "--dry-run", "--calibration-tokens", "1000"]
    states = "hidden states of the calibration text"
    for extra, expected in ((), 2 * 1000 * 24 * 4), (("--calibration", "none"), 0):
        assert CliRunner().invoke(cli.app, [*words, *extra]).exit_code == 0
        found = CliRunner().invoke(cli.app, [*words, *extra, "--json"], catch_exceptions=False)
        assert json.loads(found.stdout)["memory_bytes"][states] == expected
    with pytest.raises(SystemExit):
        cli.main([*words, "--calibration", str(TEXT)])
    assert "no tokenizer" in capsys.readouterr().err
    planned = CliRunner().invoke(cli.app, ["plan", str(tmp_path)])
    assert "reckoned with 32,768 tokens of calibration text" in planned.stdout


@pytest.mark.parametrize("command", ["compress", "export", "kernels"])
def test_a_dtype_that_does_not_exist_is_refused_with_those_that_do(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "dense")
    words = [] if command == "kernels" else ["--output", str(tmp_path / "out")]
    capsys.readouterr()  # of saving the model
    with pytest.raises(SystemExit):
        cli.main([command, str(folder), *words, "--dtype", "float8"])
    error = capsys.readouterr().err
    assert error.startswith("error: dtype must be one of float32, ")
    assert error.endswith("float16, but is 'float8'\n")
