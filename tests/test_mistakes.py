"""What users mistype, through the command line and in Python: one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import blastnn
from blastnn import cli
from blastnn.compress.options import Options
from blastnn.errors import BlastnnError, CalibrationError, FactorizationError, PlanError
from tests.made_up import TEXT, make_folder
from tests.matrices import moment_of, normal


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good dense model folder; its model has 64 positions."""
    return make_folder(tmp_path_factory.mktemp("mistakes") / "dense", "llama")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line on standard error of a command that ends with status 2."""
    with pytest.raises(SystemExit) as ended:
        cli.main([str(argument) for argument in arguments])
    assert ended.value.code == 2
    return capsys.readouterr().err


def damaged(dense: Path, folder: Path) -> Path:
    """A copy of a model with a NaN in a weight."""
    shutil.copytree(dense, folder)
    tensors = load_file(folder / "model.safetensors")
    next(v for k, v in tensors.items() if "up_proj" in k)[0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_generation_refuses_what_makes_no_text(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = damaged(dense, tmp_path / "broken")
    assert "non-finite logit" in refused(capsys, "generate", broken, "the ocean")
    assert "max_tokens" in refused(capsys, "generate", dense, "a", "--max-tokens", -3)
    assert "the prompt is empty" in refused(capsys, "generate", dense, "")
    for temperature in (-1, "nan", "inf", 1e-40):
        error = refused(capsys, "generate", dense, "a", "--temperature", temperature)
        assert "temperature must be 0" in error


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_windows_are_no_longer_than_the_model_and_that_is_said(
    family: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_folder(tmp_path / "dense", family)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", str(folder), "--text", str(TEXT), "--scored-tokens", "128"])
    shown = capsys.readouterr()
    assert "windows of 64 tokens instead of 1024" in shown.err
    assert " 64" in shown.out


def test_numbers_below_one_are_refused(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("evaluate", "compress"):
        wrong = ("--text", TEXT, "--scored-tokens", 0)
        assert "scored-tokens" in refused(capsys, command, dense, *wrong)
    assert "tokens" in refused(capsys, "kernels", dense, "--measure", "--tokens", 0)
    assert "threads" in refused(capsys, "export", dense, "--output", "x.onnx", "--threads", 0)


def test_bench_refuses_before_it_measures(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = ("bench", dense, "--against", dense, "--no-compile", "--batch", 1)
    assert "made for 64" in refused(capsys, *both, "--prompt", 64)
    assert "no device 'cud'" in refused(capsys, *both, "--device", "cud")
    missing = tmp_path / "missing" / "x.json"
    for option in ("--output", "--picture"):
        assert "there is no folder" in refused(capsys, *both, option, missing)
        assert "is a folder" in refused(capsys, *both, option, tmp_path)
    assert "there is no folder" in refused(capsys, "plan", dense, "--output", missing)


def test_a_dense_model_cut_off_is_named(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "cut"
    shutil.copytree(dense, folder)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "damaged or cut off" in refused(capsys, "generate", folder, "a")


def test_a_text_too_short_to_score_fails_before_the_job(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too short")
    job = ("compress", dense, "--output", tmp_path / "out", "--text", short)
    assert "fewer than one window" in refused(capsys, *job, "--calibration", TEXT)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damping", ["nan", "-1", "inf"])
def test_damping_is_checked_at_once(
    dense: Path, damping: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--output", "unused", "--damping", damping)
    assert "damping must be" in refused(capsys, "compress", dense, *given)


def test_blocks_are_plain_digits(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "--blocks takes" in refused(capsys, "plan", dense, "--blocks", "²")


def test_a_plan_is_shown_whole_where_the_terminal_is_narrow(
    dense: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    with pytest.raises(SystemExit):
        cli.main(["plan", str(dense), "--keep", "0.8"])
    shown = capsys.readouterr().out
    assert "…" not in shown
    assert "rank=" in shown and "blocks=" in shown


def test_models_are_loaded_from_a_path_in_words(dense: Path) -> None:
    assert blastnn.load_model(str(dense)).config.model_type == "llama"


SPEC = blastnn.Blast(16, 12, rank=3, blocks=(2, 2))
MOMENT = moment_of(12, 100)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda moment: moment + 0.5 * torch.eye(12).roll(1, 0) * moment.max(), "not symmetric"),
        (lambda moment: moment.numpy(), "must be a torch tensor"),
        (lambda moment: moment.to_sparse(), "ordinary tensor"),
        (lambda moment: moment.to("meta"), "ordinary tensor"),
        (lambda moment: moment * float("nan"), "or its input, is damaged"),
    ],
)
def test_second_moments_that_are_none(change: Callable[[Tensor], Any], error: str) -> None:
    blastnn.factorize(normal(16, 12), SPEC, MOMENT)
    with pytest.raises(FactorizationError, match=error):
        blastnn.factorize(normal(16, 12), SPEC, change(MOMENT))


@pytest.mark.parametrize("seed", ["x", None, -1, 2**70, 1.5, True])
def test_seeds_are_whole_numbers(seed: Any) -> None:
    with pytest.raises(FactorizationError, match="seed must be"):
        blastnn.factorize(normal(16, 12), SPEC, seed=seed)


def test_numbers_of_eight_bits_are_not_factorised() -> None:
    weight = normal(16, 12)
    with pytest.raises(FactorizationError, match="16, 32 or 64 bits"):
        blastnn.factorize(weight.to(torch.float8_e4m3fn), SPEC)
    with pytest.raises(FactorizationError, match="16, 32 or 64 bits"):
        blastnn.factorize(weight, SPEC, dtype=torch.float8_e4m3fn)


@pytest.mark.parametrize(
    ("choices", "error"),
    [
        ({"keep": "0.5"}, "keep must be a number"),
        ({"keep": None}, "keep must be a number"),
        ({"blockz": 4}, "there is no option 'blockz'"),
        ({"damping": float("nan")}, "damping must be"),
        ({"seed": -1}, "seed must be from 0"),
    ],
)
def test_compress_names_a_wrong_choice(choices: dict[str, Any], error: str) -> None:
    with pytest.raises(PlanError, match=error):
        blastnn.compress(nn.Linear(8, 8), **choices)


def test_compress_names_what_it_cannot_work_with(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="torch module"):
        blastnn.compress("a name")  # type: ignore[arg-type]
    with pytest.raises(CalibrationError, match="empty"):
        blastnn.compress(nn.Linear(8, 8), calibration=[torch.zeros(0, 8)])
    with pytest.raises(BlastnnError, match=r"no text file missing\.txt"):
        blastnn.compress_checkpoint(dense, tmp_path / "out", calibration="missing.txt")


def test_tokens_are_those_of_the_calibration_and_one_path_is_one_text(
    dense: Path, tmp_path: Path
) -> None:
    report, _ = blastnn.compress_checkpoint(
        dense,
        tmp_path / "out",
        calibration=str(TEXT),
        texts=TEXT,
        scored_tokens=64,
        tokens=128,
        window=64,
        keep=0.6,
        blocks=(2, 2),
        sweeps=2,
        allow_slower=True,
    )
    assert report["calibration"]["tokens"] == 128
    assert report["measured"]["perplexity"][0]["tokens"] == 64


JOB = {"calibration": [], "keep": 0.6, "blocks": (2, 2), "sweeps": 2, "allow_slower": True}


@pytest.mark.parametrize(
    ("solver", "structure", "error"),
    [
        ("foo", "blast", "unknown solver 'foo'"),
        ("svd", "blast", "does not fit a blast"),
        ("precgd", "lowrank", "does not fit a lowrank"),
    ],
)
def test_a_wrong_solver_is_refused_before_the_job(
    dense: Path,
    tmp_path: Path,
    solver: str,
    structure: str,
    error: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    given = ("--solver", solver, "--structure", structure, "--calibration", TEXT)
    assert error in refused(capsys, "compress", dense, "--output", tmp_path / "out", *given)
    assert not (tmp_path / "out").exists()
    assert error in refused(capsys, "compress", dense, "--dry-run", *given)
    with pytest.raises(BlastnnError, match=error):
        blastnn.compress(nn.Linear(64, 64), solver=solver, structure=structure)


@pytest.mark.parametrize(
    "given",
    [
        ("--keep", "0.7"),
        ("--structure", "lowrank"),
        ("--blocks", "2"),
        ("--of", "model"),
        ("--allocation", "measured"),
        ("--targets", "*"),
    ],
    ids=str,
)
def test_a_plan_is_not_overruled(
    dense: Path, tmp_path: Path, given: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.json"
    with pytest.raises(SystemExit) as left:
        cli.main(["plan", str(dense), "--keep", "0.5", "--output", str(plan)])
    assert left.value.code == 0
    assert "shares  uniform here" in capsys.readouterr().out
    job = ("compress", dense, "--output", tmp_path / "out", "--plan", plan)
    assert f"leave {given[0]} out" in refused(capsys, *job, *given)


def test_the_report_tells_the_budget_of_a_plan(dense: Path, tmp_path: Path) -> None:
    blastnn.compress_checkpoint(dense, tmp_path / "one", **JOB)
    config = json.loads((tmp_path / "one" / "report.json").read_text())
    assert config["options"]["keep"] == 0.6
    plan = tmp_path / "plan.json"
    with pytest.raises(SystemExit):
        cli.main(["plan", str(dense), "--keep", "0.5", "--blocks", "2", "--output", str(plan)])
    report, _ = blastnn.compress_checkpoint(dense, tmp_path / "two", calibration=[], plan=plan)
    assert report["options"]["keep"] == 0.5


def test_a_finished_job_is_measured_on_what_is_asked_now(dense: Path, tmp_path: Path) -> None:
    def job(**asked: Any) -> tuple[dict[str, Any], bool]:
        given = {**JOB, "window": 64, "resume": True, **asked}
        return blastnn.compress_checkpoint(dense, tmp_path / "out", **given)

    assert job()[0]["measured"] is None
    report, fresh = job(texts=TEXT, scored_tokens=64)
    assert not fresh and report["measured"]["perplexity"][0]["tokens"] == 64
    for asked in ({"texts": TEXT, "scored_tokens": 64}, {}):
        assert job(**asked)[0] == report
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == report
    assert job(texts=TEXT, scored_tokens=128)[0]["measured"]["perplexity"][0]["tokens"] == 128


def test_options_and_choices_are_not_mixed(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="not both: keep would be ignored"):
        blastnn.compress_checkpoint(dense, tmp_path / "out", options=Options(), keep=0.9)


@pytest.mark.parametrize("tokens", [0, -5, "3", True])
def test_scored_tokens_are_at_least_one(dense: Path, tmp_path: Path, tokens: Any) -> None:
    with pytest.raises(PlanError, match="scored_tokens must be"):
        blastnn.compress_checkpoint(dense, tmp_path / "out", scored_tokens=tokens)


def test_sweeps_are_a_whole_number() -> None:
    with pytest.raises(PlanError, match="sweeps must be a whole number"):
        blastnn.compress(nn.Linear(8, 8), sweeps="3")


def test_presets_are_those_of_the_command_line() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(24, 24)), [torch.randn(40, 24)]
    given = {"calibration": x, "allow_slower": True}
    default = blastnn.compress(model, **given)
    assert default.plan.layers[0].spec.blocks == (8, 8)
    assert default.records[0].solver_status == "ran its 60 sweeps"
    fast = blastnn.compress(model, preset="fast", **given)
    assert fast.records[0].solver_status == "ran its 20 sweeps"
    with pytest.raises(PlanError, match="unknown preset"):
        blastnn.compress(model, preset="quick", **given)


def test_an_encoder_is_compared_on_every_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, other = make_folder(tmp_path / "bert", "bert"), tmp_path / "other.txt"
    other.write_text("another text " * 100)
    report, _ = blastnn.compress_checkpoint(
        source, tmp_path / "out", texts=[TEXT, other], window=32, scored_tokens=64, **JOB
    )
    names = [row["text"] for row in report["measured"]["cosine"]]
    assert names == [str(TEXT), str(other)]
    assert all(name in (tmp_path / "out" / "report.html").read_text() for name in names)
    assert "does not predict the next token" in refused(capsys, "generate", source, "hello")


@pytest.mark.parametrize("seed", ["-4", "99999999999999999999999"])
def test_a_sampling_seed(dense: Path, seed: str, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--temperature", "1", "--seed", seed)
    assert "seed must be from 0" in refused(capsys, "generate", dense, "hello", *given)


@pytest.mark.parametrize(
    "given",
    [
        ("evaluate", "--text", str(TEXT), "--limit", "3"),
        ("kernels", "--tokens", "4"),
    ],
    ids=str,
)
def test_options_of_no_use(
    dense: Path, given: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert "is of use with" in refused(capsys, given[0], dense, *given[1:])


def test_none_is_no_text_among_others(dense: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = ("--output", "unused", "--calibration", "none", "--calibration", TEXT)
    assert "means no text at all" in refused(capsys, "compress", dense, *given)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"vocab_size": "x"}, "cannot build"),
        ({"num_attention_heads": 0}, "cannot build"),
        ({"hidden_size": 48}, "but config.json makes it"),
    ],
    ids=str,
)
def test_configurations_that_contradict_themselves_or_the_weights(
    dense: Path,
    tmp_path: Path,
    change: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(dense, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **change}))
    if "hidden_size" in change:
        assert words in refused(capsys, "evaluate", folder, "--text", TEXT, "--window", "32")
    else:
        assert words in refused(capsys, "plan", folder)


def test_a_group_that_no_kernel_could_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("--output", tmp_path / "out", "--bits", "int8", "--group", str(10**30))
    assert "group must be at most" in refused(capsys, "quantize", tmp_path, *given)


def test_a_file_is_no_folder_to_write_to(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "taken"
    file.write_text("mine")
    blastnn.compress_checkpoint(dense, tmp_path / "small", **JOB)
    for command in (
        ("compress", dense, "--calibration", "none"),
        ("sweep", dense, "--method", "svd", "--keep", "0.6", "--calibration", TEXT, "--text", TEXT),
        ("quantize", tmp_path / "small", "--bits", "int8"),
    ):
        for output in (file, file / "below"):
            error = refused(capsys, *command, "--output", output)
            assert f"{file} is a file, not a folder" in error
    assert file.read_text() == "mine"
