r"""What a structured matrix is: the contract that every structure keeps.

A *spec* is a frozen dataclass of plain numbers. It says how large the factors are and what they
mean; the tensors live elsewhere, in a dict from factor name to tensor. The laws, which the
conformance suite holds every registered structure to:

1. ``matmul(x, f) == x @ to_dense(f).T`` for every dtype, device, batch shape and memory layout,
   and so do the gradients.
2. ``num_params == sum(prod(shape) for shape in factor_shapes().values())``.
3. ``for_budget(m, n, k).num_params <= k``, and the next ``larger`` spec would exceed ``k``.
4. ``from_json(to_json()) == self``.
5. ``to_dense(scaled(f, e)) == 2**e * to_dense(f)``.
6. ``num_multiplications`` is what ``matmul`` of many tokens does for each.
7. Entries of factors outside the matrix (padding) may be any finite numbers: neither the product
   nor the dense matrix shows them, and their gradient is zero.

Most structures have floating-point factors alone. Those whose numbers stand at free places also
have *index factors*: integer tensors that say where, which are stored and moved with the others but
never trained, cast or counted as parameters.

Shape letters: ``m`` out_features, ``n`` in_features, ``r`` rank, ``T`` tokens.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from blastnn.arithmetic import DRAWN
from blastnn.errors import StructureError

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Structure(ABC):
    """A structured ``(out_features, in_features)`` matrix, described without its numbers.

    Attributes:
        name: under which it is registered.
        example_options: sets of ``for_budget`` options that the conformance suites try; sets that
            do not fit a matrix are passed over for it, so the first should fit every one.
    """

    out_features: int
    in_features: int
    name: ClassVar[str]
    example_options: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)

    def __post_init__(self) -> None:
        for field in ("out_features", "in_features"):
            require_positive_int(field, getattr(self, field))

    @abstractmethod
    def factor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every floating-point factor, in the order in which they are stored."""

    def index_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every index factor (int64); most structures have none."""
        return {}

    def step_factors(self) -> frozenset[str]:
        """The floating-point factors in which the matrix moves in steps: their gradient is zero."""
        return frozenset()

    def row_blocks(self) -> int | None:
        """How many blocks of equally many consecutive rows may each be multiplied by a matrix from
        the left, by multiplying those rows of the factor ``U (..., r)`` and nothing else. None
        where that is not so.
        """
        return None

    def large_factors(self) -> tuple[str, ...]:
        """The floating-point factors that may be stored in few bits: those that are matrices.

        In the order in which they are rounded: each knows what those before it got wrong.

        A structure leaves out the factors that are few and scale all the others: their bytes are
        hardly worth saving, and a relative error in them is one of everything that they scale.
        """
        return tuple(name for name, shape in self.factor_shapes().items() if len(shape) > 1)

    def gram(self, name: str, factors: Factors, second_moment: Tensor | None) -> Tensor | None:
        """How the columns of a large factor work together; None where the structure cannot tell.

        Args:
            name: of a factor ``F (..., q, r)``.
            factors: all factors, floating point.
            second_moment: of the inputs, ``(n, n)``; None stands for the identity.

        Returns:
            ``G (..., r, r)`` such that an error ``E`` of that factor alone changes the output by
            about ``trace(E G E^T)`` in mean square: what one column gets wrong others can mend.
        """
        return None

    @abstractmethod
    def matmul(self, x: Tensor, factors: Factors) -> Tensor:
        """``x @ to_dense(factors).T``: ``(..., n)`` to ``(..., m)``, without the dense matrix."""

    @abstractmethod
    def to_dense(self, factors: Factors) -> Tensor:
        """The dense ``(m, n)`` matrix that the factors stand for."""

    @abstractmethod
    def init(
        self,
        *,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> dict[str, Tensor]:
        """Random factors whose dense matrix has entries of standard deviation ``1 / sqrt(n)``."""

    def zeros(self, *, dtype: torch.dtype, device: torch.device | str) -> dict[str, Tensor]:
        """Factors of the zero matrix; index factors as ``init`` draws them."""
        return {
            name: torch.zeros_like(factor) if factor.is_floating_point() else factor
            for name, factor in self.init(dtype=dtype, device=device).items()
        }

    @classmethod
    @abstractmethod
    def for_budget(
        cls, out_features: int, in_features: int, params: int, *, step: int = 1, **options: Any
    ) -> Self:
        """The spec of the largest rank, a multiple of ``step``, with at most ``params`` numbers.

        Raises:
            StructureError: not even the smallest rank fits, or what is given is no budget
                (``require_budget``).
        """

    def larger(self, step: int = 1) -> Self | None:
        """The next larger spec that ``for_budget`` would consider; None where there is none."""
        changed: dict[str, Any] = {"rank": vars(self)["rank"] + step}
        return replace(self, **changed)

    def scaled(self, factors: Factors, exponent: float) -> dict[str, Tensor]:
        """Factors of ``2**exponent`` times the matrix; a whole exponent changes no digit.

        Here for a matrix that is linear in each factor: they share the exponent, so that none
        leaves its range, and the first takes the fraction.
        """
        count, whole = len(self.factor_shapes()), math.floor(exponent)
        shares: dict[str, float] = {
            key: (whole + i) // count for i, key in enumerate(self.factor_shapes())
        }
        shares[next(iter(shares))] += exponent - whole
        return {
            key: factor * 2.0 ** shares[key] if key in shares else factor
            for key, factor in factors.items()
        }

    @property
    def num_params(self) -> int:
        """How many floating-point numbers the factors hold."""
        return sum(math.prod(shape) for shape in self.factor_shapes().values())

    @property
    def num_multiplications(self) -> int:
        """Multiplications per token; each parameter is used once unless a structure says more."""
        return self.num_params

    def to_json(self) -> dict[str, Any]:
        """The spec as plain JSON values, with the structure's registered name."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        plain = {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
        return {"structure": self.name, **plain}

    @classmethod
    def from_json(
        cls, values: Mapping[str, Any], read: Callable[[Mapping[str, Any]], Structure]
    ) -> Self:
        """The spec of ``to_json``'s values without the name; ``read`` is for specs inside it."""
        return cls(**values)

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all factors, index factors last: everything that is stored."""
        return {**self.factor_shapes(), **self.index_shapes()}

    def check(self, factors: Factors) -> None:
        """Raise StructureError unless ``factors`` has exactly the names and shapes of this spec."""
        expected = self.tensor_shapes()
        given = {name: tuple(tensor.shape) for name, tensor in factors.items()}
        if given != expected:
            raise StructureError(
                f"the factors of {self} must have the shapes {expected}, but these were given: "
                f"{given}"
            )

    def check_input(self, x: Tensor) -> None:
        """Raise StructureError unless the last dimension of ``x`` is ``in_features``."""
        if x.ndim == 0 or x.shape[-1] != self.in_features:
            raise StructureError(
                f"the input of {self} must have the shape (..., {self.in_features}), but has "
                f"{tuple(x.shape)}"
            )


def cast_factors(factors: Factors, dtype: torch.dtype) -> dict[str, Tensor]:
    """The factors in another floating-point dtype; index factors as they are."""
    return {k: f.to(dtype) if f.is_floating_point() else f for k, f in factors.items()}


def require_positive_int(field: str, value: object) -> None:
    """Raise StructureError unless ``value`` is an int of at least 1 (bools are refused)."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise StructureError(f"{field} must be a whole number of at least 1, but is {value!r}")


