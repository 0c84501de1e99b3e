"""Joint Rank-k planned: layers that read the same input share their right factor.

The baseline of Appendix D of the BLAST paper (arXiv 2410.21262). Query, key and value, and gate and
up, are low rank of one rank with one ``V`` in common, which is stored and counted with the first of
them. The rank is the largest at which the whole group takes no more than its layers would apart.
"""

from __future__ import annotations

from dataclasses import replace

from blastnn.compress.plan import LayerPlan, Plan
from blastnn.errors import PlanError
from blastnn.models.families import SHARED_INPUTS
from blastnn.structures import LowRank


def share_inputs(plan: Plan) -> Plan:
    """The plan with a shared right factor for every group of which all layers are compressed.

    Raises:
        PlanError: the model has no such group.
    """
    found: dict[str, LayerPlan] = {}
    for group in _groups(plan):
        found |= {layer.name: layer for layer in _joint(group)}
    if not found:
        raise PlanError(
            "no layers here are known to read the same input, so there is nothing to share; "
            "compress without --joint"
        )
    return replace(plan, layers=tuple(found.get(layer.name, layer) for layer in plan.layers))


def _groups(plan: Plan) -> list[list[LayerPlan]]:
    """Compressed layers by the module that they are in and the table of names, those alone left."""
    groups: dict[tuple[str, int], list[LayerPlan]] = {}
    for layer in plan.compressed:
        owner, _, leaf = layer.name.rpartition(".")
        for index, leaves in enumerate(SHARED_INPUTS):
            if leaf in leaves and layer.block is not None:
                groups.setdefault((owner, index), []).append(layer)
    return [group for group in groups.values() if len(group) > 1]


def _joint(group: list[LayerPlan]) -> list[LayerPlan]:
    budget = sum(layer.planned_params for layer in group)
    n = group[0].in_features
    rank = budget // (sum(layer.out_features for layer in group) + n)
    first, *others = (replace(layer, spec=LowRank(layer.out_features, n, rank)) for layer in group)
    return [first, *(replace(layer, shared=first.name) for layer in others)]
