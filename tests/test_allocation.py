"""Where the budget goes: spectra against their definition, plans against their predictions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import blastnn
from blastnn.compress.allocate import allocate, reach
from blastnn.compress.fit import fit_layer
from blastnn.compress.job import Job, Progress, prepare_job
from blastnn.compress.measured import MEASUREMENT, PLAN, measured_windows
from blastnn.compress.moments import Moments
from blastnn.compress.options import Options
from blastnn.compress.output_weight import RIDGE, OutputWeight
from blastnn.compress.plan import ALLOCATED, SLOWER, LayerPlan, Plan
from blastnn.compress.report import build_report
from blastnn.compress.run import run_job
from blastnn.compress.sensitivity import SensitivityPass, block_file, outputs_file
from blastnn.compress.spectrum import LayerSum, fisher_loss, measure_whole
from blastnn.files import read_json
from blastnn.models.tensors import read_tensors
from blastnn.models.walk import first_tensor
from blastnn.structures import Blast, LowRank, Structure
from tests.made_up import TEXT, make_folder, make_model

SMALL = {"keep": 0.6, "blocks": (2, 2), "tokens": 512, "window": 64, "sweeps": 2}
PLANNED = {"allow_slower": True, "blocks": (2, 2)}


def job_of(folder: Path, **choices: object) -> Job:
    """A prepared job on a made-up checkpoint."""
    options = Options(**{**SMALL, **choices})  # type: ignore[arg-type]
    return prepare_job(folder, options, [str(TEXT)])


def layers_of(job: Job) -> list[dict[str, int | None]]:
    """The names of the targeted layers, by block."""
    blocks = range(len(job.walker.blocks))
    return [{la.name: 2 for la in job.plan.of_block(i) if la.spec is not None} for i in blocks]


def test_labels_are_drawn_from_the_models_own_predictions() -> None:
    probabilities = torch.tensor([0.1, 0.6, 1e-9, 0.3])
    logits = probabilities.log().expand(20_000, 4).contiguous().requires_grad_()
    fisher_loss(logits, True, seed=1).backward()
    assert logits.grad is not None
    drawn = (logits.grad < 0).double().mean(0)  # the gradient is p, less 1 at the label
    assert drawn[2] == 0.0
    assert torch.allclose(drawn, probabilities.double(), atol=0.015)  # four standard deviations


@pytest.mark.parametrize(("rows", "columns"), [(6, 10), (10, 6), (7, 7)])
@pytest.mark.parametrize("ridges", [(0.0, 0.0), (0.2, 0.0), (0.0, 0.7), (0.05, 0.3)])
def test_a_spectrum_is_that_of_the_twice_weighted_matrix(
    rows: int, columns: int, ridges: tuple[float, float]
) -> None:
    torch.manual_seed(rows)
    layer = nn.Linear(columns, rows).requires_grad_(False)
    x, outer = torch.randn(3, 50, columns), torch.randn(3, 50, rows)
    total = LayerSum(layer)
    total.__enter__()
    for inputs, gradient in zip(x, outer, strict=True):
        (layer(inputs) * gradient).sum().backward()
    total.__exit__()
    flat, gradients = x.flatten(0, 1).double(), outer.flatten(0, 1).double()
    roots = []
    for vectors, ridge in ((gradients, ridges[1]), (flat, ridges[0])):
        moment = vectors.mT @ vectors / len(vectors)
        moment = moment + ridge * moment.diagonal().mean() * torch.eye(len(moment))
        values, basis = torch.linalg.eigh(moment)
        roots.append(basis * values.clamp(min=0).sqrt() @ basis.mT)
    expected = torch.linalg.svdvals(roots[0] @ layer.weight.double() @ roots[1]).square()
    found = torch.tensor(total.spectrum(*ridges)).double()
    torch.testing.assert_close(found[: len(expected)], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("rows", "columns"), [(120, 200), (200, 120)])
def test_moments_that_are_singular_have_a_spectrum(rows: int, columns: int) -> None:
    """Inputs of rank 3: the sums of their float32 products are a little indefinite."""
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=False).requires_grad_(False)
    x = torch.randn(2000, 3) @ torch.randn(3, columns)
    total = LayerSum(layer)
    with total:
        (layer(x) * torch.randn(2000, rows)).sum().backward()
    spectrum = torch.tensor(total.spectrum(0.0, 0.0))
    assert bool((spectrum[:3] > 0).all())
    assert float(spectrum[3:].max()) < 1e-4 * float(spectrum[2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert", "albert"])
def test_block_by_block_gives_what_the_whole_model_gives(family: str, tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "dense", family)
    job = job_of(folder)
    ids = measured_windows(job)
    streamed = SensitivityPass(job.walker, ids, layers_of(job), tmp_path / "pass", 3, True).run()
    model = make_model(family).requires_grad_(False)
    runs = [lambda each=each: first_tensor(model(each)) for each in ids.split(1)]
    predictions = model.get_output_embeddings() is not None
    names = {name: 2 for block in layers_of(job) for name in block}
    whole = measure_whole(model, names, runs, predictions, 3, job.walker.block_names)
    assert streamed.keys() == whole.spectra.keys() == whole.outputs.keys()
    for index, block in enumerate(job.walker.blocks):
        expected = whole.blocks[block.name]
        torch.testing.assert_close(
            read_tensors(block_file(tmp_path / "pass", index))["G"],
            expected,
            rtol=2e-3,
            atol=1e-4 * float(expected.max()),
        )
        for kind, found in read_tensors(outputs_file(tmp_path / "pass", index)).items():
            expected = whole.outputs[f"{block.name}.{kind}"]
            torch.testing.assert_close(
                found, expected, rtol=2e-3, atol=1e-4 * float(expected.max())
            )
    for name, spectrum in whole.spectra.items():
        expected = torch.tensor(spectrum)
        torch.testing.assert_close(
            torch.tensor(streamed[name]), expected, rtol=2e-3, atol=1e-4 * float(expected.max())
        )


def two_layers(keep: float = 0.5, size: int = 256) -> Plan:
    """Two equal layers, each with the uniform share."""
    spec = Blast.for_budget(size, size, int(keep * size * size), blocks=2)
    layers = tuple(LayerPlan(name, name, 0, size, size, spec, None) for name in ("a", "b"))
    return Plan(layers, 4 * size * size, keep, "targets")


def test_what_is_given_up_as_slower_is_saved_elsewhere() -> None:
    plan = two_layers(0.7)
    slow = LayerPlan("c", "c", 0, 256, 256, None, f"{SLOWER} as blast: 0.90 times its speed")
    spectra = {name: [float(256 - i) for i in range(256)] for name in ("a", "b")}
    before = allocate(plan, spectra, Options(keep=0.7, **PLANNED)).target_params[1]
    assert 0.67 * 2 * 256**2 < before <= 0.7 * 2 * 256**2
    longer = replace(plan, layers=(*plan.layers, slow))
    found = allocate(longer, spectra, Options(keep=0.7, **PLANNED))
    kept = sum(layer.planned_params for layer in found.layers)
    assert 0.67 * 3 * 256**2 < kept <= 0.7 * 3 * 256**2
    assert found.layers[2] == slow


def test_the_layer_that_matters_more_gets_more() -> None:
    falling = [2.0**-i for i in range(256)]
    flat = [1.0 / 256] * 256
    plan = allocate(two_layers(), {"a": falling, "b": flat}, Options(**PLANNED))
    a, b = plan.layers
    assert a.planned_params < b.planned_params
    assert sum(la.planned_params for la in plan.layers) <= two_layers().target_params[1]


@pytest.mark.parametrize("keep", [0.3, 0.5, 0.8])
def test_no_layer_keeps_less_than_half_of_its_uniform_share(keep: float) -> None:
    """However little one matters on the calibration's text, it may on other text."""
    uniform = two_layers(keep)
    spectra = {"a": [1e-9] * 256, "b": [1.0] * 256}
    plan = allocate(uniform, spectra, Options(keep=keep, **PLANNED))
    one_step = 256 * 256 / 64 + 8 * (256 + 256 + 4)  # of the sizes tried, and of the ranks
    share = uniform.layers[0].planned_params
    assert share / 2 - one_step <= plan.layers[0].planned_params < share


