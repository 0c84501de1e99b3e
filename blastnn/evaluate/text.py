"""Text to windows of tokens, the same way for calibration and for evaluation.

A text is tokenised once, without special tokens, and cut into contiguous, non-overlapping windows;
what is left at the end is dropped. Where the tokenizer frames a sequence with special tokens
(``[CLS] ... [SEP]``, a leading BOS), every window is framed alike.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from blastnn.errors import CalibrationError
from blastnn.files import sha256_of_text
from blastnn.models.demo import PREFIX, demo_text


@dataclass(frozen=True)
class Text:
    """A named text and the digest of its bytes."""

    name: str
    content: str

    @property
    def sha256(self) -> str:
        """Hex digest of the UTF-8 bytes."""
        return sha256_of_text(self.content)


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

    Raises:
        CalibrationError: missing, empty, not UTF-8, or no such demo text.
    """
    if str(source).startswith(PREFIX):
        return Text(str(source), demo_text(str(source)))
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
    if not content.strip():
        raise CalibrationError(f"{path} is empty; give a file with text")
    return Text(str(source), content)


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
    encoded = tokenizer(text.content, add_special_tokens=False, verbose=False)["input_ids"]
    body = torch.tensor(encoded[: len(encoded) // length * length], dtype=torch.long)
    if not body.numel():
        raise CalibrationError(
            f"{text.name} has {len(encoded)} tokens, fewer than one window of {length}; "
            "give more text or a smaller --window"
        )
    body = body.view(-1, length)
    frame = [torch.tensor(ids, dtype=torch.long).expand(len(body), -1) for ids in (before, after)]
    return body, torch.cat([frame[0], body, frame[1]], dim=1)


def special_frame(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The special tokens that the tokenizer puts before and after a sequence."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a", add_special_tokens=True)["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start], full[start + len(bare) :]
    return [], []
