"""``StructuredLinear``: a linear layer whose weight is a structured matrix; the only module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Self

import torch
from torch import Tensor, nn

from blastnn.errors import StructureError
from blastnn.factorize import factorize
from blastnn.kernels import matmul, number_of
from blastnn.quantization import (
    SCALE,
    SCALE_DTYPE,
    Quantization,
    check_stored,
    dequantize_factors,
    quantization_named,
    quantize_factors,
    stored_forms,
)
from blastnn.structures import Factors, Structure
from blastnn.structures.stack import RIGHT


class StructuredLinear(nn.Module):
    """``y = A x + bias`` with ``A`` given by ``spec``; its parameters are named as the factors.

    A layer may use the right factor of another layer that reads the same input (``share``); the
    tensor is then that layer's alone, in ``parameters()`` and in files.

    Index factors are buffers. In a quantised layer everything is a buffer, since whole numbers
    have no gradient: nothing in it can be trained.

    Args:
        spec: the structure of the weight.
        bias: whether to add a learned bias of shape ``(out_features,)``.
        device, dtype: as in ``torch.nn.Linear``.
        quantization: how the large factors are stored; None stores them as numbers of ``dtype``.

    Raises:
        StructureError: ``spec`` is not a spec.
    """

    bias: Tensor | None

    def __init__(
        self,
        spec: Structure,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        quantization: Quantization | None = None,
    ) -> None:
        if not isinstance(spec, Structure):
            raise StructureError(
                "a layer needs a spec, such as Blast.for_budget(out_features, in_features, "
                f"params), but was given {spec!r}"
            )
        super().__init__()
        self.spec, self.quantization = spec, quantization
        self._number = number_of(spec, quantization)
        self.in_features, self.out_features = spec.in_features, spec.out_features
        forms = stored_forms(spec, quantization)
        self._names = tuple(forms)
        self._owners: dict[str, StructuredLinear] = {}  # a dict, so that torch sees no submodule
        for name, form in forms.items():
            self._hold(name, torch.zeros(form.shape, device=device, dtype=form.dtype or dtype))
        self._hold(
            "bias", torch.empty(spec.out_features, device=device, dtype=dtype) if bias else None
        )
        self.reset_parameters()

    def _hold(self, name: str, value: Tensor | None) -> None:
        """A parameter where it could be trained, a buffer elsewhere."""
        if self.quantization is None and (value is None or value.is_floating_point()):
            self.register_parameter(name, None if value is None else nn.Parameter(value))
        else:
            self.register_buffer(name, value)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Numbers mean nothing in another process.
        self._number = number_of(self.spec, self.quantization)

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The structure's own initialisation, seeded from torch's generator; a zero bias."""
        if getattr(self, self._names[0]).is_meta:
            return
        seed = int(torch.randint(2**31, (), device="cpu").item())
        values = self.spec.init(seed=seed)
        if self.quantization is not None:
            values = quantize_factors(self.spec, values, self.quantization)
        for name, value in values.items():
            self.factors[name].copy_(value)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def factors(self) -> dict[str, Tensor]:
        """All factors by name, also one shared with another layer; the tensors, not copies."""
        if not self._owners:
            return {name: getattr(self, name) for name in self._names}
        return {name: getattr(self.holder(name), name) for name in self._names}

    def holder(self, name: str) -> StructuredLinear:
        """The layer whose tensor a factor is: this one, or that at the end of those that share."""
        layer = self
        while name in layer._owners:
            layer = layer._owners[name]
        return layer

    def share(self, owner: StructuredLinear) -> None:
        """Use the right factor of ``owner`` from now on, and let go of one's own.

        Raises:
            StructureError: the two factors differ in shape, dtype or device, one of the layers is
                quantised, the structure has no right factor, or that of ``owner`` is one's own.
        """
        shapes = [layer.spec.factor_shapes().get(RIGHT) for layer in (self, owner)]
        if None in shapes or shapes[0] != shapes[1] or self.quantization or owner.quantization:
            raise StructureError(f"{self} cannot use the factor {RIGHT} of {owner}")
        if owner.holder(RIGHT) is self:
            raise StructureError(f"the factor {RIGHT} that {owner} uses is that of {self} itself")
        own, other = self.factors[RIGHT], owner.factors[RIGHT]
        if (own.dtype, own.device) != (other.dtype, other.device):
            raise StructureError(
                f"the factor {RIGHT} of {self} is {own.dtype} on {own.device}, but that of {owner} "
                f"is {other.dtype} on {other.device}; move or cast one of the two layers"
            )
        if RIGHT in self._parameters:
            delattr(self, RIGHT)
        self._owners = {RIGHT: owner}

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 (as in torch.nn.Linear)
        """``(..., in_features)`` to ``(..., out_features)``."""
        y = matmul(self.spec, self._number, input, self.factors, self.quantization)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # autocast lowers y alone

    def to_dense(self) -> Tensor:
        """The dense weight, ``(out_features, in_features)``; float32 where it is quantised."""
        return self.spec.to_dense(dequantize_factors(self.spec, self.factors, self.quantization))

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls,
        spec: Structure,
        factors: Factors,
        bias: Tensor | None = None,
        quantization: Quantization | None = None,
    ) -> Self:
        """A layer that holds these very tensors; with ``quantization`` those that are stored.

        Raises:
            StructureError: names, shapes or dtypes differ from the spec's; without quantisation all
                factors have one floating-point dtype, but for whole numbers in index factors.
        """
        _check_kinds(spec, factors, bias)
        if quantization is None:
            spec.check(factors)
            _check_dtypes(spec, factors)
        else:
            check_stored(spec, factors, quantization)
        if bias is not None and tuple(bias.shape) != (spec.out_features,):
            raise StructureError(
                f"the bias of {spec} must have the shape ({spec.out_features},), but has "
                f"{tuple(bias.shape)}"
            )
        layer = cls(spec, bias is not None, device="meta", quantization=quantization)
        values = dict(factors) if bias is None else {**factors, "bias": bias}
        for name, value in values.items():
            is_parameter = name in layer._parameters
            setattr(layer, name, nn.Parameter(value) if is_parameter else value)
        return layer

    @torch.no_grad()
    def quantized(self, how: str | Quantization, second_moment: Tensor | None = None) -> Self:
        """The layer with its large factors in few bits; small factors and the bias are shared.

        Args:
            how: ``"int8"``, ``"int4"``, or bits and group of one's own.
            second_moment: ``E[x x^T]`` of the inputs, to spend the error where it matters least.

        Raises:
            StructureError: it is quantised already, or a factor is not finite.
        """
        if self.quantization is not None:
            raise StructureError(f"{self} is quantised already; quantise the original layer")
        quantization = quantization_named(how) if isinstance(how, str) else how
        values = {name: value.detach() for name, value in self.factors.items()}
        stored = quantize_factors(self.spec, values, quantization, second_moment)
        bias = None if self.bias is None else self.bias.detach()
        return type(self).from_factors(self.spec, stored, bias, quantization)

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As in torch; StructureError for a quantised layer, which cannot be trained."""
        if requires_grad and self.quantization is not None:
            raise StructureError(
                f"{self} is quantised and cannot be trained; train the model that it was made "
                "from, and quantise afterwards"
            )
        return super().requires_grad_(requires_grad)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """As in torch, but scales keep their dtype, which is part of the format, in any cast."""
        kept = {name: value for name, value in self.factors.items() if name.endswith(SCALE)}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            cast = getattr(self, name)
            if cast.dtype != SCALE_DTYPE:
                setattr(self, name, value.to(cast.device))
        return self

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, spec: Structure, **options: Any) -> Self:
        """Factorise a dense layer's weight; ``options`` go to ``blastnn.factorize``."""
        result = factorize(linear.weight, spec, **options)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls.from_factors(spec, result.factors, bias)

    def extra_repr(self) -> str:
        """The spec, for ``print(model)``."""
        bits = "" if self.quantization is None else f", {self.quantization}"
        return f"{self.spec}, bias={self.bias is not None}{bits}"


def _check_kinds(spec: Structure, factors: Factors, bias: Tensor | None) -> None:
    """Raise StructureError unless these are a spec, tensors by name and a tensor."""
    if not isinstance(spec, Structure):
        raise StructureError(f"a layer needs a spec, but was given {spec!r}")
    if not isinstance(factors, Mapping) or not all(isinstance(f, Tensor) for f in factors.values()):
        raise StructureError(f"the factors of {spec} must be tensors by name, not {factors!r}")
    if bias is not None and not isinstance(bias, Tensor):
        raise StructureError(f"the bias of {spec} must be a tensor, not {bias!r}")


def _check_dtypes(spec: Structure, factors: Factors) -> None:
    """Raise StructureError unless index factors are whole numbers and all others of one dtype."""
    numbers = {name: factors[name].dtype for name in spec.factor_shapes()}
    if len({*numbers.values()}) > 1 or not all(
        dtype.is_floating_point for dtype in numbers.values()
    ):
        raise StructureError(
            f"the factors of {spec} must be of one floating-point dtype, but are {numbers}"
        )
    for name in spec.index_shapes():
        if factors[name].dtype != torch.int64:
            raise StructureError(
                f"the factor {name} of {spec} must be torch.int64, but is {factors[name].dtype}"
            )
