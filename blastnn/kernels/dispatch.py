"""Which kernel multiplies: a visible table from device type to kernels, the first that can serves.

A choice is made once a session for each (structure, quantisation, device, dtype) and never changes
within it, so that results repeat bit for bit. ``Choice`` tells what was chosen and why the others
were not. While ``torch.export`` traces, the table is not asked: ``portable`` goes into every graph.
Nor is it under the transforms of ``torch.func`` and forward-mode derivatives, which take a product
apart: there the structure's own plain product serves.

A kernel is a module with ``NAME``, ``obstacle(spec, device, dtype)`` and ``matmul(spec, x,
factors)``. One that takes quantised factors as they are stored also has ``quantized_obstacle(spec,
quantization, device, dtype)`` and ``quantized_matmul(spec, quantization, x, factors)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor
from torch.autograd import forward_ad

from blastnn.errors import StructureError
from blastnn.kernels import native, portable, reference, triton_blast
from blastnn.quantization import Quantization, dequantize_factors
from blastnn.structures import Factors, Structure

# The first kernel of a device's row that has no obstacle is taken; the last serves everything.
TABLE: dict[str, tuple[ModuleType, ...]] = {
    "cpu": (native, reference),
    "cuda": (triton_blast, reference),
}
OTHERWISE: tuple[ModuleType, ...] = (reference,)

Weight = tuple[Structure, Quantization | None]
UNQUANTIZED_ONLY = "it takes no quantised factors"

_weights: list[Weight] = []
_numbers: dict[Weight, int] = {}
_chosen: dict[tuple[int, str, torch.dtype], Choice] = {}  # by the weight's number
_preferred: dict[tuple[Structure, str, torch.dtype], str] = {}


@dataclass(frozen=True)
class Choice:
    """The kernel that serves, its place in the table, and why each one before it does not."""

    kernel: ModuleType
    place: int
    passed_over: dict[str, str]

    @property
    def name(self) -> str:
        """The chosen kernel's name."""
        return str(self.kernel.NAME)


def choose(
    spec: Structure, device: str, dtype: torch.dtype, quantization: Quantization | None = None
) -> Choice:
    """The kernel for a structure on a device type (``"cpu"``, ``"cuda"``) in a dtype of inputs."""
    return _choice(number_of(spec, quantization), device, dtype)


def _choice(number: int, device: str, dtype: torch.dtype) -> Choice:
    """The same for a numbered weight, which is found faster than a spec."""
    key = (number, device, dtype)
    if key not in _chosen:
        _chosen[key] = _made(_weights[number], device, dtype)
    return _chosen[key]


def _made(weight: Weight, device: str, dtype: torch.dtype) -> Choice:
    spec, quantization = weight
    passed_over: dict[str, str] = {}
    wanted = _preferred.get((spec, device, dtype)) if quantization is None else None
    for kernel in TABLE.get(device, OTHERWISE):
        if wanted not in (None, kernel.NAME):
            passed_over[kernel.NAME] = f"{wanted} was measured to be faster"
            continue
        reason = _obstacle(kernel, weight, device, dtype)
        if reason is None:
            break
        passed_over[kernel.NAME] = reason
    return Choice(kernel, len(passed_over), passed_over)


def prefer(spec: Structure, device: str, dtype: torch.dtype, kernel: str) -> None:
    """Choose the kernel named for unquantised factors, from the next layer built on.

    Raises:
        StructureError: no such kernel serves them here.
    """
    names = [module.NAME for module in kernels_for(spec, device, dtype)]
    if kernel not in names:
        raise StructureError(f"the kernel {kernel!r} does not serve {spec}; these do: {names}")
    _preferred[spec, device, dtype] = kernel
    _chosen.pop((number_of(spec), device, dtype), None)


def kernels_for(spec: Structure, device: str, dtype: torch.dtype) -> list[ModuleType]:
    """All kernels of a device's row that can serve unquantised factors, the preferred one first."""
    row = TABLE.get(device, OTHERWISE)
    return [kernel for kernel in row if kernel.obstacle(spec, device, dtype) is None]


def _obstacle(kernel: ModuleType, weight: Weight, device: str, dtype: torch.dtype) -> str | None:
    """Why a kernel cannot serve; None where it can."""
    spec, quantization = weight
    if quantization is None:
        reason: str | None = kernel.obstacle(spec, device, dtype)
    elif hasattr(kernel, "quantized_matmul"):
        reason = kernel.quantized_obstacle(spec, quantization, device, dtype)
    else:
        reason = UNQUANTIZED_ONLY
    return reason


def number_of(spec: Structure, quantization: Quantization | None = None) -> int:
    """A number that stands for both: what a compiler can hold constant while it traces."""
    weight = (spec, quantization)
    if weight not in _numbers:
        _numbers[weight] = len(_weights)
        _weights.append(weight)
    return _numbers[weight]


@torch.compiler.assume_constant_result
def _place(number: int, device: str, dtype: torch.dtype) -> int:
    """The place in the device's row of the kernel chosen for a numbered weight."""
    return _choice(number, device, dtype).place


def matmul(
    spec: Structure,
    number: int,
    x: Tensor,
    factors: Factors,
    quantization: Quantization | None = None,
) -> Tensor:
    """``x @ A.T`` by the chosen kernel; ``number`` is ``number_of(spec, quantization)``.

    Raises:
        StructureError: the input and the factors differ in dtype or device, or the input's width is
            not ``in_features``.
    """
    spec.check_input(x)
    device = x.device.type
    autocast = device in TABLE and torch.is_autocast_enabled(device)
    if autocast and quantization is None:  # plain products follow its rules by themselves
        return spec.matmul(x, factors)
    check_operands(spec, x, factors, quantization)
    if torch.compiler.is_exporting():  # the graph must serve any token count, in any runtime
        return portable.matmul(spec, x, dequantize_factors(spec, factors, quantization, x.dtype))
    if _transformed():
        return spec.matmul(x, dequantize_factors(spec, factors, quantization, x.dtype))
    kernel = TABLE.get(device, OTHERWISE)[_place(number, device, x.dtype)]
    if quantization is None:
        y: Tensor = kernel.matmul(spec, x, factors)
    else:
        y = kernel.quantized_matmul(spec, quantization, x, factors)
    return y


def _transformed() -> bool:
    """Whether ``torch.func`` or forward-mode derivatives, unknown to kernels, are at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def check_operands(
    spec: Structure, x: Tensor, factors: Factors, quantization: Quantization | None = None
) -> None:
    """Raise StructureError unless the factors have the device and, unquantised, dtype of ``x``."""
    if quantization is None and _alike(x, factors):
        return
    large = () if quantization is None else spec.large_factors()
    for name in spec.factor_shapes():
        factor = factors[name]
        dtype = quantization.dtype if quantization is not None and name in large else x.dtype
        if factor.dtype != dtype or factor.device != x.device:
            raise StructureError(
                f"the input is {x.dtype} on {x.device}, but the factor {name} of {spec.name} is "
                f"{factor.dtype} on {factor.device}; move or cast one of the two"
            )


def _alike(x: Tensor, factors: Factors) -> bool:
    """Whether all have one dtype and device: a plain loop, which a small product waits for."""
    dtype, device, alike = x.dtype, x.device, True
    for factor in factors.values():
        alike = alike and factor.dtype == dtype and factor.device == device
    return alike
