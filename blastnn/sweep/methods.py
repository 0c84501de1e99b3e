"""The methods that a sweep compares: a name, and what it changes in ``Options``.

Ours:

- ``blast``: BLAST (Lee et al. 2024, arXiv 2410.21262) fitted to data, one layer after the other on
  the compressed model's inputs. Whatever ``blastnn compress`` does by default.
- ``blast-independent``: the same, every layer on the dense model's inputs.
- ``blast-equal``: the same, every output of a layer counting alike.
- ``blast-refined``: the same, the factors of every finished block refined together.
- ``blast-own``: the same, no layer repairing more than its own error.
- ``blast-unrefitted``: the same, layers that stay dense keeping their weights.
- ``blast-uniform``: the same, with the same share of the budget for every layer.
- ``blast-stacked``: ``blast-uniform``, but query, key and value, and gate and up, share a right
  factor. A product then does not become faster with the layer's parameters: for comparison alone.
- ``blast-apart``: ``blast-uniform``, also where a layer becomes slower, as ``blast-stacked`` does.

Baselines, at the same budget:

- ``blast-free``: Algorithm 2 of the BLAST paper, without data.
- ``svd``: truncated SVD of every weight (Eckart and Young 1936), without data.
- ``scaled-svd``: each input feature scaled by its size, as ASVD does (Yuan et al. 2023, arXiv
  2312.05821); by the root of its mean square, without ASVD's search over exponents and ranks.
- ``whitened-svd``: the inputs whitened by their second moment, as in SVD-LLM (Wang et al. 2024,
  arXiv 2403.07378), every layer by itself on the dense model's inputs.
- ``whitened-svd-sequential``: the same, one layer after the other on the compressed model's inputs.
- ``whitened-svd-allocated``: ``whitened-svd`` with our allocation of the budget, which is not part
  of the published method; all other baselines share it out uniformly.
- ``joint-rank-k``: the BLAST paper's Joint Rank-k (Appendix D), with whitened inputs: query, key
  and value, and gate and up, share a right factor, which is counted once. Layers independent.
- ``coupled-pruning``: attention heads and MLP channels removed whole, in the manner of LLM-Pruner
  (Ma, Fang and Wang 2023, arXiv 2305.11627) without its retraining; see ``compress/pruning.py``.
- ``monarch``: Monarch matrices (Dao et al. 2022, arXiv 2204.00595), projected block by block,
  without data, as the BLAST paper compares with them.
- ``block-low-rank``: the same without the permutation of rows.
- ``block-diagonal``: full blocks on the diagonal and nothing else, without data; as few blocks as
  the budget allows, so only budgets just above 1/2, 1/3, ... are comparable.

A baseline names every choice that makes it what it is, also where that is the default today; and it
is compressed also where that makes it slower, because accuracy at a size is what is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from blastnn.compress.options import Options
from blastnn.errors import PlanError


@dataclass(frozen=True)
class Method:
    """One way to compress.

    Attributes:
        name: on the command line and in the table.
        what: a line for the reader of the table, with the source.
        changes: the fields of ``Options`` that it sets.
        calibrated: whether it looks at calibration text.
    """

    name: str
    what: str
    changes: Mapping[str, Any]
    calibrated: bool = True

    def options(self, common: Options, keep: float) -> Options:
        """What all methods have in common, with the share to keep and this method's own choices.

        Block counts are meant for the structure of the common options; others use their own.
        """
        blocks = common.blocks if self.changes["structure"] == common.structure else None
        return replace(common, keep=keep, **{"blocks": blocks, **self.changes})


_UNIFORM = {"allocation": "uniform"}
_EQUAL = {"outputs": "equal"}
_UNREFINED = {"refine": 0}
_PLAIN = {"drift": 0.0, "refit": False, **_UNREFINED, **_UNIFORM, **_EQUAL}
# Whitened SVD is better with this than with 5e-2, which ``blast`` does best with (docs/log.md).
_DAMPING = 1e-4
_LOW_RANK = {
    "structure": "lowrank",
    "solver": "svd",
    "damping": _DAMPING,
    "allow_slower": True,
    **_PLAIN,
}
_PROJECTED = {"solver": "projection", "allow_slower": True, **_PLAIN}

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("blast", "BLAST, layer after layer, what compress does", {"structure": "blast"}),
        Method(
            "blast-independent",
            "BLAST, every layer on the dense model's inputs",
            {"structure": "blast", "inputs": "dense", **_UNREFINED},
        ),
        Method(
            "blast-uniform",
            "BLAST, the same share of every layer",
            {"structure": "blast", **_UNIFORM},
        ),
        Method(
            "blast-stacked",
            "BLAST, uniform, query, key and value with one right factor, and gate and up",
            {"structure": "blast", "joint": True, "allow_slower": True, **_UNIFORM},
        ),
        Method(
            "blast-apart",
            "BLAST, uniform, also where a layer becomes slower; every layer its own factors",
            {"structure": "blast", "allow_slower": True, **_UNIFORM},
        ),
        Method(
            "blast-equal",
            "BLAST, every output of a layer counting alike",
            {"structure": "blast", **_EQUAL},
        ),
        Method(
            "blast-refined",
            "BLAST, the factors of every block refined together, 3 passes of the calibration text",
            {"structure": "blast", "refine": 3},
        ),
        Method(
            "blast-own",
            "BLAST, layers repair their own errors alone, not the stream's drift",
            {"structure": "blast", "drift": 0.0},
        ),
        Method(
            "blast-unrefitted",
            "BLAST, layers that stay dense keep their weights",
            {"structure": "blast", "refit": False},
        ),
        Method(
            "blast-free",
            "BLAST by Algorithm 2, no data (arXiv 2410.21262)",
            {"structure": "blast", "solver": "precgd", "allow_slower": True, **_PLAIN},
            calibrated=False,
        ),
        Method("svd", "truncated SVD, no data", _LOW_RANK, calibrated=False),
        Method(
            "scaled-svd",
            "SVD with scaled input features (like ASVD, arXiv 2312.05821)",
            {**_LOW_RANK, "inputs": "dense", "moment": "diagonal"},
        ),
        Method(
            "whitened-svd",
            "SVD with whitened inputs, layers independent (like SVD-LLM, arXiv 2403.07378)",
            {**_LOW_RANK, "inputs": "dense", "moment": "full"},
        ),
        Method(
            "whitened-svd-sequential",
            "SVD with whitened inputs, layer after layer",
            {**_LOW_RANK, "inputs": "compressed", "moment": "full"},
        ),
        Method(
            "whitened-svd-allocated",
            "whitened SVD, layers independent, the budget shared out by our measurement",
            {**_LOW_RANK, "inputs": "dense", "moment": "full", "allocation": "measured"},
        ),
        Method(
            "joint-rank-k",
            "whitened SVD of query, key and value stacked, and of gate and up, layers independent",
            {**_LOW_RANK, "inputs": "dense", "moment": "full", "joint": True},
        ),
        Method(
            "coupled-pruning",
            "heads and MLP channels removed whole (like LLM-Pruner, arXiv 2305.11627)",
            {
                "structure": "channels",
                "solver": "channels",
                "allow_slower": True,
                "inputs": "dense",
                "moment": "full",
                "outputs": "weighted",
                "coupled": True,
                **_UNREFINED,
                **_UNIFORM,
            },
        ),
        Method(
            "monarch",
            "Monarch, projected, no data (arXiv 2204.00595)",
            {**_PROJECTED, "structure": "monarch"},
            calibrated=False,
        ),
        Method(
            "block-low-rank",
            "block low-rank, SVD of every block, no data",
            {**_PROJECTED, "structure": "blr"},
            calibrated=False,
        ),
        Method(
            "block-diagonal",
            "full diagonal blocks, no data",
            {**_PROJECTED, "structure": "blockdiag"},
            calibrated=False,
        ),
    )
}
REFERENCE = "whitened-svd"


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        PlanError: there is none; it names those there are.
    """
    if name not in METHODS:
        raise PlanError(f"unknown method {name!r}; choose from {', '.join(METHODS)}")
    return METHODS[name]