def test_blast_in_fewer_blocks_reaches_less_far_and_in_one_row_as_low_rank_does() -> None:
    reached = [reach(Blast(64, 64, 8, (blocks, 8)), 60) for blocks in (1, 2, 3, 4, 8, 16)]
    assert reached[0] == reach(LowRank(64, 64, 8), 60) == 1.0
    assert reached == sorted(reached) and reached[-1] > reached[0]


def test_few_sweeps_reach_less_far() -> None:
    reached = [reach(Blast(64, 64, 8, (8, 8)), sweeps) for sweeps in (0, 1, 10, 20, 60, 160)]
    assert reached[:3] == [1.0, 1.0, 1.0] and reached[2:] == sorted(set(reached[2:]))


@pytest.mark.parametrize("sweeps", [10, 80])
@pytest.mark.parametrize(("blocks", "most"), [(1, 1.05), (2, 1.5), (4, 1.9)])
def test_the_reach_of_blast_is_that_of_its_fits(blocks: int, most: float, sweeps: int) -> None:
    """On a matrix with structure to share between blocks: no less than is assumed."""
    spec = Blast(96, 96, 24, (blocks, blocks))
    generator = torch.Generator().manual_seed(0)
    shared = Blast(96, 96, 40, (8, 8))
    factors = {
        name: torch.randn(shape, generator=generator)
        for name, shape in shared.factor_shapes().items()
    }
    weight = shared.to_dense(factors)
    found = blastnn.factorize(weight, spec, solver="als", sweeps=sweeps).relative_error ** 2
    squares = torch.linalg.svdvals(weight.double()).square()
    left = squares.flip(0).cumsum(0).flip(0) / squares.sum()
    rank = int((left > found * (1 + 1e-6)).sum())  # low rank needs one more for less
    assumed = reach(spec, sweeps)
    assert assumed <= (rank + 1) / (spec.num_params / 192) <= most * assumed


