"""Texts of several documents: where they come from, and what stands between them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import processors
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from blastnn.cli import app
from blastnn.compress.html_provenance import calibration_section
from blastnn.errors import CalibrationError
from blastnn.evaluate.text import first_windows, read_text
from blastnn.models.demo import documents_of
from tests.made_up import TEXT, byte_tokenizer, make_folder

END = 256


def lines(path: Path, *documents: str) -> Path:
    """A file with one document a line."""
    path.write_text("".join(json.dumps({"text": each}) + "\n" for each in documents))
    return path


def ids_of(path: Path, tokenizer: PreTrainedTokenizerFast, window: int) -> list[list[int]]:
    """The windows of a whole text."""
    found: list[list[int]] = first_windows(read_text(path), tokenizer, window, 1000).ids.tolist()
    return found


def test_between_documents_stands_the_token_that_ends_one(tmp_path: Path) -> None:
    path = lines(tmp_path / "text.jsonl", "ab\u2028", "cdef", "", "  ", "gh")
    encode = byte_tokenizer().encode
    expected = [*encode("ab\u2028"), END, *encode("cdef"), END, *encode("gh")]
    assert ids_of(path, byte_tokenizer(), len(expected)) == [expected]


def test_a_chat_models_end_of_turn_does_not_end_documents(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"eos_token": "<turn>", "extra_special_tokens": ["<|endoftext|>"]})
    (found,) = ids_of(lines(tmp_path / "text.jsonl", "ab", "cd"), tokenizer, 5)
    assert found[2] == tokenizer.get_added_vocab()["<|endoftext|>"] != tokenizer.eos_token_id


def test_tokenizers_that_frame_a_sequence_or_end_nothing_put_nothing_between(
    tmp_path: Path,
) -> None:
    path = lines(tmp_path / "text.jsonl", "ab", "cd")
    framed, plain = byte_tokenizer(), byte_tokenizer()
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<end> $A <end>", special_tokens=[("<end>", END)]
    )
    assert ids_of(path, framed, 6) == [[END, *plain.encode("abcd"), END]]
    plain.eos_token = None
    assert ids_of(path, plain, 4) == [plain.encode("abcd")]


def test_a_text_file_is_one_document_whatever_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text('{"text": "ab"}\n{"text": "cd"}\n')
    assert read_text(path).documents == (path.read_text(),)


@pytest.mark.parametrize(
    "line",
    [
        "plain words",
        '{"content": "ab"}',
        '{"text": 3}',
        "[1, 2]",
        '"text"',
        "[" * 100_000,
        '{"text": "\\ud800"}',
    ],
)
def test_a_line_that_is_no_document_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "text.jsonl"
    path.write_text('{"text": "ab"}\n\n' + line + "\n")
    with pytest.raises(CalibrationError, match=r"text\.jsonl, line 3 is not a document: expected"):
        read_text(path)


def test_a_file_of_empty_documents_is_empty(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="is empty"):
        read_text(lines(tmp_path / "text.jsonl", "", " "))


def test_the_beginning_of_a_text_ends_with_a_whole_document(tmp_path: Path) -> None:
    several = read_text(lines(tmp_path / "text.jsonl", "abc", "def", "ghi"))
    assert several.beginning(3).documents == ("abc",)
    assert several.beginning(4).documents == ("abc", "def")
    assert several.beginning(100).documents == several.documents
    assert read_text(TEXT).beginning(5).documents == (TEXT.read_text()[:5],)


def test_compress_takes_documents_and_reports_how_many(tmp_path: Path) -> None:
    source = make_folder(tmp_path / "model")
    path = lines(tmp_path / "text.jsonl", *TEXT.read_text().split("\n\n"))
    words = ["compress", str(source), "--output", str(tmp_path / "out"), "--keep", "0.5"]
    words += ["--calibration", str(path), "--text", str(path), "--window", "32"]
    words += ["--calibration-tokens", "512", "--scored-tokens", "128"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    (source_row,) = report["calibration"]["sources"]
    assert source_row["documents"] == len(read_text(path).documents) > 1
    assert "Documents" in str(calibration_section(report))


def test_the_demos_calibration_texts_are_cut_where_documents_begin() -> None:
    wiki = '<doc id="1">\nOne\n\nbody\n</doc>\n<doc id="2">\nTwo <doc here\n</doc>\n<doc id="3'
    assert [document.split("\n")[0] for document in documents_of(wiki, "wiki")] == [
        '<doc id="1">',
        '<doc id="2">',
        '<doc id="3',
    ]
    assert documents_of("one two\n\n three \nfour", "c4") == ("one two", "three", "four")


@pytest.mark.slow
def test_the_demo_is_calibrated_on_documents_and_scored_on_one_text() -> None:
    wiki, c4 = (read_text(f"demo:{name}-calibration") for name in ("wiki", "c4"))
    assert len(wiki.documents) > 1000 and all(d.startswith("<doc id=") for d in wiki.documents)
    assert len(c4.documents) > 300 and not any("\n" in document for document in c4.documents)
    for name in ("wiki-test", "c4-test", "tiny"):
        assert len(read_text(f"demo:{name}").documents) == 1
