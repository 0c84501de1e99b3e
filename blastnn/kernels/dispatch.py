"""Which kernel multiplies: a visible table from device type to kernels, the first that can serves.

A choice is made once a session for each (structure, device, dtype) and never changes within it, so
that results repeat bit for bit; ``choose`` tells which one, and why the others do not serve. While
``torch.export`` traces, the table is not asked: ``portable`` goes into every exported graph.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.kernels import portable, reference
from blastnn.structures import Factors, Structure

# The first kernel of a device's row that has no obstacle is taken; the last serves everything.
TABLE: dict[str, tuple[ModuleType, ...]] = {
    "cpu": (reference,),
    "cuda": (reference,),
}
OTHERWISE: tuple[ModuleType, ...] = (reference,)

_specs: list[Structure] = []
_numbers: dict[Structure, int] = {}
_chosen: dict[tuple[Structure, str, torch.dtype], Choice] = {}


@dataclass(frozen=True)
class Choice:
    """The kernel that serves, and why each one before it in the table does not."""

    kernel: ModuleType
    passed_over: dict[str, str]

    @property
    def name(self) -> str:
        """The chosen kernel's name."""
        return str(self.kernel.NAME)


def choose(spec: Structure, device: str, dtype: torch.dtype) -> Choice:
    """The kernel for a structure on a device type (``"cpu"``, ``"cuda"``) in a dtype."""
    key = (spec, device, dtype)
    if key not in _chosen:
        passed_over: dict[str, str] = {}
        for kernel in TABLE.get(device, OTHERWISE):
            reason = kernel.obstacle(spec, device, dtype)
            if reason is None:
                break
            passed_over[kernel.NAME] = reason
        _chosen[key] = Choice(kernel, passed_over)
    return _chosen[key]


def number_of(spec: Structure) -> int:
    """A number that stands for the spec: what a compiler can hold constant while it traces."""
    if spec not in _numbers:
        _numbers[spec] = len(_specs)
        _specs.append(spec)
    return _numbers[spec]


@torch.compiler.assume_constant_result
def _place(number: int, device: str, dtype: torch.dtype) -> int:
    """The place in the device's row of the kernel chosen for a numbered spec."""
    kernel = choose(_specs[number], device, dtype).kernel
    return TABLE.get(device, OTHERWISE).index(kernel)


def matmul(spec: Structure, number: int, x: Tensor, factors: Factors) -> Tensor:
    """``x @ A.T`` by the chosen kernel; ``number`` is ``number_of(spec)``.

    Raises:
        StructureError: the input and the factors differ in dtype or device, or the input's width is
            not ``in_features``.
    """
    spec.check_input(x)
    check_operands(spec, x, factors)
    if torch.compiler.is_exporting():  # the graph must serve any token count, in any runtime
        return portable.matmul(spec, x, factors)
    device = x.device.type
    kernel = TABLE.get(device, OTHERWISE)[_place(number, device, x.dtype)]
    y: Tensor = kernel.matmul(spec, x, factors)
    return y


def check_operands(spec: Structure, x: Tensor, factors: Factors) -> None:
    """Raise StructureError unless the factors have the dtype and device of the input."""
    for name in spec.factor_shapes():
        factor = factors[name]
        if factor.dtype != x.dtype or factor.device != x.device:
            raise StructureError(
                f"the input is {x.dtype} on {x.device}, but the factor {name} of {spec.name} is "
                f"{factor.dtype} on {factor.device}; move or cast one of the two"
            )
