"""The factors of a layer, quantised and back."""

from __future__ import annotations

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.quantization.layout import SCALE, Quantization, stored_forms
from blastnn.quantization.rounding import dequantize_tensor, quantize_tensor
from blastnn.structures import Factors, Structure, cast_factors


def quantize_factors(
    spec: Structure, factors: Factors, quantization: Quantization
) -> dict[str, Tensor]:
    """Large factors as whole numbers and scales, the others as they are.

    Raises:
        StructureError: factors that are not the spec's, or not finite.
    """
    spec.check(factors)
    stored = {}
    for name in stored_forms(spec, quantization):
        if name in spec.large_factors():
            try:
                stored[name], stored[name + SCALE] = quantize_tensor(factors[name], quantization)
            except StructureError as error:
                raise StructureError(f"the factor {name} of {spec}: {error}") from error
        elif name not in stored:
            stored[name] = factors[name]
    return stored


def dequantize_factors(
    spec: Structure,
    factors: Factors,
    quantization: Quantization | None,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Tensor]:
    """The spec's own factors in ``dtype``, large ones unpacked; without quantization as given."""
    if quantization is None:
        return dict(factors)
    plain = {name: factors[name] for name in spec.tensor_shapes()}
    for name in spec.large_factors():
        columns, scales = spec.factor_shapes()[name][-1], factors[name + SCALE]
        plain[name] = dequantize_tensor(plain[name], scales, quantization, columns)
    return cast_factors(plain, dtype)
