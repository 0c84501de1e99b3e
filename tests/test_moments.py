"""Moments of inputs, and what layers fall short of, against plain formulas."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from blastnn.compress.job import prepare_job
from blastnn.compress.moments import MomentSum
from blastnn.compress.options import Options
from blastnn.compress.plan import ALLOCATED, UNTARGETED
from blastnn.compress.run import run_job
from blastnn.compress.streams import OpenBlock, Streams
from blastnn.files import write_json
from blastnn.models.walk import Call
from tests.made_up import TEXT, make_folder


@pytest.mark.parametrize("n", [1, 383, 384, 385, 1000])
def test_moments_are_those_of_all_inputs(n: int) -> None:
    generator = torch.Generator().manual_seed(n)
    x, y, gap = (torch.randn(2, 50, k, generator=generator) for k in (n, n, 7))
    total = MomentSum()
    for now, dense, missing in zip(x, y, gap, strict=True):
        total.add(now, dense, missing)
    found, (now, dense, missing) = (
        total.finish("a"),
        (t.flatten(0, 1).double() for t in (x, y, gap)),
    )
    torch.testing.assert_close(found.second, now.mT @ now / 100, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.cross, dense.mT @ now / 100, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found.shortfall, missing.mT @ now / 100, rtol=1e-5, atol=1e-6)
    assert torch.equal(found.second, found.second.mT)
    assert found.tokens == 100


class Twice(nn.Module):
    """A block that adds the output of one layer to its stream twice."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer = (nn.Linear(6, 6, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """The stream, twice added to, in place the second time."""
        x = x + self.layer(self.first(x))
        y = self.layer(x)
        y += x
        return y


@torch.no_grad()
def test_a_layer_called_twice_falls_short_of_its_own_outputs_alone() -> None:
    """What is added to the stream in place afterwards is none of them."""
    block, calls = Twice(), [Call(0, (), {})]
    hidden = torch.randn(3, 1, 5, 6, generator=torch.Generator().manual_seed(1)).split(1)
    streams = Streams(*(list(part[0] for part in hidden),) * 2)
    opened = OpenBlock(block, calls, streams, "")
    groups = opened.groups(["first", "layer"])
    opened.watch_dense(groups, "full", drift=0.5)
    opened.moments(groups[0])
    streams.compressed = [1.1 * x for x in streams.compressed]  # as if something had been replaced
    opened._entered_equal = False
    found = opened.moments(groups[1])
    dense, now = [], []
    for window in hidden:
        for into, x in ((dense, window[0]), (now, 1.1 * window[0])):
            z = block.first(x)
            into.append(torch.cat([z, x + block.layer(z)], dim=1).view(-1, 6))
    x, y = torch.cat(now).double(), torch.cat(dense).double()
    expected = (y - x) @ block.layer.weight.double().mT
    torch.testing.assert_close(found.shortfall, expected.mT @ x / 30, rtol=1e-4, atol=1e-6)


def test_streams_stay_one_until_something_is_replaced(tmp_path: Path) -> None:
    """A block that is not touched makes no second stream, and nothing in it is refitted."""
    folder = make_folder(tmp_path / "dense", "llama")
    options = Options(keep=0.5, structure="lowrank", tokens=256, window=64, allow_slower=True)
    plan = prepare_job(folder, options, [str(TEXT)]).plan.to_json()
    for name in plan["layers"]:
        if ".2." not in name:
            plan["layers"][name] = {"keep": ALLOCATED if ".0." in name else UNTARGETED}
    write_json(tmp_path / "plan.json", plan)
    job = prepare_job(folder, options, [str(TEXT)], tmp_path / "plan.json")
    outcome = run_job(job, tmp_path / "out")
    by_block = {record.name: record for record in outcome.journal.records}
    assert not any(record.refitted for name, record in by_block.items() if ".0." in name)
    assert any(record.status == "compressed" for name, record in by_block.items() if ".2." in name)
