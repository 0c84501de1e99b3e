"""The house itself: imports point one way, and the README's Python runs."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "blastnn"
# Each room may import from itself and from the rooms named before it, never from later ones.
FLOORS = [
    {"version", "errors", "files", "dtypes", "allocator", "arithmetic"},
    {"structures", "models"},
    {"quantization"},
    {"kernels"},
    {"factorize"},
    {"linear"},
    {"checkpoint"},
    {"integrations"},
    {"evaluate"},
    {"compress"},
    {"sweep"},
    {"choices", "display"},
    {"cli"},
    {"__main__", "__init__"},
]
SEPARATE = {("models", "structures"), ("structures", "models")}


def room_of(path: Path) -> str:
    """The first component below the package."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> set[str]:
    """The rooms of the package that a file imports from."""
    rooms = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        rooms |= {name.split(".")[1] for name in names if name.startswith("blastnn.")}
    return rooms


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_imports_point_one_way(path: Path) -> None:
    floor = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
    room = room_of(path)
    for other in imported_rooms(path) - {room}:
        assert floor[other] <= floor[room], f"{path} imports from {other}"
        assert (room, other) not in SEPARATE, f"{path} imports from {other}"


def test_readme_python_runs() -> None:
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        if "from_pretrained" not in block:  # needs the demo to have run
            exec(compile(block, "README.md", "exec"), {})


def test_version_is_one() -> None:
    import blastnn

    assert blastnn.__version__ in (ROOT / "CHANGELOG.md").read_text()
