"""Sweeps: what a cell is, that they go on where they stopped, and what table and picture say."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from blastnn import cli, sweep
from blastnn.compress.job import Progress
from blastnn.compress.options import Options
from blastnn.display import print_sweep
from blastnn.errors import BlastnnError, PlanError, ResumeError
from blastnn.evaluate.score import inspect_folder, score_models
from blastnn.sweep import METHODS, Sweep, SweepProgress, run_sweep
from blastnn.sweep.ledger import Ledger
from blastnn.sweep.page import render
from blastnn.sweep.picture import draw
from blastnn.sweep.rows import labels, summarize, worded
from tests.made_up import TEXT, make_folder
from tests.test_end_to_end import Interruption

COMMON = Options(tokens=256, window=64, sweeps=2, blocks=(2, 2))
SVD = ("svd", "whitened-svd")


def ask(source: Path, methods: tuple[str, ...] = SVD, **changes: Any) -> Sweep:
    """A small sweep at one size."""
    given = {"keeps": (0.6,), "common": COMMON, "calibration": [TEXT], "texts": [TEXT]}
    return Sweep(source, methods=methods, **{**given, "scored_tokens": 128, **changes})


class Heard(SweepProgress):
    """Remembers which cells were run; ``stop`` gives a cell's job another progress."""

    def __init__(self, **stop: Progress) -> None:
        self.stop, self.fresh = stop, {}

    def job(self, cell: object) -> Progress:
        return self.stop.get(cell.method.name.replace("-", "_"), Progress())

    def done(self, entry: dict[str, Any], number: int, total: int, fresh: bool) -> None:
        self.fresh[entry["method"]] = fresh


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model folder that no test changes."""
    return make_folder(tmp_path_factory.mktemp("sweep") / "dense", num_hidden_layers=2)


def test_every_method_is_explained_and_its_options_are_valid():
    for name, method in METHODS.items():
        assert f"``{name}``" in sweep.methods.__doc__
        options = method.options(COMMON, 0.7)
        assert options.keep == 0.7
        assert (options.blocks == (2, 2)) == (options.structure == "blast")
        assert (options.tokens, options.window) == (COMMON.tokens, COMMON.window)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model so wide that every structure has a size near a half of its layers."""
    sizes = {"hidden_size": 96, "intermediate_size": 128, "num_hidden_layers": 2}
    return make_folder(tmp_path_factory.mktemp("sweep") / "wide", **sizes)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_its_share(wide: Path, tmp_path: Path, method: str) -> None:
    """All methods at one size; a half is what diagonal blocks can meet."""
    values = run_sweep(ask(wide, (method,), keeps=(0.5,)), tmp_path)
    (cell,) = values["cells"].values()
    assert cell["status"] == "finished", cell["error"]
    assert 0.45 <= cell["params"]["kept"] <= 0.5
    assert cell["verified"]


def test_a_cell_is_the_job_of_its_options(source: Path, tmp_path: Path) -> None:
    """Scores and sizes against the commands that look at the folder it left behind."""
    values = run_sweep(ask(source, ("whitened-svd",)), tmp_path, keep_models=True)
    cell, folder = values["cells"]["whitened-svd-0.6"], tmp_path / "cells" / "whitened-svd-0.6"
    (row,) = score_models(str(folder), str(source), [str(TEXT)], 128, 64)["perplexity"]
    assert cell["scores"][0]["perplexity"] == row["model"]
    assert values["dense"][0]["perplexity"] == row["dense"]
    assert cell["scores"][0]["excess"] == pytest.approx(math.log(row["model"] / row["dense"]))
    found = inspect_folder(folder, verify=True)
    assert cell["verified"] is found["verified"] is True
    assert cell["params"]["before"] == found["targets"]["before"] == values["targets"]
    assert cell["params"]["after"] == found["targets"]["after"]
    report = json.loads((folder / "report.json").read_text())
    assert (report["options"]["structure"], report["options"]["inputs"]) == ("lowrank", "dense")
    assert report["calibration"]["tokens"] == values["calibration"]["tokens"] == 256
    assert report["measured"]["perplexity"][0]["compressed"] == row["model"]


