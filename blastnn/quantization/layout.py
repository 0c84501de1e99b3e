r"""Few bits a weight: large factors as small whole numbers, with a scale for every group of rows.

A large factor ``W (..., q, r)`` is stored as two tensors. ``W`` holds whole numbers ``k``, and
``W_scale (..., ceil(q / group), r)`` in bfloat16 what one unit is worth: row ``i`` of column ``c``
is ``k[i, c] * scale[i // group, c]``. The last group may be shorter. A group lies inside one
column, because columns (the components of a factorisation) differ in size and rows hardly do; so a
kernel may multiply ``group`` rows as whole numbers and scale once.

- 8 bits: ``W`` is int8 ``(..., q, r)``.
- 4 bits: ``W`` is uint8 ``(..., q, ceil(r / 2))``; the byte ``c // 2`` has column ``c`` in its low
  nibble where ``c`` is even and in its high nibble where it is odd, as ``k + 8``. An odd ``r`` is
  padded with one column of ``k = 0``.

Scales may be negative: then the larger end of the range (-8, -128) serves the largest number of a
group whatever its sign. They are bfloat16, whose range is that of float32, and the whole numbers
are fitted to the rounded scale, so that its few digits cost nothing. A whole number times a scale
is exact in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import torch

from blastnn.errors import StructureError
from blastnn.structures import Factors, Structure
from blastnn.structures.base import require_positive_int

SCALE = "_scale"
SCALE_DTYPE = torch.bfloat16
LARGEST_GROUP = 2**31 - 1  # as the kernels count


@dataclass(frozen=True)
class Quantization:
    """How large factors are stored: bits a number, and rows that share a scale.

    Raises:
        StructureError: neither 4 nor 8 bits, or no whole group from 1 to ``LARGEST_GROUP``.
    """

    bits: int
    group: int

    def __post_init__(self) -> None:
        if type(self.bits) is not int or self.bits not in (4, 8):
            raise StructureError(f"factors are stored in 4 or 8 bits, not in {self.bits!r}")
        require_positive_int("group", self.group)
        if self.group > LARGEST_GROUP:
            raise StructureError(f"group must be at most {LARGEST_GROUP}, but is {self.group}")

    @property
    def dtype(self) -> torch.dtype:
        """Of the stored whole numbers."""
        return torch.int8 if self.bits == 8 else torch.uint8

    def to_json(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The inverse of ``to_json``; StructureError where it is none of its values."""
        if not isinstance(values, Mapping) or set(values) != {"bits", "group"}:
            raise StructureError(
                f"'quantized' is an object with 'bits' and 'group', but this is {values!r}"
            )
        return cls(**values)


QUANTIZATIONS = {"int8": Quantization(8, 64), "int4": Quantization(4, 32)}


def quantization_named(name: str, group: int | None = None) -> Quantization:
    """``int8`` or ``int4``, in groups of one's own if given; StructureError lists the names."""
    if name not in QUANTIZATIONS:
        raise StructureError(
            f"unknown quantisation {name!r}; choose from {', '.join(sorted(QUANTIZATIONS))}"
        )
    named = QUANTIZATIONS[name]
    return named if group is None else replace(named, group=group)


@dataclass(frozen=True)
class Form:
    """The shape of a stored tensor, and its dtype; None is the model's own floating dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None

    def num_bytes(self, dtype: torch.dtype) -> int:
        """Bytes in a model of the given floating dtype."""
        return math.prod(self.shape) * (self.dtype or dtype).itemsize


def stored_forms(spec: Structure, quantization: Quantization | None = None) -> dict[str, Form]:
    """Every tensor that a layer stores; a large factor's scales follow it, index factors are last.

    Raises:
        StructureError: there is nothing in the structure to quantise.
    """
    large = () if quantization is None else spec.large_factors()
    if quantization is not None and not large:
        raise StructureError(f"{spec} has no factor that is large enough to be quantised")
    forms = {}
    for name, shape in spec.factor_shapes().items():
        if quantization is not None and name in large:
            forms[name] = Form(_packed_shape(shape, quantization), quantization.dtype)
            forms[name + SCALE] = Form(_scale_shape(shape, quantization), SCALE_DTYPE)
        else:
            forms[name] = Form(shape, None)
    return forms | {name: Form(s, torch.int64) for name, s in spec.index_shapes().items()}


def stored_bytes(spec: Structure, quantization: Quantization | None, dtype: torch.dtype) -> int:
    """Bytes of a layer's floating-point factors as stored, scales included."""
    forms = stored_forms(spec, quantization)
    return sum(f.num_bytes(dtype) for name, f in forms.items() if name not in spec.index_shapes())


def check_stored(spec: Structure, factors: Factors, quantization: Quantization) -> None:
    """Raise StructureError unless these are the very tensors of ``stored_forms``."""
    forms = stored_forms(spec, quantization)
    given = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in factors.items()}
    for name in sorted(set(forms) | set(given)):
        form, shape_and_dtype = forms.get(name), given.get(name)
        if form is None or shape_and_dtype is None:
            problem = "is missing" if form else "does not belong to it"
            raise StructureError(f"a quantised layer of {spec}: the tensor {name} {problem}")
        shape, dtype = shape_and_dtype
        if shape != form.shape or not dtype_fits(dtype, form.dtype):
            raise StructureError(
                f"a quantised layer of {spec}: {name} must be {form.dtype or 'floating point'} of "
                f"the shape {form.shape}, but is {dtype} of the shape {shape}"
            )


def dtype_fits(dtype: torch.dtype, wanted: torch.dtype | None) -> bool:
    """Whether a stored tensor may have the dtype; None wants any floating one."""
    return dtype.is_floating_point if wanted is None else dtype == wanted


def _scale_shape(shape: tuple[int, ...], quantization: Quantization) -> tuple[int, ...]:
    return (*shape[:-2], -(-shape[-2] // quantization.group), shape[-1])


def _packed_shape(shape: tuple[int, ...], quantization: Quantization) -> tuple[int, ...]:
    columns = shape[-1] if quantization.bits == 8 else -(-shape[-1] // 2)
    return (*shape[:-1], columns)