def test_a_layer_that_must_be_whole_stays_dense_within_the_budget() -> None:
    plan = allocate(two_layers(0.7), {"a": [0.0] * 256, "b": [9.0] * 256}, Options(**PLANNED))
    a, b = plan.layers
    assert b.spec is None
    assert b.reason == ALLOCATED
    assert a.spec is not None
    assert plan.target_params[0] == 2 * 256 * 256
    assert plan.target_params[1] <= two_layers(0.7).target_params[1]


def test_equal_layers_share_equally_and_layers_without_a_spectrum_keep_theirs() -> None:
    spectrum = [1.0 / (1 + i) for i in range(256)]
    plan = allocate(two_layers(), {"a": spectrum}, Options(**PLANNED))
    assert plan.layers[1] == two_layers().layers[1]
    assert plan.layers[0].planned_params <= two_layers().layers[0].planned_params
    both = allocate(two_layers(), {"a": spectrum, "b": spectrum}, Options(**PLANNED))
    assert both.layers[0].spec == both.layers[1].spec


class Stop(Progress):
    """Ends a job in the middle of the measurement."""

    def __init__(self, after: int) -> None:
        self.after = after

    def measured(self, done: int, total: int) -> None:
        """Stop once."""
        if done == self.after:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [1, 3, 4, 5])
def test_a_measurement_stopped_anywhere_goes_on_to_the_same_plan(
    after: int, tmp_path: Path
) -> None:
    folder = make_folder(tmp_path / "dense")
    run_job(job_of(folder), tmp_path / "whole")
    stopped = job_of(folder)
    stopped.progress = Stop(after)
    with pytest.raises(KeyboardInterrupt):
        run_job(stopped, tmp_path / "stopped")
    run_job(job_of(folder), tmp_path / "stopped", resume=True)
    plans = [read_json(tmp_path / name / ".blastnn" / PLAN) for name in ("whole", "stopped")]
    assert plans[0] == plans[1]
    assert not (tmp_path / "stopped" / ".blastnn" / MEASUREMENT).exists()


