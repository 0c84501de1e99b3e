"""The command line's choices: all of ``Options``, each with its value, by one declaration."""

from __future__ import annotations

from dataclasses import fields

import typer
from typer.testing import CliRunner

from blastnn.choices import JobChoices, unpacked
from blastnn.compress.options import Options


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
    expected = Options(keep=0.5, blocks=(2, 3), targets=("a", "b"), tokens=9, sweeps=10)
    assert seen == [("x", expected, 7)]
    assert CliRunner().invoke(app, ["x"]).exit_code == 0
    assert seen[1:] == [("x", Options(), 1)]
