"""The factors of a layer, quantised and back."""

from __future__ import annotations

import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.quantization.layout import SCALE, Quantization, stored_forms
from blastnn.quantization.rounding import dequantize_tensor, quantize_tensor
from blastnn.structures import Factors, Structure, cast_factors


def quantize_factors(
    spec: Structure,
    factors: Factors,
    quantization: Quantization,
    second_moment: Tensor | None = None,
) -> dict[str, Tensor]:
    """Large factors as whole numbers and scales, the others as they are.

    Args:
        spec, factors: floating point.
        quantization: bits and group.
        second_moment: of the inputs, ``(n, n)``, for structures that can tell by it what matters.

    Raises:
        StructureError: factors that are not the spec's, or not finite.
    """
    spec.check(factors)
    _check_finite(spec, factors)
    forms = stored_forms(spec, quantization)
    current, stored = dict(factors), dict(factors)
    for name in spec.large_factors():
        gram = spec.gram(name, current, second_moment)
        stored[name], scales = quantize_tensor(factors[name], quantization, gram)
        stored[name + SCALE] = scales
        columns = factors[name].shape[-1]
        current[name] = dequantize_tensor(stored[name], scales, quantization, columns)
    return {name: stored[name] for name in forms}


def _check_finite(spec: Structure, factors: Factors) -> None:
    for key in spec.factor_shapes():
        bad = int((~torch.isfinite(factors[key])).sum())
        if bad:
            raise StructureError(
                f"the factor {key} of {spec}: {bad} of its numbers are NaN or infinite; nothing "
                "was quantised"
            )


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
