"""Every parameter count of the paper beside ours, exactly, from the specs' own counts.

Nothing is allocated: Llama-7B and DiT-XL/2 stand on the meta device.

    python -m reproduce.accounting            print the table
    python -m reproduce.accounting --write    and write docs/accounting.md and reproduce/plans/
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from textwrap import fill

from transformers import LlamaConfig

from blastnn.compress.options import Options
from blastnn.compress.plan import LayerPlan, Plan
from blastnn.compress.planning import make_plan
from blastnn.files import write_json, write_text
from blastnn.models.skeleton import build_skeleton, find_blocks
from blastnn.structures import Blast, BlockDiagonal, LowRank, Monarch, Structure
from reproduce.dit import POSITION_EMBEDDING, dit_plan
from reproduce.paper_tables import DIT_TABLES, LLAMA_TABLES, Table
from reproduce.vit_flops import TARGETS, multiplications, relative

ROOT = Path(__file__).parents[1]
PAGE, PLANS = ROOT / "docs" / "accounting.md", ROOT / "reproduce" / "plans"
# What Table 3 of the paper calls the number of parameters of each model.
TABLE_3 = {9: "3.56B", 10: "5.41B"}


@dataclass(frozen=True)
class Line:
    """One figure of the paper, ours, the exact number behind ours, and why they may differ."""

    what: str
    paper: str
    ours: str
    exact: str
    note: str = ""

    @property
    def agrees(self) -> bool:
        """Whether both read the same in the digits that the paper prints."""
        whole = "." not in self.paper  # a whole percentage
        return self.paper == (f"{float(self.ours.rstrip('%')):.0f}%" if whole else self.ours)


def llama_plan() -> Plan:
    """All linear layers of Llama-7B, on the meta device; ``LlamaConfig()`` is Llama-7B."""
    model = build_skeleton(LlamaConfig(architectures=["LlamaForCausalLM"]))
    names = [block.name for block in find_blocks(model)]
    return make_plan(model, names, Options(), head="lm_head", tied=())


def planned(plan: Plan, table: Table) -> Plan:
    """The plan with the specs of a printed table and nothing else compressed."""
    specs = {(row.layer, index): row.spec for row in table.rows for index in row.indices}

    def layer_of(layer: LayerPlan) -> LayerPlan:
        spec = None if layer.block is None else specs.get((layer.kind, layer.block))
        reason = None if spec is not None else f"not in Table {table.number}"
        return replace(layer, spec=spec, reason=reason)

    layers = tuple(layer_of(layer) for layer in plan.layers)
    return replace(plan, layers=layers, keep=1.0 - table.ratio, of="model")


def kept(plan: Plan) -> int:
    """Parameters of the whole model under a plan."""
    before, after = plan.target_params
    return plan.model_params - before + after


def _halves(plan: Plan) -> dict[str, int]:
    """Llama-7B with every layer of its blocks at half its parameters or just below."""
    shapes = [(x.out_features, x.in_features) for x in plan.layers if x.block is not None]
    rest = plan.model_params - sum(m * n for m, n in shapes)
    kinds: dict[str, Callable[[int, int], Structure]] = {
        "low rank": lambda m, n: LowRank.for_budget(m, n, m * n // 2),
        "Monarch, 4 x 4 blocks": lambda m, n: Monarch.for_budget(m, n, m * n // 2, blocks=4),
        "block-diagonal, 2 blocks": lambda m, n: BlockDiagonal.for_budget(m, n, m * n // 2),
    }
    return {
        name: rest + sum(half(m, n).num_params for m, n in shapes) for name, half in kinds.items()
    }


def ranks_that_print(total_at: Callable[[int], int], printed: str) -> str:
    """The ranks at which a total reads as the paper prints it."""
    ranks = [rank for rank in range(1, 4097) if _billions(total_at(rank)) == printed]
    return f"{ranks[0]} to {ranks[-1]}"


def _low_rank_note(plan: Plan) -> str:
    """Which rank of the feed-forward layers would give the paper's low-rank total."""
    wide = [x for x in plan.layers if x.block is not None and x.out_features != x.in_features]
    half = {
        x.name: LowRank.for_budget(x.out_features, x.in_features, x.dense_params // 2) for x in wide
    }
    rest = _halves(plan)["low rank"] - sum(spec.num_params for spec in half.values())
    printed = sorted({spec.rank for spec in half.values()})
    ranks = ranks_that_print(
        lambda r: rest + sum(replace(spec, rank=r).num_params for spec in half.values()), "3.51B"
    )
    return f"half of each feed-forward matrix is rank {printed[0]}; 3.51B takes {ranks}"


def _table_10_note(plan: Plan) -> str:
    """Which single change of a printed rank would give the paper's total."""
    table = LLAMA_TABLES[1]

    def with_rank(printed: int, rank: int) -> int:
        rows = tuple(replace(row, r=rank) if row.r == printed else row for row in table.rows)
        return plan.model_params - replace(table, rows=rows).saved

    found = {r: ranks_that_print(partial(with_rank, r), "5.41B") for r in (496, 2048)}
    return (
        "the printed ranks do not add up to 5.41B; that takes "
        f"{found[496]} instead of 496, or {found[2048]} instead of 2048"
    )


def llama_lines(plan: Plan) -> Iterator[Line]:
    """Totals of Table 3 and the ratios of Tables 9 to 11."""
    total = plan.model_params
    yield Line("Llama-7B, dense", "6.74B", _billions(total), f"{total:,}")
    for table in LLAMA_TABLES:
        count = kept(planned(plan, table))
        what = f"Llama-7B, BLAST_16, Table {table.number}"
        if table.number in TABLE_3:
            note = _table_10_note(plan) if table.number == 10 else ""
            yield Line(what, TABLE_3[table.number], _billions(count), f"{count:,}", note)
        yield _removed(what, table, total, total - count)
    for name, count in _halves(plan).items():
        paper, note = ("3.51B", _low_rank_note(plan)) if name == "low rank" else ("3.50B", "")
        yield Line(f"Llama-7B, {name}, 50%", paper, _billions(count), f"{count:,}", note)
    fifth = total * 4 // 5
    note = f"no ranks are printed; 5.41B removes {1 - 5.41e9 / total:.1%}, not 20%"
    yield Line("Llama-7B, low rank and Monarch, 20%", "5.41B", _billions(fifth), f"{fifth:,}", note)


def dit_lines(plan: Plan) -> Iterator[Line]:
    """The ratios of Tables 7 and 8."""
    total = plan.model_params
    for table in DIT_TABLES:
        saved = total - kept(planned(plan, table))
        yield _removed(f"DiT-XL/2, BLAST_9, Table {table.number}", table, total, saved)


def _dit_remark(plan: Plan) -> str:
    """What Tables 7 and 8 remove of each total that may be meant."""
    total = plan.model_params
    totals = {
        f"of all {total:,} parameters": total,
        "without the position embedding, which is fixed": total - POSITION_EMBEDDING,
        f"of {total / 1e6:.0f} million, the total rounded": round(total, -6),
    }
    shares = (
        f"{' and '.join(f'{table.saved / count:.3%}' for table in DIT_TABLES)} {words}"
        for words, count in totals.items()
    )
    text = (
        f"- Tables 7 and 8 remove {'; '.join(shares)}. So one decimal of Table 8 is 20.1% or "
        "20.2%, and that of Table 7 is 49.2% or 49.3%; the table above has the first total."
    )
    return fill(text, width=100, subsequent_indent="  ", break_on_hyphens=False)


def vit_lines() -> Iterator[Line]:
    """The relative FLOPs of Table 1 at the ranks that give them."""
    blast = [Blast(m, n, rank=104, blocks=(3, 3)).num_multiplications for m, n in TARGETS]
    low_rank = [LowRank(m, n, rank=144).num_multiplications for m, n in TARGETS]
    monarch = [Monarch(m, n, rank=48, blocks=(3, 3)).num_multiplications for m, n in TARGETS]
    for name, paper, counts in (
        ("BLAST_3 of rank 104", "27.8%", blast),
        ("low rank of rank 144", "33.5%", low_rank),
        ("Monarch, 3 x 3 blocks of rank 48", "33.5%", monarch),
    ):
        ours, exact = f"{relative(counts):.1%}", f"{multiplications(counts):,}"
        yield Line(f"ViT-Base/16, {name}, FLOPs", paper, ours, exact)


def _removed(what: str, table: Table, total: int, saved: int) -> Line:
    note = f"the caption says {table.ratio:.0%}, the table's own ranks {saved / total:.1%}"
    return Line(
        f"{what}, removed", f"{table.ratio:.0%}", f"{saved / total:.1%}", f"{saved:,}", note
    )


def _billions(count: int) -> str:
    return f"{count / 1e9:.2f}B"


INTRODUCTION = """# Accounting: the paper's counts and ours

Written by `python -m reproduce.accounting --write`; edit that, not this page. *Exactly* is the
number of parameters left (of FLOPs: of multiplications for one image; of ratios: of parameters
removed). Bold is a figure that differs in the digits that the paper prints.
"""
REMARKS = """
- Table 3's totals come from Tables 9 and 10. Appendix C.3 says that Q_proj and K_proj are
  compressed "for the first 10 attention modules", Table 10 that they are in all 32 layers and that
  gate_proj and up_proj are in layers 10 to 31. The plan files follow the tables.
- The paper prints no ranks for low rank, Monarch and block-diagonal. Counted are the largest ranks
  within half of each matrix of the blocks, Monarch in 4 x 4 blocks, block-diagonal in 2 blocks.
{dit}
- Table 1: the ranks are ours, the smallest explanation of the shares that the paper prints; see
  `reproduce/vit_flops.py` for what is counted.
"""


def page(llama: Plan, dit: Plan) -> str:
    """``docs/accounting.md``."""
    rows = [["", "paper", "ours", "exactly", "why they differ"]]
    for x in (*llama_lines(llama), *dit_lines(dit), *vit_lines()):
        ours = x.ours if x.agrees else f"**{x.ours}**"
        rows.append([x.what, x.paper, ours, x.exact, "" if x.agrees else x.note])
    rows.insert(1, ["---"] * len(rows[0]))
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{INTRODUCTION}\n{table}\n{REMARKS.format(dit=_dit_remark(dit))}"


def main() -> None:
    """Print the page; with ``--write``, write it and the plan files."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--write", action="store_true")
    write, llama, dit = parser.parse_args().write, llama_plan(), dit_plan()
    text = page(llama, dit)
    print(text)
    if write:
        write_text(PAGE, text)
        PLANS.mkdir(exist_ok=True)
        for plan, tables in ((llama, LLAMA_TABLES), (dit, DIT_TABLES)):
            for table in tables:
                write_json(plan_path(table), planned(plan, table).to_json())


def plan_path(table: Table) -> Path:
    """The plan file of a table."""
    model = "dit-xl-2" if table in DIT_TABLES else "llama-7b"
    return PLANS / f"{model}-table-{table.number}.json"


if __name__ == "__main__":
    main()