def require_budget(params: object, step: object) -> None:
    """Raise StructureError unless a budget is a finite number, and its step at least 1."""
    number = isinstance(params, Real) and not isinstance(params, bool)
    # Whole numbers may be of any size: math.isfinite would overflow.
    if not number or not (isinstance(params, Integral) or math.isfinite(params)):  # type: ignore[arg-type]
        raise StructureError(f"params must be a number of parameters, but is {params!r}")
    require_positive_int("step", step)


def rank_for_budget(label: str, params: int, params_per_rank: int, step: int) -> int:
    """The largest multiple of ``step`` whose ``rank * params_per_rank`` is at most ``params``."""
    require_budget(params, step)
    rank = int(params) // params_per_rank // step * step
    if rank < 1:
        raise StructureError(
            f"{label}: {params} parameters are fewer than rank {step} takes "
            f"({step * params_per_rank}); give a larger budget or fewer blocks"
        )
    return rank


def seeded_normal(
    shape: tuple[int, ...], seed: int, stream: int, dtype: torch.dtype, device: torch.device | str
) -> Tensor:
    """Standard normal numbers that depend on the seed alone, not on the device or dtype."""
    if torch.device(device).type == "meta":
        return torch.empty(shape, dtype=dtype, device="meta")
    drawn = torch.randn(shape, generator=generator(seed, stream), **DRAWN)
    return drawn.to(device=device, dtype=dtype)


def permutation(count: int, seed: int, stream: int) -> Tensor:
    """``0`` to ``count - 1`` in an order that the seed draws, on the CPU."""
    return torch.randperm(count, generator=generator(seed, stream), device="cpu")


def normal_factors(
    spec: Structure,
    stds: float | Mapping[str, float],
    seed: int,
    dtype: torch.dtype,
    device: torch.device | str,
) -> dict[str, Tensor]:
    """Normal factors of the given standard deviations, each from a stream of its own."""
    return {
        name: (stds if isinstance(stds, float) else stds[name])
        * seeded_normal(shape, seed, stream, dtype, device)
        for stream, (name, shape) in enumerate(spec.factor_shapes().items())
    }


LARGEST_SEED = 2**32 - 1  # what is multiplied below stays within 64 bits


def is_seed(value: object) -> bool:
    """Whether a value is a whole number from 0 to ``LARGEST_SEED``."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= LARGEST_SEED


def generator(seed: int, stream: int) -> torch.Generator:
    """A generator for one factor; neighbouring seeds share no numbers between factors.

    It is used with ``DRAWN``, which says what it draws: torch's defaults may be others.
    """
    return torch.Generator().manual_seed(seed * 1_000_003 + stream)
