r"""Which layer gets how many parameters: least predicted loss for the whole budget.

The spectra of ``spectrum.py`` predict what each layer costs the model at each size: a structure of
``k`` parameters is taken for low rank of rank ``c k / (m + n)``, which loses the tail of the
spectrum behind it, with a ``c`` for how much further the structure reaches. Loss adds up over
layers, so the best shares are where all have one price: each layer minimises ``loss + price *
parameters``, and the price is the one at which the sum meets the budget. A layer that stays dense
costs ``m n`` and loses nothing; where that is the best buy, it does.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate

from blastnn.compress.options import Options
from blastnn.compress.plan import ALLOCATED, LayerPlan, Plan
from blastnn.compress.planning import worthwhile_spec
from blastnn.compress.spectrum import Spectra
from blastnn.errors import PlanError
from blastnn.structures import Structure

# How many more times the rank low rank would need for the error of a structure of as many
# parameters, data-aware, by the lesser number of blocks a side, once its solver is done; alike for
# large and small shares, where the ratio of the errors is anything from 0.16 to 0.67. What is not
# here is taken for low rank, which BLAST in one block is. What the first sweeps gain in the error
# that is minimised, which knows ``G`` in blocks and evened out, shares do better not to count on:
# of ``s`` sweeps, ``1 - EARLY / s`` of the gain (docs/log.md has the models that this comes from).
GAIN = {"blast": {1: 0.0, 2: 0.25, 4: 0.40, 8: 0.46}}
EARLY = 10
LEAST = 0.5  # of a layer's uniform share, whatever the prediction says
GRID = 64  # sizes that are tried, to a whole layer
STEP = 8  # ranks are multiples of it: the vectors of a kernel are full


@dataclass(frozen=True)
class Choice:
    """A layer of one size: its parameters, the predicted loss in nats a token, and its spec."""

    params: int
    loss: float
    spec: Structure | None


def allocate(plan: Plan, spectra: Spectra, options: Options) -> Plan:
    """The plan with its budget shared out anew among the layers that have a spectrum.

    Layers without one keep their uniform share. What targeted layers keep that were given up as
    slower than dense, the others save.
    """
    wanted = [layer for layer in plan.compressed if layer.name in spectra]
    budget = sum(layer.planned_params for layer in wanted)
    if options.of == "targets":  # where keep counts the model's, the plan has seen to it
        given_up = sum(layer.dense_params for layer in plan.given_up)
        budget -= round((1.0 - options.keep) * given_up)
    tables = {la.name: _choices(la, spectra[la.name], options) for la in wanted}
    chosen = _filled(tables, _cheapest(tables, budget), budget)
    layers = tuple(
        _become(layer, chosen[layer.name].spec) if layer.name in chosen else layer
        for layer in plan.layers
    )
    return replace(plan, layers=layers)


def _choices(layer: LayerPlan, spectrum: list[float], options: Options) -> list[Choice]:
    """Sizes of one layer, the planned one among them; only such as are no slower than dense."""
    tails = [*accumulate(reversed(spectrum), initial=0.0)][::-1]
    per_rank = layer.out_features + layer.in_features
    assert layer.spec is not None
    specs = {layer.spec}
    least = LEAST * layer.planned_params / layer.dense_params
    for count in range(round(least * GRID), GRID):
        with suppress(PlanError):  # a size below the smallest rank is none to choose
            size = layer.dense_params * count // GRID
            spec, _ = worthwhile_spec(layer, options, size, STEP)
            specs |= {spec} if spec is not None else set()
    choices = [Choice(layer.dense_params, 0.0, None)]
    for spec in sorted(specs, key=lambda spec: spec.num_params):
        rank = reach(spec, options.sweeps) * spec.num_params / per_rank
        choices.append(Choice(spec.num_params, 0.5 * _between(tails, rank), spec))
    return choices


def reach(spec: Structure, sweeps: int) -> float:
    """How many times the rank of low rank this spec is worth after so many sweeps of its solver:
    ``1 + GAIN (1 - EARLY / max(EARLY, sweeps))``.
    """
    known = GAIN.get(spec.name)
    if known is None:
        return 1.0
    least = min(getattr(spec, "blocks", (1, 1)))
    gain = known[max(blocks for blocks in known if blocks <= least)]
    return 1.0 + gain * (1.0 - EARLY / max(EARLY, sweeps))


def _between(tails: list[float], rank: float) -> float:
    """What low rank of this rank, a fraction allowed, leaves of the spectrum."""
    rank = min(rank, len(tails) - 1)
    below = int(rank)
    above = min(below + 1, len(tails) - 1)
    return tails[below] + (tails[above] - tails[below]) * (rank - below)


def _cheapest(tables: dict[str, list[Choice]], budget: int) -> dict[str, Choice]:
    """The choices at the lowest price at which all together are within the budget."""

    def at(price: float) -> dict[str, Choice]:
        return {
            name: min(table, key=lambda choice: choice.loss + price * choice.params)
            for name, table in tables.items()
        }

    low, high = 0.0, 1.0
    for _ in range(100):
        middle = (low * high) ** 0.5 if low else high / 16
        if sum(choice.params for choice in at(middle).values()) > budget:
            low = middle
        else:
            high = middle
    return at(high)


def _filled(
    tables: dict[str, list[Choice]], chosen: dict[str, Choice], budget: int
) -> dict[str, Choice]:
    """What one price leaves over, because sizes come in steps, goes to the best buys that fit."""
    chosen = dict(chosen)
    left = budget - sum(choice.params for choice in chosen.values())
    while True:
        offers = (
            (
                (chosen[name].loss - choice.loss) / (choice.params - chosen[name].params),
                name,
                choice,
            )
            for name, table in tables.items()
            for choice in table
            if 0 < choice.params - chosen[name].params <= left and choice.loss < chosen[name].loss
        )
        best = max(offers, key=lambda offer: offer[0], default=None)
        if best is None:
            return chosen
        left -= best[2].params - chosen[best[1]].params
        chosen[best[1]] = best[2]


def _become(layer: LayerPlan, spec: Structure | None) -> LayerPlan:
    return replace(layer, spec=spec, reason=ALLOCATED if spec is None else None)
