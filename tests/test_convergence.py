"""What the scripts of Figures 3 and 9 conclude from their curves.

Made-up curves for the verdicts; for the methods the first steps only, and no seconds.
"""

from __future__ import annotations

import pytest
from matplotlib.figure import Figure

from reproduce.convergence import (
    DECAY,
    OURS,
    PRECGD,
    THEOREM,
    Curve,
    compare,
    far_below,
    far_below_on_most,
    ours_is_first,
)
from reproduce.figure3 import low_rank_target
from reproduce.figure9 import blast_target
from reproduce.figures import Figure as PaperFigure
from reproduce.figures import draw, over_targets, plot, report

METHODS = [DECAY, THEOREM, PRECGD, OURS]


def falling(method: str, start: int, rate: float) -> Curve:
    """Errors of 1 for ``start`` steps, then lower by ``rate`` a step, a second each."""
    errors = [1.0] * start + [rate**k for k in range(1, 30)]
    return Curve(method, tuple(map(float, range(len(errors)))), tuple(errors))


def steps_verdict(curves: list[Curve], method: str) -> bool:
    """Whether ours is said to be no later than a method, in steps."""
    claim = f"ours is no later than {method}, in steps"
    (verdict,) = (v for v in ours_is_first(curves) if v.claim == claim)
    return verdict.holds


@pytest.mark.parametrize(("start", "first"), [(5, True), (12, True), (13, False)])
def test_ours_is_first_unless_a_level_is_reached_later(start: int, first: bool) -> None:
    curves = [falling(PRECGD, 12, 0.1), falling(OURS, start, 0.1)]
    assert steps_verdict(curves, PRECGD) is first


def test_ours_is_not_first_where_precgd_reaches_nothing() -> None:
    """No level in common shows nothing; of plain descent, which may never arrive, none is asked."""
    never = [Curve(method, (0.0, 1.0), (1.0, 0.9)) for method in (DECAY, PRECGD)]
    curves = [*never, falling(OURS, 0, 0.1)]
    assert not steps_verdict(curves, PRECGD)
    assert steps_verdict(curves, DECAY)


@pytest.mark.parametrize(("ratio", "holds"), [(9.0, True), (11.0, False)])
def test_far_below_compares_the_last_errors(ratio: float, holds: bool) -> None:
    curves = [Curve(DECAY, (0.0, 1.0), (0.1, 0.5)), Curve(PRECGD, (0.0, 1.0), (1.0, 0.05))]
    assert far_below(curves, ratio).holds is holds


@pytest.mark.parametrize("required", [True, False])
def test_only_required_claims_fail_the_script(required: bool) -> None:
    curves = [Curve(DECAY, (0.0, 1.0), (0.1, 0.5)), Curve(PRECGD, (0.0, 1.0), (1.0, 0.5))]
    verdicts = {"panel": [far_below(curves, 2.0, required)]}
    if required:
        with pytest.raises(SystemExit, match="1 of 1"):
            report({"panel": curves}, verdicts)
    else:
        report({"panel": curves}, verdicts)


def test_the_four_methods_on_a_low_rank_target() -> None:
    """Over-parameterised, after 40 steps: preconditioned far below plain, ours at rounding."""
    steps = 40
    curves = compare(low_rank_target(0), rank=32, steps=steps)
    assert [curve.method for curve in curves] == METHODS
    # Ours may stop early, once nothing is left to gain; the others go on to the last step.
    assert [len(curve.errors) for curve in curves[:3]] == [steps + 1] * 3
    decay, theorem, precgd, ours = (curve.errors[-1] for curve in curves)
    assert ours < 1e-5 < precgd < 0.2 * min(decay, theorem)
    assert all(a >= b for a, b in zip(curves[1].errors, curves[1].errors[1:], strict=False))
    assert steps_verdict(curves, PRECGD) and steps_verdict(curves, THEOREM)


@pytest.mark.parametrize(
    ("median", "least", "holds"), [(3.0, 1.5, True), (3.1, 1.5, False), (3.0, 2.1, False)]
)
def test_far_below_on_most_asks_the_median_and_the_least(monkeypatch, median, least, holds) -> None:
    factors = iter([9.0, 3.0, 2.0])
    monkeypatch.setattr("reproduce.convergence._factor", lambda *_: next(factors))
    targets = [low_rank_target(0)] * 3
    assert far_below_on_most(targets, 32, 1, median, least).holds is holds


@pytest.mark.parametrize("target", [low_rank_target, blast_target])
def test_draws_of_a_target_differ_and_repeat(target) -> None:
    assert target(1).equal(target(1))
    assert not target(0).equal(target(1))


def test_a_picture_names_every_method_and_has_the_same_bytes_again(tmp_path) -> None:
    curves = [falling(PRECGD, 5, 0.1), falling(OURS, 5, 0.1)]
    paths = [tmp_path / "a" / "figure.svg", tmp_path / "b" / "figure.svg"]
    for path in paths:
        plot({"panel": curves}, path)
    first, second = (path.read_text() for path in paths)
    assert first == second
    assert PRECGD in first and OURS in first


def test_a_single_point_is_marked() -> None:
    """A line of one point shows nothing."""
    axes = Figure().subplots(2)
    draw(*axes, [falling(PRECGD, 5, 0.1), Curve(OURS, (0.01,), (1e-6,))])
    for each in axes:
        line, point = each.lines
        assert line.get_marker() in ("None", None) and point.get_marker() == "o"


def test_over_targets_counts_who_arrives() -> None:
    figure = PaperFigure("made-up", "low rank", low_rank_target, steps=2, verdicts=lambda *_: [])
    *_, last = over_targets(figure, rank=8, count=2).splitlines()
    # In two steps from a small random start nobody arrives but ours, which starts at the solution.
    assert last.split() == ["<=", "1e-05", "0", "0", "0", "2"]
