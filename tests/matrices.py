"""Small matrices, specs and factors that several test files use."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from blastnn.errors import StructureError
from blastnn.structures import STRUCTURES, Factors, Structure, cast_factors

# Conformance tests over these check a GPU, where there is one, without further code. They were
# written on a machine without; there, tests/memory.py stands in for it (nothing_by_default).
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
every_device = pytest.mark.parametrize("device", DEVICES)


def on(device: str, factors: Factors) -> dict[str, Tensor]:
    """The factors on a device."""
    return {name: factor.to(device) for name, factor in factors.items()}


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers from a seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def moment_of(n: int, samples: int, seed: int = 7, decay: float = 0.0) -> Tensor:
    """A second moment; ``decay`` is how many powers of ten the feature scales span."""
    x = normal(samples, n, seed=seed) * torch.logspace(0, -decay, n, dtype=torch.float64)
    return x.T @ x / samples


def specs_of(name: str, m: int, n: int, share: float) -> list[Structure]:
    """A spec for each of a structure's example options that fits an ``m x n`` matrix."""
    found = []
    for options in STRUCTURES[name].example_options:
        try:
            found.append(STRUCTURES[name].for_budget(m, n, int(share * m * n), **options))
        except StructureError:
            continue
    return found


def example_specs(
    shapes: list[tuple[int, int]], shares: tuple[float, ...] = (0.4, 0.8)
) -> list[Structure]:
    """Every registered structure at every shape, share and set of example options that fits."""
    found = {
        spec: None
        for name in STRUCTURES
        for m, n in shapes
        for share in shares
        for spec in specs_of(name, m, n, share)
    }
    return list(found)


def small_spec(name: str, m: int, n: int, share: float = 0.6) -> Structure:
    """A structure with its default options, or the first examples that fit."""
    try:
        return STRUCTURES[name].for_budget(m, n, max(int(share * m * n), m + n + 16))
    except StructureError:
        return specs_of(name, m, n, max(share, 1.0))[0]


def random_factors(
    spec: Structure, seed: int = 1, dtype: torch.dtype = torch.float64
) -> dict[str, Tensor]:
    """Standard normal factors; index factors as the initialisation draws them."""
    factors = spec.init(seed=seed)
    for i, (name, shape) in enumerate(spec.factor_shapes().items()):
        factors[name] = normal(*shape, seed=seed + i, dtype=dtype)
    return factors


def is_full(spec: Structure) -> bool:
    """Whether the matrices of a spec fill the space: every entry moves by itself.

    Told by the rank of the dense matrix's derivative at random factors.
    """
    factors, size = random_factors(spec), spec.out_features * spec.in_features
    if spec.num_params < size:
        return False
    names = list(spec.factor_shapes())

    def dense(*values: Tensor) -> Tensor:
        return spec.to_dense({**factors, **dict(zip(names, values, strict=True))})

    slopes = torch.autograd.functional.jacobian(dense, tuple(factors[name] for name in names))
    return (
        int(torch.linalg.matrix_rank(torch.cat([s.reshape(size, -1) for s in slopes], 1))) == size
    )


def independent_error(
    weight: Tensor, spec: Structure, factors: dict[str, Tensor], moment: Tensor | None = None
) -> float:
    """The relative error by numpy, through a symmetric square root instead of a trace."""
    exact = weight.double().cpu().numpy()
    residual = exact - spec.to_dense(cast_factors(factors, torch.float64)).cpu().numpy()
    if moment is not None:
        values, vectors = np.linalg.eigh(moment.double().cpu().numpy())
        root = vectors * np.sqrt(np.clip(values, 0, None))
        exact, residual = exact @ root, residual @ root
    return float(np.linalg.norm(residual) / np.linalg.norm(exact))


def describe(spec: Structure) -> str:
    """A short test id."""
    return "-".join(str(value).replace(" ", "") for value in spec.to_json().values())
