r"""Second moments of a layer's inputs, gathered while calibration text passes through a block.

``C = E[x^ x^^T]`` with ``x^`` the input in the compressed model, and ``D = E[x x^^T]`` with ``x``
the input in the dense model. Products of one window are float32, their sum is float64. Where only
diagonals are wanted, nothing else is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from blastnn.errors import CalibrationError
from blastnn.models.walk import Call, StopForward


def refuse(layers: Sequence[str], why: str, otherwise: str) -> NoReturn:
    """Refuse layers of which the calibration text tells nothing.

    Raises:
        CalibrationError: names them, says ``why``, and what ``--no-strict`` does ``otherwise``.
    """
    more = f" and {len(layers) - 1} more layers" if len(layers) > 1 else ""
    raise CalibrationError(
        f"{layers[0]}{more}: {why}; calibrate with other text, leave it out (--targets), or "
        f"{otherwise} with --no-strict (strict=False)"
    )


@dataclass(frozen=True)
class Moments:
    """``C (n, n)`` and, where dense and compressed inputs differ, ``D (n, n)``; float64.

    ``drift (m, n)`` is ``E[(t - t^) x^^T]`` of a layer whose output is added to a stream
    (``residual.py``).
    """

    second: Tensor
    cross: Tensor | None
    tokens: int
    drift: Tensor | None = None

    def damped(self, damping: float) -> tuple[Tensor, Tensor | None]:
        """Both with ``damping`` times the mean diagonal of ``C`` added to their diagonals."""
        amount = damping * self.second.diagonal().mean()
        shifted = [None if m is None else m.clone() for m in (self.second, self.cross)]
        for moment in shifted:
            if moment is not None:
                moment.diagonal().add_(amount)
        assert shifted[0] is not None
        return shifted[0], shifted[1]


def root_of(moment: Tensor) -> Tensor:
    """``L (n, n)`` with ``L L^T`` a second moment ``(n, n)``, float64, however singular that is.

    Sums of float32 products may be a little indefinite, which a Cholesky factorisation does not
    survive. Then by eigenvalues, those below zero counting as zero; it takes ten times as long.
    """
    factor, failed = torch.linalg.cholesky_ex(moment.double())
    if not bool(failed):
        return factor
    squares, basis = torch.linalg.eigh(moment.double())
    return basis * squares.clamp(min=0.0).sqrt()


class MomentSum:
    """Accumulates ``x^T x`` or ``x^T x^`` over windows; of a ``diagonal`` moment no more."""

    def __init__(self, moment: str = "full") -> None:
        self._diagonal = moment == "diagonal"
        self._sums: dict[str, Tensor] = {}
        self.tokens = 0

    def add(
        self, compressed: Tensor, dense: Tensor | None = None, drift: Tensor | None = None
    ) -> None:
        """Inputs ``(tokens, n)`` of the compressed model and, aligned, of the dense one.

        ``drift (tokens, m)`` is how far the stream that the layer's output is added to is off.
        """
        self._accumulate("second", compressed, compressed)
        if dense is not None:
            self._accumulate("cross", dense, compressed)
        if drift is not None:
            self._accumulate("drift", drift, compressed)
        self.tokens += compressed.shape[0]

    def _accumulate(self, key: str, left: Tensor, right: Tensor) -> None:
        product = (left * right).sum(0) if self._diagonal else left.mT @ right
        if key not in self._sums:
            self._sums[key] = torch.zeros(product.shape, dtype=torch.float64)
        self._sums[key] += product

    def finish(self, layer: str) -> Moments:
        """The means.

        Raises:
            CalibrationError: an input was not finite; names the layer.
        """
        means = {key: total / self.tokens for key, total in self._sums.items()}
        if not all(bool(torch.isfinite(mean).all()) for mean in means.values()):
            raise CalibrationError(
                f"the inputs of {layer} are not all finite: its weights, or those of a layer "
                "before it, are damaged"
            )
        if self._diagonal:
            means = {key: mean.diag() for key, mean in means.items()}
        return Moments(means["second"], means.get("cross"), self.tokens, means.get("drift"))


END = ""  # in place of a module's name: what leaves the block


@dataclass(frozen=True)
class InputGroup:
    """Layers of one block that read the same tensor, by their names inside the block."""

    layers: tuple[str, ...]
    calls: int


def find_groups(
    block: nn.Module, calls: Sequence[Call], hidden: Tensor, layers: Iterable[str]
) -> list[InputGroup]:
    """Run a block once and see which layers read the same input, in order of their first call.

    Layers that are never called are in no group.
    """
    inputs: dict[str, list[Tensor]] = {}

    def remember(name: str, x: Tensor) -> None:
        inputs.setdefault(name, []).append(x)  # kept alive, so that no address is used twice

    with _Listener(block, list(layers), remember):
        run_calls(block, calls, hidden)
    groups: dict[tuple[object, ...], list[str]] = {}
    for name, tensors in inputs.items():
        key = tuple((t.data_ptr(), tuple(t.shape), t.stride()) for t in tensors)
        groups.setdefault(key, []).append(name)
    return [InputGroup(tuple(names), len(key)) for key, names in groups.items()]


def run_calls(block: nn.Module, calls: Sequence[Call], hidden: Tensor) -> Tensor:
    """All calls of one block, one after the other."""
    for call in calls:
        hidden = call.run(block, hidden)
    return hidden


class Passed(NamedTuple):
    """What was seen while hidden states passed through a block, or through a part of it.

    ``x (tokens, n)`` are the inputs of a group's layers, ``total (tokens, m)`` the sum of a layer's
    output and a stream where that was asked for, ``output`` what left the block.
    """

    x: Tensor
    total: Tensor | None
    output: Tensor | None


def layer_inputs(
    block: nn.Module,
    calls: Sequence[Call],
    hidden: Tensor,
    group: InputGroup,
    to_end: bool = False,
    sum_at: str | None = None,
) -> Passed:
    """Pass ``hidden`` through a block, no further than needed unless ``to_end``.

    ``sum_at`` names the module whose input is the sum wanted, ``END`` what leaves the block.
    """
    found: list[Tensor] = []
    sums: list[Tensor] = []
    output = None
    first = group.layers[0]
    to_end = to_end or sum_at == END

    def take(name: str, x: Tensor) -> None:
        if name == first:
            found.append(x.reshape(-1, x.shape[-1]))
        elif found and not sums:
            sums.append(x.reshape(-1, x.shape[-1]))
        complete = len(found) == group.calls and (sum_at is None or sums)
        if complete and not to_end:
            raise StopForward(x)

    with _Listener(block, [first, *([sum_at] if sum_at else [])], take), suppress(StopForward):
        output = run_calls(block, calls, hidden)
    if sum_at == END and output is not None:
        sums.append(output.reshape(-1, output.shape[-1]))
    x = torch.cat(found) if len(found) > 1 else found[0]
    return Passed(x, sums[0] if sums else None, output)


def pass_through(
    block: nn.Module,
    calls: Sequence[Call],
    hidden: list[Tensor],
    groups: Iterable[InputGroup],
    moment: str,
    prefix: str,
) -> dict[InputGroup, Moments]:
    """The moments of all groups of a block in one pass, which moves ``hidden`` behind it.

    ``prefix`` and a layer's name in the block are its full name.
    """
    sums = {group.layers[0]: MomentSum(moment) for group in groups}

    def take(name: str, x: Tensor) -> None:
        sums[name].add(x.reshape(-1, x.shape[-1]))

    with _Listener(block, list(sums), take):
        for index, entering in enumerate(hidden):
            hidden[index] = run_calls(block, calls, entering)
    return {group: sums[group.layers[0]].finish(prefix + group.layers[0]) for group in groups}


class _Listener:
    """Forward pre-hooks on named layers of a block, removed on leaving."""

    def __init__(
        self, block: nn.Module, layers: list[str], hear: Callable[[str, Tensor], None]
    ) -> None:
        self._hooks = [
            block.get_submodule(name).register_forward_pre_hook(
                lambda _module, args, name=name: hear(name, args[0])
            )
            for name in layers
        ]

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()
