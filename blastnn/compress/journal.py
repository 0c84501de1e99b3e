"""What is done already: the journal of a job, and the hidden states with which to go on.

The journal lives in ``.blastnn/`` below the output folder. A block counts as finished once the
journal says so, and the journal says so only after the block's shard and the hidden states behind
it are on the disk. Killed at any moment, a job therefore goes on from the last finished block.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from blastnn.compress.block import LayerRecord
from blastnn.compress.streams import Streams
from blastnn.errors import ResumeError
from blastnn.files import make_folder, read_json, remove_parts, write_json, write_tensors
from blastnn.models.tensors import read_tensors

FOLDER = ".blastnn"
JOURNAL = "journal.json"
FORMAT = "blastnn-journal/1"


def fingerprint(identity: Mapping[str, Any]) -> str:
    """One digest of everything that decides the output's bytes."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


@dataclass
class Journal:
    """The state of a job on disk.

    ``identity`` is everything that decides the output's bytes; ``finished`` is how many parts
    (blocks, then the head) are written; ``refined`` tells by block how its refinement went;
    ``seconds`` sums the time spent by kind over all sittings.
    """

    output: Path
    identity: dict[str, Any]
    records: list[LayerRecord] = field(default_factory=list)
    refined: dict[str, dict[str, Any]] = field(default_factory=dict)
    finished: int = 0
    weights_done: bool = False
    sittings: int = 1
    seconds: dict[str, float] = field(default_factory=dict)
    probe: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> Path:
        """Where the journal and the hidden states are."""
        return self.output / FOLDER

    def save(self) -> None:
        """Write the journal durably."""
        values = {
            "format": FORMAT,
            "fingerprint": fingerprint(self.identity),
            "identity": self.identity,
            "finished": self.finished,
            "weights_done": self.weights_done,
            "sittings": self.sittings,
            "seconds": self.seconds,
            "probe": self.probe,
            "records": [asdict(record) for record in self.records],
            "refined": self.refined,
        }
        write_json(self.folder / JOURNAL, values)

    def add_seconds(self, kind: str, seconds: float) -> None:
        """Count time of one kind."""
        self.seconds[kind] = self.seconds.get(kind, 0.0) + seconds

    def finish_part(self, streams: Streams | None, check: Tensor) -> None:
        """One more part is written: keep what the next one needs, then say so."""
        self.finished += 1
        write_tensors(self.states_file, pack_states(streams, check))
        self.save()
        for path in self.folder.glob("states-*.safetensors"):
            if path != self.states_file:
                path.unlink()

    def finish_weights(self) -> None:
        """All weights and ``config.json`` are in place; hidden states are no longer needed."""
        self.weights_done = True
        self.save()
        for path in self.folder.glob("states-*.safetensors"):
            path.unlink()

    @property
    def states_file(self) -> Path:
        """The hidden states behind the last finished part."""
        return self.folder / f"states-{self.finished:05d}.safetensors"

    def load_states(self) -> tuple[Streams | None, Tensor]:
        """The hidden states behind the last finished part."""
        return unpack_states(read_tensors(self.states_file))

    @classmethod
    def open(cls, output: Path, identity: dict[str, Any], resume: bool) -> Self:
        """Start a job in a new or empty folder, or with ``resume`` go on with the one in it.

        Raises:
            ResumeError: the folder holds something else, another job, or cannot be written to.
        """
        if not _occupied(output):
            make_folder(output / FOLDER)
            journal = cls(output, identity)
            journal.save()
            return journal
        if not resume:
            raise ResumeError(
                f"the output folder {output} is not empty; choose another one, or give --resume "
                "to go on with the job in it"
            )
        return cls._reopen(output, identity)

    @classmethod
    def _reopen(cls, output: Path, identity: dict[str, Any]) -> Self:
        path = output / FOLDER / JOURNAL
        if not path.is_file():
            raise ResumeError(f"{output} is not empty and holds no blastnn job to resume")
        values = read_json(path)
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            raise ResumeError(f"{path} is not a journal of this version of blastnn")
        refuse_changes(output, values["identity"], identity)
        remove_parts(output)
        remove_parts(output / FOLDER)
        records = [LayerRecord(**record) for record in values["records"]]
        return cls(
            output=output,
            identity=identity,
            records=records,
            refined=values["refined"],
            finished=values["finished"],
            weights_done=values["weights_done"],
            sittings=values["sittings"] + 1,
            seconds=values["seconds"],
            probe=values["probe"],
        )


def _occupied(output: Path) -> bool:
    """Whether the folder holds anything but an empty or half-made ``.blastnn``."""
    try:
        entries = [entry.name for entry in output.iterdir()] if output.exists() else []
    except NotADirectoryError as error:
        raise ResumeError(f"{output} is a file, not a folder") from error
    except OSError as error:
        raise ResumeError(f"cannot read {output}: {error.strerror}") from error
    return any(name != FOLDER for name in entries) or (output / FOLDER / JOURNAL).exists()


def refuse_changes(
    output: Path, before: dict[str, Any], now: dict[str, Any], what: str = "job"
) -> None:
    """Compare identities by key, so that the message can say what changed.

    Raises:
        ResumeError: something did; ``what`` is in the folder with the identity ``before``.
    """
    before, now = json.loads(json.dumps(before)), json.loads(json.dumps(now))
    changed = []
    for key in sorted(set(before) | set(now)):
        old, new = before.get(key), now.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            inner = sorted(k for k in set(old) | set(new) if old.get(k) != new.get(k))
            changed += [f"{key}.{k}: {old.get(k)!r} -> {new.get(k)!r}" for k in inner]
        elif old != new:
            changed.append(f"{key}: {old!r} -> {new!r}")
    if any(text.startswith("options.") for text in changed):
        # They decide the plan of every layer, which would only repeat them.
        changed = [text for text in changed if not text.startswith("plan")]
    if changed:
        shown = "; ".join(text if len(text) < 200 else f"{text[:200]}..." for text in changed[:5])
        raise ResumeError(
            f"{output} holds a {what} with another model, options or text ({shown}); repeat "
            "the original command, or choose another output folder"
        )


def pack_states(streams: Streams | None, check: Tensor) -> dict[str, Tensor]:
    """Hidden states by name; the compressed ones only where they differ from the dense ones."""
    states = {"check": check}
    if streams is not None:
        states |= {f"dense.{i:06d}": hidden for i, hidden in enumerate(streams.dense)}
        if not streams.equal:
            states |= {f"compressed.{i:06d}": h for i, h in enumerate(streams.compressed)}
    return states


def unpack_states(states: Mapping[str, Tensor]) -> tuple[Streams | None, Tensor]:
    """The inverse of ``pack_states``."""
    dense, compressed = (
        [states[name] for name in sorted(states) if name.startswith(f"{stream}.")]
        for stream in ("dense", "compressed")
    )
    return (Streams(dense, compressed or dense) if dense else None), states["check"]


class Lock:
    """Holds the output folder for one process; the system frees it however the process ends."""

    def __init__(self, output: Path) -> None:
        self._path = output / FOLDER / "lock"
        self._descriptor: int | None = None

    def __enter__(self) -> None:
        self._descriptor = os.open(self._path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._descriptor)
            raise ResumeError(
                f"another process is working in {self._path.parent.parent}"
            ) from error

    def __exit__(self, *_: object) -> None:
        assert self._descriptor is not None
        os.close(self._descriptor)