def test_disk_and_memory_allocate_alike(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "dense")
    job = job_of(folder)
    run_job(job, tmp_path / "out")
    assert job.windows is not None
    batches: list[Tensor] = list(job.windows.ids.split(1))
    choices = {key: SMALL[key] for key in ("blocks", "sweeps")}
    result = blastnn.compress(make_model("llama"), 0.6, batches, **choices)
    found = {la.name: (la.planned_params, la.reason) for la in result.plan.layers if la.kind}
    expected = {la.name: (la.planned_params, la.reason) for la in job.plan.layers}
    assert {n: found[n] for n in expected if ".layers." in n} == {
        n: v for n, v in expected.items() if ".layers." in n
    }


def test_the_report_says_how_the_budget_was_shared_out(tmp_path: Path) -> None:
    folder = make_folder(tmp_path / "dense")
    job = job_of(folder)
    report = build_report(job, run_job(job, tmp_path / "out"), {"verified": None})
    assert report["sensitivity"]["why_not_allocated"] is None
    assert report["sensitivity"]["windows"] == 8
    targets = report["keep"]["targets"]["params"]
    assert targets["before"] == sum(
        la.dense_params for la in job.plan.layers if la.block is not None
    )
    assert targets["kept"] <= 0.6
    free = prepare_job(folder, Options(**SMALL), [])  # type: ignore[arg-type]
    report = build_report(free, run_job(free, tmp_path / "free"), {"verified": None})
    assert "no calibration text" in report["sensitivity"]["why_not_allocated"]


@pytest.mark.parametrize("stored", [1, 3, 4])
@pytest.mark.parametrize("spec", [Blast(22, 10, rank=3, blocks=4), LowRank(22, 10, rank=3)])
def test_output_weights_are_a_root_of_the_block_diagonal(stored: int, spec: Structure) -> None:
    gradients = torch.randn(200, 22, generator=torch.Generator().manual_seed(stored))
    p = -(-22 // stored)
    padded = torch.nn.functional.pad(gradients, (0, p * stored - 22)).view(200, stored, p)
    moment = torch.einsum("tip,tiq->ipq", padded, padded) / 200
    weight = OutputWeight(moment, spec)
    root = weight.apply(torch.eye(22, dtype=torch.float64))
    full = gradients.double().mT @ gradients.double() / 200
    cut = -(-22 // (spec.row_blocks() or 1))
    same = torch.tensor(
        [[a // p == b // p and a // cut == b // cut for b in range(22)] for a in range(22)]
    )
    ridge = RIDGE * full.diagonal().mean() * torch.eye(22)
    torch.testing.assert_close(root.mT @ root, full * same + ridge, rtol=1e-4, atol=1e-5)
    factors = spec.init(seed=1, dtype=torch.float64)
    torch.testing.assert_close(
        root @ spec.to_dense(weight.undo(factors)), spec.to_dense(factors), rtol=1e-6, atol=1e-9
    )


@torch.no_grad()
def test_weighted_outputs_lower_the_weighted_error() -> None:
    torch.manual_seed(0)
    old = nn.Linear(32, 48, bias=False).requires_grad_(False)
    plan = LayerPlan("a", "a", 0, 48, 32, LowRank(48, 32, rank=6), None)
    scales = torch.logspace(-2, 2, 48)
    moment = scales.diag()[None]
    inputs = torch.randn(500, 32)
    moments = Moments((inputs.mT @ inputs / 500).double(), None, 500)
    errors = []
    for outputs in (None, moment):
        layer, fields = fit_layer(old, plan, moments, outputs, Options(), torch.float32)
        assert fields["weighted_outputs"] is (outputs is not None)
        gap = (layer.to_dense() - old.weight) @ inputs.mT
        errors.append(float((scales[:, None] * gap.square()).sum()))
        plain = float(gap.norm() / (old.weight @ inputs.mT).norm())
        assert fields["relative_error"] == pytest.approx(plain, rel=1e-2)
    assert errors[1] < 0.7 * errors[0]
