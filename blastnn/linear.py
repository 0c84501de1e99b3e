"""``StructuredLinear``: a linear layer whose weight is a structured matrix; the only module."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import Tensor, nn

from blastnn.errors import StructureError
from blastnn.factorize import factorize
from blastnn.kernels import matmul, number_of
from blastnn.structures import Factors, Structure


class StructuredLinear(nn.Module):
    """``y = A x + bias`` with ``A`` given by ``spec``; its parameters are named as the factors.

    Index factors are buffers.

    Args:
        spec: the structure of the weight.
        bias: whether to add a learned bias of shape ``(out_features,)``.
        device, dtype: as in ``torch.nn.Linear``.
    """

    def __init__(
        self,
        spec: Structure,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.spec = spec
        self._number = number_of(spec)
        self.in_features, self.out_features = spec.in_features, spec.out_features
        for name, shape in spec.factor_shapes().items():
            self.register_parameter(
                name, nn.Parameter(torch.empty(shape, device=device, dtype=dtype))
            )
        for name, shape in spec.index_shapes().items():
            self.register_buffer(name, torch.zeros(shape, device=device, dtype=torch.int64))
        if bias:
            self.bias = nn.Parameter(torch.empty(spec.out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)
        self.reset_parameters()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._number = number_of(self.spec)  # numbers mean nothing in another process

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The structure's own initialisation, seeded from torch's generator; a zero bias."""
        if self._any_factor().device.type == "meta":
            return
        seed = int(torch.randint(2**31, ()).item())
        for name, value in self.spec.init(seed=seed).items():
            self.factors[name].copy_(value)
        if self.bias is not None:
            self.bias.zero_()

    @property
    def factors(self) -> dict[str, Tensor]:
        """The factors by name; the parameters and buffers themselves, not copies."""
        return {name: getattr(self, name) for name in self.spec.tensor_shapes()}

    def forward(self, x: Tensor) -> Tensor:
        """``(..., in_features)`` to ``(..., out_features)``."""
        y = matmul(self.spec, self._number, x, self.factors)
        return y if self.bias is None else y + self.bias.to(y.dtype)  # autocast lowers y alone

    def to_dense(self) -> Tensor:
        """The dense weight, ``(out_features, in_features)``."""
        return self.spec.to_dense(self.factors)

    @classmethod
    @torch.no_grad()
    def from_factors(cls, spec: Structure, factors: Factors, bias: Tensor | None = None) -> Self:
        """A layer that holds these very tensors.

        Raises:
            StructureError: names or shapes differ from the spec's.
        """
        spec.check(factors)
        if bias is not None and tuple(bias.shape) != (spec.out_features,):
            raise StructureError(
                f"the bias of {spec} must have the shape ({spec.out_features},), but has "
                f"{tuple(bias.shape)}"
            )
        layer = cls(spec, bias=bias is not None, device="meta")
        for name, value in factors.items():
            setattr(layer, name, nn.Parameter(value) if value.is_floating_point() else value)
        if bias is not None:
            layer.bias = nn.Parameter(bias)
        return layer

    @classmethod
    @torch.no_grad()
    def from_linear(cls, linear: nn.Linear, spec: Structure, **options: Any) -> Self:
        """Factorise a dense layer's weight; ``options`` go to ``blastnn.factorize``."""
        result = factorize(linear.weight, spec, **options)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        return cls.from_factors(spec, result.factors, bias)

    def extra_repr(self) -> str:
        """The spec, for ``print(model)``."""
        return f"{self.spec}, bias={self.bias is not None}"

    def _any_factor(self) -> Tensor:
        return self.get_parameter(next(iter(self.spec.factor_shapes())))
