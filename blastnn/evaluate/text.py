"""Text to windows of tokens, the same way for calibration and for evaluation.

A text is tokenised once, without special tokens, and cut into contiguous, non-overlapping windows;
what is left at the end is dropped. Where the tokenizer frames a sequence with special tokens
(``[CLS] ... [SEP]``, a leading BOS), every window is framed alike. Between the documents of a text
stands the token that the model was trained to see there: a language model makes attention sinks of
such tokens, and a calibration without them leaves to chance what becomes of these (docs/log.md).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blastnn.errors import CalibrationError
from blastnn.files import sha256_of_text
from blastnn.models.demo import PREFIX, demo_documents

# What ends a document in the training text of language models. Looked for by name, because the
# ``eos_token`` of a chat model ends a turn.
ENDS_OF_DOCUMENT = ("<|endoftext|>", "<|end_of_text|>")


@dataclass(frozen=True)
class Text:
    """A named text: one document, or several that do not continue each other."""

    name: str
    documents: tuple[str, ...]

    @property
    def sha256(self) -> str:
        """Hex digest of the UTF-8 bytes, of several documents with a NUL between them."""
        return sha256_of_text("\0".join(self.documents))

    def beginning(self, characters: int) -> Text:
        """The first documents, whole, until they have so many characters; of one, the first."""
        if len(self.documents) == 1:
            return Text(self.name, (self.documents[0][:characters],))
        ends = torch.tensor([len(document) for document in self.documents]).cumsum(0)
        count = int((ends < characters).sum()) + 1
        return Text(self.name, self.documents[:count])


@dataclass(frozen=True)
class Windows:
    """Token ids ``(windows, window)`` with where they came from."""

    ids: Tensor
    sources: list[dict[str, str | int]]

    @property
    def sha256(self) -> str:
        """Hex digest of the ids as 64-bit integers."""
        return hashlib.sha256(self.ids.contiguous().numpy().tobytes()).hexdigest()


def read_text(source: str | Path) -> Text:
    """A UTF-8 text file, or a text of the demo by a name like ``demo:wiki-test``.

    A file is one document; one that ends in ``.jsonl`` has one a line, ``{"text": "..."}``.

    Raises:
        CalibrationError: missing, empty, not UTF-8, a line that is no document, or no such demo
            text.
    """
    if str(source).startswith(PREFIX):
        return Text(str(source), demo_documents(str(source)))
    path = Path(source)
    try:
        content = path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise CalibrationError(f"there is no text file {path}") from error
    except UnicodeDecodeError as error:
        raise CalibrationError(
            f"{path} is not UTF-8 text (byte {error.start}); convert it, e.g. with iconv"
        ) from error
    except OSError as error:
        raise CalibrationError(f"{path} cannot be read: {error.strerror}") from error
    documents = tuple(_lines(path, content)) if path.suffix == ".jsonl" else (content,)
    if not any(document.strip() for document in documents):
        raise CalibrationError(f"{path} is empty; give a file with text")
    return Text(str(source), documents)


def _lines(path: Path, content: str) -> Iterator[str]:
    """The documents of a ``.jsonl`` file; blank lines and empty documents are none."""
    # Not splitlines(): JSON may hold the other characters that Python takes for ends of lines.
    for number, line in enumerate(content.split("\n"), 1):
        if not line.strip():
            continue
        try:
            document = json.loads(line)["text"]
            document.encode("utf-8")  # JSON can say what is no character
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            document = None
        if not isinstance(document, str):
            raise CalibrationError(
                f'{path}, line {number} is not a document: expected {{"text": "..."}}; '
                "a plain text file must not end in .jsonl"
            )
        if document.strip():
            yield document


def first_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, window: int, tokens: int
) -> Windows:
    """The first ``tokens`` tokens of a text (fewer if it ends before) in whole windows."""
    body, framed = _framed_windows(text, tokenizer, window)
    count = min(len(body), max(tokens // window, 1))
    ids = framed[:count]
    return Windows(ids, [_source(text, ids)])


def spread_windows(
    texts: list[Text], tokenizer: PreTrainedTokenizerBase, window: int, tokens: int
) -> Windows:
    """About ``tokens`` tokens in whole windows, shared equally among texts, spread over each.

    Raises:
        CalibrationError: a text is shorter than one window.
    """
    chosen, sources = [], []
    share = max(tokens // window // len(texts), 1)
    for text in texts:
        _, framed = _framed_windows(text, tokenizer, window)
        count = min(share, len(framed))
        ids = framed[torch.arange(count) * len(framed) // count]
        chosen.append(ids)
        sources.append(_source(text, ids))
    return Windows(torch.cat(chosen), sources)


def _source(text: Text, ids: Tensor) -> dict[str, str | int]:
    return {
        "name": text.name,
        "sha256": text.sha256,
        "documents": len(text.documents),
        "tokens": ids.numel(),
        "windows": ids.shape[0],
    }


def _framed_windows(
    text: Text, tokenizer: PreTrainedTokenizerBase, window: int
) -> tuple[Tensor, Tensor]:
    before, after = special_frame(tokenizer)
    length = window - len(before) - len(after)
    if length < 2:
        raise CalibrationError(f"a window of {window} tokens is too short; give a longer --window")
    encoded = _encode(text, tokenizer)
    body = torch.tensor(encoded[: len(encoded) // length * length], dtype=torch.long)
    if not body.numel():
        raise CalibrationError(
            f"{text.name} has {len(encoded)} tokens, fewer than one window of {length}; "
            "give more text or a smaller --window"
        )
    body = body.view(-1, length)
    frame = [torch.tensor(ids, dtype=torch.long).expand(len(body), -1) for ids in (before, after)]
    return body, torch.cat([frame[0], body, frame[1]], dim=1)


def _encode(text: Text, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of all documents, each but the first behind the token that ends one."""
    found = tokenizer(list(text.documents), add_special_tokens=False, verbose=False)["input_ids"]
    between = end_of_document(tokenizer)
    return found[0] + list(chain.from_iterable(between + each for each in found[1:]))


def end_of_document(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token between two documents, if the tokenizer has one.

    Tokenizers that frame a sequence at its end belong to models that read one document at a time.
    """
    if special_frame(tokenizer)[1]:
        return []
    known = tokenizer.get_added_vocab()
    named = [known[name] for name in ENDS_OF_DOCUMENT if name in known][:1]
    last = tokenizer.eos_token_id
    return named or ([] if last is None else [last])


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a sequence."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []
