"""Memory that nobody has written to, and entries of factors that nobody should read."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor

from blastnn.structures import Factors, Structure
from tests.matrices import normal, random_factors


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, new memory is NaN (the largest number in an integer tensor) instead of whatever.

    It is torch that fills it: in ``empty``, ``new_empty``, ``empty_like`` and ``resize_`` here,
    and in ``at::empty`` inside compiled operators.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
    )
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3, 5).isnan().all(), "this torch does not fill new memory"
        assert torch.ones(2).new_empty(7).isnan().all()
        with warnings.catch_warnings():
            # Some operations of a GPU have no deterministic form, which is not the question here.
            warnings.filterwarnings("ignore", ".*[Dd]eterministic", UserWarning)
            yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = before[2]


def assert_alike_in_poisoned_memory(
    compute: Callable[[], Sequence[Tensor]], **tolerance: float
) -> None:
    """What ``compute`` returns is the same, to rounding, where new memory is NaN."""
    expected = compute()
    with poisoned_memory():
        actual = compute()
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, **tolerance)


@contextmanager
def nothing_by_default() -> Iterator[None]:
    """Inside, a tensor made without saying on which device has no numbers.

    It stands for a matrix on a GPU: what is made beside it on the default device cannot work with
    it. So a missing ``device=`` shows on a machine without one.
    """
    with torch.device("meta"):
        assert torch.ones(2).is_meta
        yield


@contextmanager
def float64_by_default() -> Iterator[None]:
    """Inside, torch makes float64 where no dtype is named."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


# What a caller may have switched on around a call that must not notice.
CONTEXTS: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference mode": torch.inference_mode,
    "another default dtype": float64_by_default,
}


def hidden_entries(spec: Structure, factors: Factors) -> dict[str, Tensor]:
    """Where a factor has entries on which the dense matrix does not depend, such as padding.

    Told by derivatives in a random direction, at these factors and at numbers between 0 and 1: one
    that is zero because a share is cut off there is not zero everywhere. A matrix that moves in
    steps depends on factors without a derivative; they are left out.
    """
    shares = {
        name: f.sigmoid()
        for name, f in random_factors(spec, seed=100).items()
        if f.is_floating_point()
    }
    draws = [factors, {**factors, **shares}]
    slopes = [_slopes(spec, draw) for draw in draws]
    return {name: torch.stack([s[name] == 0 for s in slopes]).all(0) for name in slopes[0]}


def _slopes(spec: Structure, factors: Factors) -> dict[str, Tensor]:
    smooth = [name for name in spec.factor_shapes() if name not in spec.step_factors()]
    values = {name: factors[name].detach().clone().requires_grad_() for name in smooth}
    dense = spec.to_dense({**factors, **values})
    (dense * normal(*dense.shape, seed=11)).sum().backward()
    return {name: value.grad for name, value in values.items()}
