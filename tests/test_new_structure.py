"""What a researcher has to touch to add a structure: one new file, and one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]

CIRCULANT = '''
"""Circulant matrices: ``A_ij = c_((i - j) mod n)``."""

from dataclasses import dataclass

import torch

from blastnn.errors import StructureError
from blastnn.structures.base import Structure, require_budget, seeded_normal
from blastnn.structures.registry import register


@register
@dataclass(frozen=True)
class Circulant(Structure):
    """The top left ``m x n`` corner of a circulant matrix of size ``max(m, n)``."""

    name = "circulant"

    @property
    def size(self):
        return max(self.out_features, self.in_features)

    def factor_shapes(self):
        return {"c": (self.size,)}

    @property
    def num_multiplications(self):
        return self.out_features * self.in_features

    def to_dense(self, factors):
        c = factors["c"]
        rows = torch.arange(self.out_features, device=c.device)[:, None]
        columns = torch.arange(self.in_features, device=c.device)
        return c[(rows - columns) % self.size]

    def matmul(self, x, factors):
        self.check_input(x)
        return x @ self.to_dense(factors).mT

    def init(self, *, seed=0, dtype=torch.float32, device="cpu"):
        return {"c": self.in_features**-0.5 * seeded_normal((self.size,), seed, 0, dtype, device)}

    def larger(self, step=1):
        return None

    @classmethod
    def for_budget(cls, out_features, in_features, params, *, step=1, **options):
        require_budget(params, step)
        spec = cls(out_features, in_features)
        if spec.num_params > params:
            raise StructureError(f"{spec} needs {spec.num_params} numbers, more than {params}")
        return spec
'''
LINE = "from blastnn.structures.circulant import Circulant as Circulant\n"

# Each goes over every registered structure.
CONFORMANCE = (
    *("structures", "linear", "factorize", "plan", "kernels", "quantize", "quantized_models"),
    *("export", "end_to_end"),
)

USE = """
import re
from pathlib import Path

import pytest
import torch
import blastnn
from blastnn import cli
from blastnn.factorize import automatic_table, factorize
from blastnn.structures import spec_from_json, structure_named


def test_use():
    assert Path(blastnn.__file__).parents[1] == Path(__file__).parents[1]
    spec = structure_named("circulant").for_budget(12, 12, 12)
    assert spec_from_json(spec.to_json()) == spec
    weight = spec.to_dense(spec.init(seed=1, dtype=torch.float64))
    result = factorize(weight, spec)
    assert result.solver == automatic_table()["circulant"] == "fit"
    assert result.relative_error < 1e-6, result.relative_error
    model = torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.ReLU(), torch.nn.Linear(12, 12))
    small = blastnn.compress(
        model, keep=0.5, calibration=[torch.randn(64, 12)], structure="circulant"
    ).model
    assert small(torch.randn(3, 12)).shape == (3, 12)
    assert sum(p.numel() for p in small.parameters()) == 2 * 24


def test_command(capsys):
    with pytest.raises(SystemExit):
        cli.main(["solvers"])
    assert re.search(r"^circulant +fit ", capsys.readouterr().out, re.MULTILINE)
"""


def test_one_file_and_one_line_add_a_structure(tmp_path):
    for folder in ("blastnn", "tests"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in ("pyproject.toml", "LICENSE"):  # the licence is the text of made-up calibrations
        shutil.copy(ROOT / file, tmp_path)
    (tmp_path / "blastnn/structures/circulant.py").write_text(CIRCULANT)
    with (tmp_path / "blastnn/structures/__init__.py").open("a") as registry:
        registry.write(LINE)
    (tmp_path / "tests/test_circulant.py").write_text(USE)
    # The conformance suites find it by themselves.
    suites = [f"tests/test_{name}.py" for name in ("circulant", *CONFORMANCE)]
    options = ["-q", "-x", "-rA", "-k", "circulant", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *suites],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    passed = Counter(re.findall(r"^PASSED (\S+?)::", done.stdout, re.MULTILINE))
    assert set(passed) == set(suites)
    assert passed.total() > 200
    assert "skipped" not in done.stdout
