"""What the Triton kernels have in common: how they are tuned, and how they multiply.

Importing this file imports Triton.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import triton

# The smallest side of a tile that tl.dot takes.
SMALLEST = 16
# The floats of a tile that stays in registers: half of the register file of one multiprocessor.
MOST_ACCUMULATORS = 2**15

Kernel = Any


def interpreting() -> bool:
    """Whether kernels that are decorated now will run in Triton's interpreter, on the CPU."""
    return bool(triton.knobs.runtime.interpret)


def config(warps: int, stages: int, **sizes: int) -> triton.Config:
    """One way to run a kernel: tile sizes, warps a program, stages of the load pipeline."""
    return triton.Config(sizes, num_warps=warps, num_stages=stages)


def tuned(
    configs: list[triton.Config], key: list[str], accumulators: tuple[str, ...] = ()
) -> Callable[[Kernel], Kernel]:
    """Decorate a kernel so that the fastest of ``configs`` runs it, timed once for each ``key``.

    Keys are sizes of the matrix (and, as Triton adds them, dtypes) and never the number of tokens:
    a server that sees every prompt length would time for ever. Whoever needs the best tiles for
    long prompts sends a long prompt first. In the interpreter the smallest tiles run, untimed.

    Args:
        configs: the candidates, in any order.
        key: the names of the kernel's arguments that the choice depends on.
        accumulators: the names of the sizes whose product is the tile held in registers; candidates
            whose tile does not fit are not timed, except that the smallest always is.
    """

    def tile(one: triton.Config, given: Mapping[str, Any]) -> int:
        sizes = {**given, **one.kwargs}
        product = 1
        for name in accumulators:
            product *= sizes[name]
        return product

    def those_that_fit(
        all_of_them: list[triton.Config], positional: Mapping[str, Any], **named: Any
    ) -> list[triton.Config]:
        given = {**positional, **named}
        fit = [one for one in all_of_them if tile(one, given) <= MOST_ACCUMULATORS]
        return fit or [min(all_of_them, key=lambda one: tile(one, given))]

    if interpreting():
        configs = [config(4, 1, **dict.fromkeys(configs[0].kwargs, SMALLEST))]
    return triton.autotune(configs, key, prune_configs_by={"early_config_prune": those_that_fit})


def precision(dtype: torch.dtype) -> str:
    """How ``tl.dot`` multiplies: float32 in full, never as TF32, whatever torch is set to."""
    return "ieee" if dtype == torch.float32 else "tf32"


def next_power_of_two(value: int, at_most: int) -> int:
    """The next power of two, a size that Triton's tiles can have."""
    return min(1 << (value - 1).bit_length(), at_most)
