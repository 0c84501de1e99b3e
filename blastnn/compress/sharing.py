"""Stacking planned: layers that read the same input share their right factor.

Query, key and value, and gate and up, get one rank and one ``V`` in common, which is stored and
counted with the first of them: as low rank the baseline Joint Rank-k of the BLAST paper (arXiv
2410.21262, Appendix D), as BLAST what the paper does with the query, key and value of ViT and DiT.
The rank is the largest at which the whole group takes no more than its layers would apart.
"""

from __future__ import annotations

import math
from dataclasses import replace

from blastnn.checkpoint import own_params
from blastnn.compress.plan import LayerPlan, Plan
from blastnn.errors import PlanError
from blastnn.models.families import SHARED_INPUTS
from blastnn.structures import Blast, LowRank


def share_inputs(plan: Plan) -> Plan:
    """The plan with a shared right factor for every group of which all layers are compressed.

    Raises:
        PlanError: the model has no such group, or too small a budget for one.
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
    """Specs with one ``V``, of the largest rank at which they take no more than planned apart."""
    budget = sum(layer.planned_params for layer in group)
    ones = [_of_rank_one(layer, group) for layer in group]
    per_rank = sum(own_params(spec, index > 0) for index, spec in enumerate(ones))
    if budget < per_rank:
        raise PlanError(
            f"the layers from {group[0].name} on may take {budget} parameters, but with one right "
            f"factor they take at least {per_rank}; keep more, or compress without --joint"
        )
    first, *others = (
        replace(layer, spec=replace(spec, rank=budget // per_rank))
        for layer, spec in zip(group, ones, strict=True)
    )
    return [first, *(replace(layer, shared=first.name) for layer in others)]


def _of_rank_one(layer: LayerPlan, group: list[LayerPlan]) -> LowRank | Blast:
    if not isinstance(layer.spec, Blast):
        return LowRank(layer.out_features, layer.in_features, 1)
    columns = layer.spec.blocks[1]
    return Blast(layer.out_features, layer.in_features, 1, (_block_rows(layer, group), columns))


def _block_rows(layer: LayerPlan, group: list[LayerPlan]) -> int:
    """Into how many blocks a layer's rows are cut: of one height in the whole group, that divides
    all and cuts the tallest layer into about as many as were planned for it.
    """
    tallest = max(group, key=lambda each: each.out_features)
    assert isinstance(tallest.spec, Blast)
    wanted = tallest.out_features / tallest.spec.blocks[0]
    common = math.gcd(*(each.out_features for each in group))
    heights = [height for height in range(1, common + 1) if common % height == 0]
    height = min(heights, key=lambda height: abs(math.log(height / wanted)))
    return layer.out_features // height
