r"""How much each linear layer matters to the model's output, direction by direction.

To second order, a change ``E`` of a layer's weight ``A`` raises the model's loss by
``1/2 sum_t (g_t^T E x_t)^2``, with ``x_t`` the layer's input and ``g_t`` the gradient of the loss
at its output. With the Kronecker-factored ``C = E[x x^T]`` and ``G = E[g g^T]`` (Martens and
Grosse 2015) that is ``T/2 || G^(1/2) E C^(1/2) ||_F^2`` for ``T`` tokens, so the squared singular
values of ``G^(1/2) A C^(1/2)``, the layer's *spectrum*, say what removing each direction costs,
and are comparable between layers. Both moments are damped first, by a multiple of their mean
diagonal: few windows tell little of directions that they hardly use, and other text may use them.

The loss is the Kullback-Leibler divergence from the dense model's own predictions, whose
second moment of gradients is that of labels drawn from them (the true Fisher information). A model
without an output layer has ``1/2 || output ||^2`` instead, by random projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from blastnn.arithmetic import DRAWN
from blastnn.compress.moments import root_of
from blastnn.errors import CalibrationError
from blastnn.models.linears import dense_weight, input_of
from blastnn.models.walk import first_tensor

Spectra = dict[str, list[float]]  # layer name -> falling squared singular values, nats per token

# Added to the diagonals of ``C`` and ``G``, relative to their means.
INPUT_RIDGE, GRADIENT_RIDGE = 0.05, 0.3


@dataclass(frozen=True)
class Measurement:
    """What is known of the layers of a model, by name.

    ``outputs`` holds blocks on the diagonal of ``G``, ``(blocks, p, p)``, padded with zeros, of the
    layers for which they were asked; ``blocks`` the whole ``G (h, h)`` of what leaves a block.
    """

    spectra: Spectra
    outputs: dict[str, Tensor]
    blocks: dict[str, Tensor]


def measure_whole(
    model: nn.Module,
    layers: Mapping[str, int | None],
    runs: Iterable[Callable[[], Tensor]],
    predictions: bool,
    seed: int,
    blocks: Sequence[str] = (),
) -> Measurement:
    """Measure layers of a model in memory; those that no run reaches are left out.

    Args:
        model: its parameters must not require gradients.
        layers: names of linear layers, and how many blocks of ``G`` to gather of each, None for
            none.
        runs: each runs the model once, and gives its output.
        predictions: whether the output is the logarithm of unnormalised probabilities.
        seed: of the labels drawn.
        blocks: names of blocks whose ``G`` is wanted.
    """
    sums = {name: LayerSum(model.get_submodule(name), n) for name, n in layers.items()}
    leaving = {name: BlockSum(model.get_submodule(name)) for name in blocks}
    with ExitStack() as stack, torch.enable_grad():
        for total in sums.values():
            stack.enter_context(total)
        for block in leaving.values():
            stack.enter_context(block)
        for index, run in enumerate(runs):
            loss = fisher_loss(run(), predictions, seed + index)
            if loss.requires_grad:  # else no layer was called
                loss.backward()
    reached = {name: total for name, total in sums.items() if total.reached}
    outputs = {name: total.outputs() for name, total in reached.items()}
    return Measurement(
        {name: total.spectrum() for name, total in reached.items()},
        {name: moment for name, moment in outputs.items() if moment is not None},
        {name: block.moment() for name, block in leaving.items()},
    )


class LayerSum:
    """Gathers, while open, what one layer's spectrum needs, in its smaller dimension.

    A layer with no more outputs than inputs gathers ``G`` and ``A C A^T`` (the moment of its
    outputs), any other ``C`` and ``A^T G A`` (the moment of the gradients that it hands down).
    """

    def __init__(self, layer: nn.Module, row_blocks: int | None = None) -> None:
        self._weight = dense_weight(layer).detach().float()
        self._layer = layer
        size = min(self._weight.shape)
        self._by_outputs = self._weight.shape[0] <= self._weight.shape[1]
        self._forward, self._backward = (torch.zeros(size, size).double() for _ in range(2))
        self._row_blocks, self._rows = row_blocks, self._weight.shape[0]
        self._diagonal: Tensor | None = None
        self._tokens = 0
        self._input_power, self._gradient_power = 0.0, 0.0  # sums of the mean diagonals
        self.reached = False

    def __enter__(self) -> None:
        self._hook: Any = self._layer.register_forward_hook(self._listen, with_kwargs=True)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _listen(
        self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Tensor
    ) -> Tensor:
        given = input_of(args, kwargs)
        x = given.detach().float().reshape(-1, given.shape[-1])
        self._tokens += len(x)
        forward = x @ self._weight.mT if self._by_outputs else x
        self._forward += forward.mT @ forward
        self._input_power += _mean_power(x)

        def hear(gradient: Tensor) -> None:
            g = gradient.float().reshape(-1, gradient.shape[-1])
            backward = g if self._by_outputs else g @ self._weight
            self._backward += backward.mT @ backward
            self._gradient_power += _mean_power(g)
            if self._row_blocks is not None:
                self._add_diagonal(g, self._row_blocks)
            self.reached = True

        output = _with_gradient(output)
        output.register_hook(hear)
        return output

    def _add_diagonal(self, gradients: Tensor, blocks: int) -> None:
        p = -(-self._rows // blocks)
        padded = pad(gradients, (0, p * blocks - self._rows)).view(-1, blocks, p).transpose(0, 1)
        product = (padded.mT @ padded).double()
        self._diagonal = product if self._diagonal is None else self._diagonal.add_(product)

    def outputs(self) -> Tensor | None:
        """The blocks on the diagonal of ``G``, float32, where they were asked for."""
        return None if self._diagonal is None else (self._diagonal / self._tokens).float()

    def spectrum(
        self, input_ridge: float = INPUT_RIDGE, gradient_ridge: float = GRADIENT_RIDGE
    ) -> list[float]:
        """Squared singular values of ``G^(1/2) A C^(1/2)``, falling: one similar to the product
        of the two moments is ``L^T M L`` with ``L L^T`` the one and ``M`` the other.

        Args:
            input_ridge: added to the diagonal of ``C``, relative to its mean.
            gradient_ridge: the same for ``G``.
        """
        more_inputs = input_ridge * self._input_power
        more_gradients = gradient_ridge * self._gradient_power
        weight = self._weight.double()
        identity = torch.eye(len(self._forward)).double()
        # Of the two, that with the plain ridge is far from singular: its root is a triangle.
        if self._by_outputs:
            outer = self._backward + more_gradients * identity
            inner = self._forward + more_inputs * weight @ weight.mT
        else:
            outer = self._forward + more_inputs * identity
            inner = self._backward + more_gradients * weight.mT @ weight
        root = root_of(outer / self._tokens)
        values = torch.linalg.eigvalsh(root.mT @ (inner / self._tokens) @ root)
        return [float(value) for value in values.clamp(min=0.0).flip(0)]


def _mean_power(vectors: Tensor) -> float:
    """Of rows that are summed up, the mean square over columns."""
    return float(torch.linalg.vector_norm(vectors, dtype=torch.float64)) ** 2 / vectors.shape[1]


def _with_gradient(output: Tensor) -> Tensor:
    """An output that gradients reach: in a model with frozen weights they begin at the first."""
    if output.requires_grad:
        return output
    return output + torch.zeros((), dtype=output.dtype, requires_grad=True)


class GradientSum:
    """``G = E[g g^T]`` of gradients ``(tokens, h)``, piece by piece."""

    def __init__(self) -> None:
        self._sum: Tensor | None = None
        self._tokens = 0

    def add(self, gradient: Tensor) -> None:
        """One more piece ``(..., h)``."""
        g = gradient.float().reshape(-1, gradient.shape[-1])
        product = (g.mT @ g).double()
        self._sum = product if self._sum is None else self._sum.add_(product)
        self._tokens += len(g)

    def moment(self) -> Tensor:
        """``G (h, h)``, float32."""
        assert self._sum is not None
        return (self._sum / self._tokens).float()


class BlockSum(GradientSum):
    """Gathers, while open, the gradients at what a block gives when it is last called in a run."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self._block, self._calls = block, 0

    def __enter__(self) -> None:
        self._hook: Any = self._block.register_forward_hook(self._listen)

    def __exit__(self, *_: object) -> None:
        self._hook.remove()

    def _listen(self, _: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        self._calls += 1
        call = self._calls  # not the tensor: a hook that holds its own tensor is never freed

        def hear(gradient: Tensor) -> None:
            if call == self._calls:
                self.add(gradient)

        left = _with_gradient(first_tensor(output))
        left.register_hook(hear)
        return left if isinstance(output, Tensor) else (left, *output[1:])


def fisher_loss(output: Tensor, predictions: bool, seed: int) -> Tensor:
    """A loss whose gradients have the second moment wanted: summed over a window's tokens.

    Raises:
        CalibrationError: the output is not finite.
    """
    if not bool(torch.isfinite(output).all()):
        raise CalibrationError(
            "the dense model's output on the calibration text is not all finite: its weights, or "
            "the text, are no good to measure with"
        )
    generator = torch.Generator().manual_seed(seed)
    flat = output.reshape(-1, output.shape[-1])
    if not predictions:
        drawn = torch.randn(flat.shape, generator=generator, **DRAWN)
        return (flat * drawn.to(flat.device)).sum()
    with torch.no_grad():
        labels = _drawn(flat.softmax(-1), generator)
    return torch.nn.functional.cross_entropy(flat, labels, reduction="sum")


def _drawn(probabilities: Tensor, generator: torch.Generator) -> Tensor:
    """One label for every row ``(tokens, labels)``, where a uniform number falls in the sums.

    ``torch.multinomial`` draws a number for every probability, which takes ten times as long.
    """
    sums = probabilities.cumsum(-1)
    at = torch.rand(len(sums), 1, generator=generator, **DRAWN).to(sums) * sums[:, -1:]
    return torch.searchsorted(sums, at, right=True)[:, 0].clamp(max=sums.shape[-1] - 1)