def test_it_goes_on_where_it_stopped_and_can_grow(source: Path, tmp_path: Path) -> None:
    whole = run_sweep(ask(source, ("whitened-svd",)), tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run_sweep(ask(source), tmp_path / "parts", progress=Heard(whitened_svd=Interruption(9)))
    assert set(json.loads((tmp_path / "parts/sweep.json").read_text())["cells"]) == {"svd-0.6"}
    heard = Heard()
    parts = run_sweep(ask(source), tmp_path / "parts", progress=heard)
    assert heard.fresh == {"svd": False, "whitened-svd": True}
    name = "whitened-svd-0.6"
    assert parts["cells"][name]["scores"] == whole["cells"][name]["scores"]
    report = json.loads((tmp_path / "parts/cells" / name / "report.json").read_text())
    assert report["timing"]["sittings"] == 2
    names = {path.name for path in (tmp_path / "parts").rglob("*") if path.is_file()}
    assert {n for n in names if "safetensors" in n or n == "config.json"} == set()
    grown = run_sweep(ask(source, ("scaled-svd",)), tmp_path / "parts")
    assert [r["method"] for r in grown["table"]["rows"]] == ["dense", "scaled-svd", *SVD]


class Counted(Progress):
    """How many steps of a measurement a job took."""

    def __init__(self) -> None:
        self.steps = 0

    def measured(self, done: int, total: int) -> None:
        self.steps += 1


def test_cells_that_would_measure_the_same_share_it(source: Path, tmp_path: Path) -> None:
    """Equal outputs need no ``G``, so that cell measures something else."""
    names = ("blast", "blast-unrefitted", "blast-equal")
    heard = {name.replace("-", "_"): Counted() for name in names}
    values = run_sweep(ask(source, names), tmp_path / "all", progress=Heard(**heard))
    assert [counted.steps for counted in heard.values()] == [4, 0, 4]
    for name in names:
        alone = run_sweep(ask(source, (name,)), tmp_path / name)["cells"][f"{name}-0.6"]
        shared = values["cells"][f"{name}-0.6"]
        assert (shared["scores"], shared["params"]) == (alone["scores"], alone["params"])
    path = tmp_path / "all" / "cells" / "blast-unrefitted-0.6" / "report.json"
    assert json.loads(path.read_text())["timing"]["measure"] > 0.0
    assert not (tmp_path / "all" / "measured").exists()


def test_a_measurement_that_has_gone_is_made_again(source: Path, tmp_path: Path) -> None:
    whole = run_sweep(ask(source, ("blast",)), tmp_path / "whole")
    stop = Heard(blast=Interruption(9))
    with pytest.raises(KeyboardInterrupt):
        run_sweep(ask(source, ("blast",)), tmp_path / "parts", progress=stop)
    shutil.rmtree(tmp_path / "parts" / "measured")
    parts = run_sweep(ask(source, ("blast",)), tmp_path / "parts")
    assert parts["cells"]["blast-0.6"]["scores"] == whole["cells"]["blast-0.6"]["scores"]


def test_a_sweep_killed_while_it_forgets_measures_again(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a measurement is never taken for a whole one."""
    whole = run_sweep(ask(source, ("blast-unrefitted",)), tmp_path / "whole")
    remove = shutil.rmtree

    def killed(path: Path, **_: Any) -> None:
        if path.name.startswith("measured") and path.exists():
            remove(next(path.iterdir()))
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", killed)
        run_sweep(ask(source, ("blast",)), tmp_path / "parts")
    grown = run_sweep(ask(source, ("blast", "blast-unrefitted")), tmp_path / "parts")
    name = "blast-unrefitted-0.6"
    assert grown["cells"][name]["scores"] == whole["cells"][name]["scores"]
    assert not list((tmp_path / "parts").glob("measured*"))


def test_a_failed_cell_is_told_and_tried_again(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A block-diagonal matrix has no way to keep 60%."""
    common = "--calibration-tokens 256 --window 64 --scored-tokens 128 --keep 0.6"
    texts = ["--calibration", str(TEXT), "--text", str(TEXT)]
    words = ["sweep", str(source), "--output", str(tmp_path), *common.split(), *texts]
    words += ["--method", "block-diagonal", "--method", "svd"]
    for again in (False, True):
        with pytest.raises(SystemExit) as stopped:
            cli.main(words)
        assert stopped.value.code == 1
        said = capsys.readouterr()
        assert "[1/2] block-diagonal, keep 0.6: failed: block-diagonal keeps 50.0%" in said.err
        assert ("(finished before)" in said.err) == again
        assert "svd" in said.out and "failed: block-diagonal" in said.out
    values = json.loads((tmp_path / "sweep.json").read_text())
    assert values["cells"]["block-diagonal-0.6"]["status"] == "failed"
    assert "| block-diagonal | 0.6 | failed |" in (tmp_path / "sweep.md").read_text()
    assert ElementTree.parse(tmp_path / "sweep.svg").getroot().tag.endswith("svg")


def test_what_torch_raises_fails_one_cell_only(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken(Progress):
        def layer(self, *_: object) -> None:
            raise RuntimeError("not enough\nmemory")

    values = run_sweep(ask(source), tmp_path, progress=Heard(svd=Broken()))
    assert values["cells"]["svd-0.6"]["error"] == "RuntimeError: not enough memory"
    assert values["cells"]["whitened-svd-0.6"]["status"] == "finished"


def test_diagonal_blocks_at_a_size_they_can_meet(source: Path, tmp_path: Path) -> None:
    values = run_sweep(ask(source, ("block-diagonal",), keeps=(0.5,)), tmp_path)
    assert values["cells"]["block-diagonal-0.5"]["params"]["kept"] == 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"common": Options(tokens=256, window=64, sweeps=3, blocks=(2, 2))}, "options.sweeps"),
        ({"common": Options(tokens=128, window=64, sweeps=2, blocks=(2, 2))}, "options.tokens"),
        ({"scored_tokens": 64}, "texts"),
    ],
)
def test_a_changed_setting_is_refused(
    source: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    run_sweep(ask(source, ("svd",)), tmp_path)
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(ResumeError, match=f"sweep with another.*{words}"):
        run_sweep(ask(source, ("svd",), **changes), tmp_path)
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_a_method_that_has_become_another_is_refused(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_sweep(ask(source, ("svd",)), tmp_path)
    changed = sweep.Method("svd", "another", {"structure": "lowrank", "damping": 0.5}, False)
    monkeypatch.setitem(METHODS, "svd", changed)
    with pytest.raises(ResumeError, match="svd-0.6 that another version"):
        run_sweep(ask(source, ("svd",)), tmp_path)


def test_a_folder_with_something_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    with pytest.raises(ResumeError, match="holds no sweep"):
        run_sweep(ask(source), tmp_path)
    (tmp_path / "mine.txt").rename(tmp_path / "sweep.json")
    with pytest.raises(BlastnnError, match=r"sweep\.json"):
        run_sweep(ask(source), tmp_path)
    with pytest.raises(ResumeError, match="cannot write"):
        run_sweep(ask(source), tmp_path / "sweep.json")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"methods": ("magic",)}, "unknown method 'magic'; choose from blast"),
        ({"methods": ()}, "at least one method"),
        ({"keeps": (0.8, 1.2)}, "keep must be in"),
        ({"calibration": []}, "whitened-svd is fitted to data"),
        ({"reference": "blast"}, "the reference must be one of the methods svd, whitened-svd"),
        ({"scored_tokens": 0}, "scored_tokens"),
    ],
)
def test_a_wrong_request_is_refused_at_once(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        ask(Path("nowhere"), **changes)


def test_texts_are_needed_and_read_before_anything_is_written(source: Path, tmp_path: Path) -> None:
    for texts, words in ((None, "--text"), ([tmp_path / "absent"], "no text file")):
        with pytest.raises(BlastnnError, match=words):
            run_sweep(ask(source, texts=texts), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_encoders_are_compared_by_their_hidden_states(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "dense", "bert", num_hidden_layers=2)
    values = run_sweep(ask(source, ("svd",), keeps=(1.0, 0.6)), tmp_path / "out")
    columns, rows = worded(values)
    assert columns[4:7] == ["cosine LICENSE", "vectors LICENSE", "excess LICENSE"]
    shown = {(row[0], row[1]): row for row in rows}
    same = ["1.0000", "1.0000", "0.0000"]
    assert shown["dense", "1"][4:7] == shown["svd", "1"][4:7] == same
    score = values["cells"]["svd-0.6"]["scores"][0]
    assert 0.0 < score["vectors"] < 1.0
    assert shown["svd", "0.6"][5] == f"{score['vectors']:.4f}"
    excess = values["cells"]["svd-0.6"]["scores"][0]["excess"]
    assert 0.0 < excess == 1.0 - values["cells"]["svd-0.6"]["scores"][0]["cosine"]
    report = json.loads((tmp_path / "out/cells/svd-0.6/report.json").read_text())
    assert [row["mean"] for row in report["measured"]["cosine"]] == [1.0 - excess]


def hits(model: Any, tasks: tuple[str, ...], limit: int | None, **_: Any) -> dict[str, Any]:
    """What ``score_tasks`` returns: the dense model, a path, is right on all of eight rows."""
    right = "11111111" if isinstance(model, str) else "11101110"
    metric = {"value": right.count("1") / 8, "stderr": 0.1, "hits": right}
    scores = {name: {"metrics": {"acc": metric}, "rows": 8, "rows_sha256": "abc"} for name in tasks}
    mean = {"value": metric["value"], "stderr": 0.1}
    return {"tasks": scores, "mean": {"acc": mean, "acc_norm": mean}, "protocol": "by hand"}


def test_zero_shot_tasks_are_columns(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def score(model: Any, *arguments: Any, **named: Any) -> dict[str, Any]:
        asked.append(model)
        return hits(model, *arguments, **named)

    monkeypatch.setattr("blastnn.sweep.zero_shot.score_tasks", score)
    monkeypatch.setattr("blastnn.sweep.request.check_request", lambda tasks, limit: list(tasks))
    request = ask(source, tasks=("piqa", "boolq"), limit=8)
    values = run_sweep(request, tmp_path / "out")
    assert len(asked) == 3 and isinstance(asked[0], str)
    run_sweep(ask(source, (*SVD, "scaled-svd"), tasks=("piqa", "boolq"), limit=8), tmp_path / "out")
    assert len(asked) == 4 and not isinstance(asked[3], str)  # the dense model's are kept
    columns, rows = worded(values)
    at = columns.index("accuracy")
    assert columns[at:] == ["accuracy", "accuracy lost", "share accuracy", "seconds"]
    assert rows[0][at:] == ["1.0000", "0.0000 ± 0.0000", "-", "-"]
    # Two of eight rows lost, two tasks: the root of 0.75 * 0.25 / 7, divided by the root of 2.
    assert rows[1][at : at + 3] == ["0.7500", "0.2500 ± 0.1157", "1.000"]
    assert all(len(row) == len(columns) for row in rows)
    assert "piqa (8 rows), boolq (8 rows); by hand" in (tmp_path / "out/sweep.md").read_text()
    with pytest.raises(ResumeError, match="tasks"):
        run_sweep(ask(source), tmp_path / "out")


def test_tasks_that_cannot_be_scored_are_refused_at_once(source: Path) -> None:
    with pytest.raises(BlastnnError, match=r"pica|blastnn\[tasks\]"):
        ask(source, tasks=("pica",))


def ledger(tmp_path: Path) -> Ledger:
    """Made-up figures: the reference lost 1.0 and 2.0 nats at 0.8 and nothing at 0.9."""

    def cell(method: str, keep: float, *excess: float) -> dict[str, Any]:
        scores = [{"text": "t", "perplexity": 10 * math.exp(e), "excess": e} for e in excess]
        params = {"before": 1000, "after": int(1000 * keep) - 1, "kept": keep - 0.001}
        common = {"method": method, "keep": keep, "options": {"of": "targets"}}
        return {**common, "status": "finished", "scores": scores, "params": params, "seconds": 7.4}

    failed = {"method": "svd", "keep": 0.8, "status": "failed", "error": "broke | <b>"}
    cells = {
        "blast-0.8": cell("blast", 0.8, 0.25, 1.0),
        "svd-0.8": failed | {"options": {"of": "targets"}},
        "whitened-svd-0.8": cell("whitened-svd", 0.8, 1.0, 2.0),
        "whitened-svd-0.9": cell("whitened-svd", 0.9, 0.0, -0.1),
        "blast-0.9": cell("blast", 0.9, 0.1, 10.0),
    }
    dense = [
        {"text": name, "perplexity": 10.0, "excess": 0.0, "tokens": 128, "window": 64}
        for name in ("demo:wiki-test", "folder/b.txt")
    ]
    about = {"dense": dense, "targets": 1000, "calibration": None, "protocol": "p"}
    about["model"] = {"name": "a & b", "note": "once in 4 bits"}
    return Ledger(tmp_path, {}, about, cells)


def values_of(tmp_path: Path, reference: str | None = "whitened-svd") -> dict[str, Any]:
    state = ledger(tmp_path)
    wanted = {f"blast-{keep}": ("blast", keep) for keep in (0.9, 0.8, 0.5)}
    return state.save(table=summarize(state, wanted, reference))


def test_the_table_says_what_the_cells_do(tmp_path: Path) -> None:
    columns, rows = worded(values_of(tmp_path))
    assert columns[4:] == [
        *("ppl wiki-test", "ppl b.txt", "excess wiki-test", "excess b.txt"),
        *("share wiki-test", "share b.txt", "seconds"),
    ]
    assert [" ".join(row) for row in rows] == [
        "dense 1 1,000 100.00% 10.00 10.00 0.0000 0.0000 - - -",
        "blast 0.9 899 89.90% 11.05 2.203e+05 0.1000 10.0000 - - 7",
        "whitened-svd 0.9 899 89.90% 10.00 9.05 0.0000 -0.1000 - - 7",
        "blast 0.8 799 79.90% 12.84 27.18 0.2500 1.0000 0.250 0.500 7",
        "svd 0.8 failed - - - - - - - -",
        "whitened-svd 0.8 799 79.90% 27.18 73.89 1.0000 2.0000 1.000 1.000 7",
        "blast 0.5 waiting - - - - - - - -",
    ]
    columns, rows = worded(values_of(tmp_path, None))
    assert not any("share" in column for column in columns)
    assert {len(row) for row in rows} == {len(columns)}


def test_no_figure_is_lost_where_lines_are_short(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    values = values_of(tmp_path)
    print_sweep(values, tmp_path, as_json=False)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert [" ".join(row) for row in worded(values)[1]] == lines[1:8]


def test_the_page_explains_the_table(tmp_path: Path) -> None:
    page = render(values_of(tmp_path))
    heads = [line for line in page.splitlines() if line.startswith("|")]
    assert len({line.count(" | ") for line in heads}) == 1
    for words in ("svd at keep 0.8 failed: broke", "once in 4 bits", "(sweep.svg)", "`blast`: "):
        assert words in page


def test_equal_names_of_texts_are_told_apart():
    assert labels(["demo:wiki-test", "a/b.txt"]) == ["wiki-test", "b.txt"]
    assert labels(["a/b.txt", "c/b.txt"]) == ["a/b.txt", "c/b.txt"]


def test_the_picture_has_a_panel_a_text_and_a_line_a_method(tmp_path: Path) -> None:
    svg = ElementTree.fromstring(draw(values_of(tmp_path)))
    space = {"s": "http://www.w3.org/2000/svg"}
    words = [text.text for text in svg.iterfind(".//s:text", space)]
    assert {"What a & b loses", "wiki-test", "b.txt", "blast", "whitened-svd"} <= set(words)
    panels = svg.findall("s:g", space)
    assert [len(panel.findall("s:path", space)) for panel in panels] == [1, 1]  # svd has no line
    shown = [[t.text for t in panel.iterfind(".//s:title", space)] for panel in panels]
    # What lost nothing has no place on a logarithmic axis.
    assert [len(titles) for titles in shown] == [3, 3]
    assert "blast, 79.90% kept: excess 0.2500" in shown[0]
    style = svg.find("s:style", space).text
    assert "prefers-color-scheme:dark" in style


def test_a_picture_without_figures_can_be_drawn(tmp_path: Path) -> None:
    state = ledger(tmp_path)
    state.cells.clear()
    values = state.save(table=summarize(state, {"svd-0.8": ("svd", 0.8)}, None))
    assert ElementTree.fromstring(draw(values)).findall(".//{*}title") == []
