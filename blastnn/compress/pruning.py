"""Coupled-structure pruning: attention heads and MLP channels go, from every layer they are in.

In the manner of LLM-Pruner (Ma, Fang and Wang 2023, arXiv 2305.11627), the baseline of Table 12 of
the BLAST paper. What it removes is a head (its rows of query, key and value and its columns of the
output projection) or an MLP channel (its rows of gate and up and its column of down); the kept
numbers are the dense ones. As there, the first and last blocks stay whole. Unlike there, the worth
of a head or channel is not the sum of ``|w dL/dw|`` over its weights but the second-order estimate
of what the loss gains without it, ``1/2 tr(G W_h C_hh W_h^T)``, with ``W`` the layer that reads it,
``C`` the second moment of what is read and ``G`` that of the gradients behind (``spectrum.py``).
Where several query heads share a key and a value, keys and values stay.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from blastnn.compress.moments import Moments, root_of
from blastnn.compress.plan import WHOLE, LayerPlan, Plan
from blastnn.errors import PlanError
from blastnn.factorize.channels import scores, strongest
from blastnn.models.families import COUPLED
from blastnn.models.linears import dense_weight
from blastnn.structures import Channels

# Shares of the blocks that stay whole: LLM-Pruner's 4 at the start and 2 at the end of 32.
FIRST, LAST = 1 / 8, 1 / 16


@dataclass(frozen=True)
class Coupling:
    """Channels that one layer reads and others write, in runs of ``group``."""

    reader: LayerPlan
    writers: tuple[LayerPlan, ...]
    group: int

    @property
    def groups(self) -> int:
        """How many runs there are: heads, or channels."""
        return self.reader.in_features // self.group

    @property
    def cost(self) -> int:
        """Parameters of one run in all its layers."""
        read = self.reader.out_features + sum(layer.in_features for layer in self.writers)
        return self.group * read

    def keeping(self, kept: int) -> dict[str, LayerPlan]:
        """The layers by name with as many runs."""
        if kept == self.groups:
            return {}
        found = {}
        for layer, axis in ((self.reader, "columns"), *((w, "rows") for w in self.writers)):
            spec = Channels(layer.out_features, layer.in_features, kept, axis, self.group)
            found[layer.name] = replace(layer, spec=spec, reason=None)
        return found


def prune_plan(plan: Plan, config: Any) -> Plan:
    """The plan with its budget spent on whole heads and channels, the same share in every block.

    Args:
        plan: the uniform plan of a model with blocks.
        config: of the model, which tells the size of a head.

    Raises:
        PlanError: the budget cannot be met, or nothing is known to be coupled.
    """
    budget = sum(layer.planned_params for layer in plan.compressed)
    blocks = 1 + max((layer.block or 0 for layer in plan.layers), default=0)
    pruned = range(round(FIRST * blocks), blocks - round(LAST * blocks))
    couplings = [_couplings(plan.of_block(index), config) for index in pruned]
    coupled = sum(each.cost * each.groups for block in couplings for each in block)
    whole = sum(layer.dense_params for layer in plan.compressed) - coupled
    if coupled == 0:
        raise PlanError("nothing is known of which channels of this model belong together")
    if budget <= whole:
        raise PlanError(
            f"keep {plan.keep} cannot be met by pruning heads and channels: what stays whole takes "
            f"{whole:,} of the {budget:,} parameters to keep; ask for more"
        )
    share = (budget - whole) / coupled
    found: dict[str, LayerPlan] = {}
    for block in couplings:
        found |= _shared_out(block, share)
    layers = (found.get(la.name, _whole(la)) for la in plan.layers)
    return replace(plan, layers=tuple(layers))


def _whole(layer: LayerPlan) -> LayerPlan:
    return layer if layer.spec is None else replace(layer, spec=None, reason=WHOLE)


def _couplings(plans: list[LayerPlan], config: Any) -> list[Coupling]:
    """The couplings of one block whose layers are all targeted, heads first."""
    targeted = {plan.kind: plan for plan in plans if plan.spec is not None}
    present, found = {plan.kind for plan in plans}, []
    for reader, names, heads in COUPLED:
        writers = [name for name in names if name in present]
        if reader not in targeted or not writers:
            continue
        missing = [name for name in writers if name not in targeted]
        if missing:
            raise PlanError(
                f"pruning {reader} removes rows of {missing[0]} as well; target both or neither"
            )
        first, group = targeted[reader], _head_size(config) if heads else 1
        own = tuple(w for n in writers if (w := targeted[n]).out_features == first.in_features)
        if own and first.in_features % group == 0:
            found.append(Coupling(first, own, group))
    return sorted(found, key=lambda coupling: coupling.group == 1)


def _head_size(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _shared_out(couplings: list[Coupling], share: float) -> dict[str, LayerPlan]:
    """Whole heads within their share; channels, which are finer, take what is left."""
    budget = int(share * sum(each.cost * each.groups for each in couplings))
    found: dict[str, LayerPlan] = {}
    for index, each in enumerate(couplings):
        last = index == len(couplings) - 1
        affordable = budget // each.cost if last else int(share * each.groups)
        kept = min(max(affordable, 1), each.groups)
        budget -= kept * each.cost
        found |= each.keeping(kept)
    return found


def choose_kept(
    block: nn.Module,
    plans: Sequence[LayerPlan],
    moments: Mapping[str, Moments],
    outputs: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """By the kind of layer, the groups of rows or columns that stay, ``(kept,)``.

    Args:
        block: dense.
        plans: of its layers, from ``prune_plan``.
        moments: of the inputs of layers by kind; what is not there counts as the identity.
        outputs: ``G (1, m, m)`` behind layers by kind, as far as known.
    """
    pruned = {plan.kind: plan for plan in plans if isinstance(plan.spec, Channels)}
    found: dict[str, Tensor] = {}
    for reader, names, _ in COUPLED:
        if reader not in pruned:
            continue
        spec = pruned[reader].spec
        assert isinstance(spec, Channels)
        weight = dense_weight(block.get_submodule(reader)).detach().double()
        if reader in outputs:
            weight = root_of(outputs[reader][0, : len(weight), : len(weight)]).mT @ weight
        seen = moments.get(reader)
        kept = strongest(scores(weight, None if seen is None else seen.second, spec), spec.kept)
        found |= {kind: kept for kind in (reader, *names) if kind in pruned}
    return found
