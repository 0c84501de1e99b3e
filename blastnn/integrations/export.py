"""``torch.export`` programs of models with structured layers: one graph, without graph breaks.

A language model becomes a function from token ids to its first output, without a cache: a causal
model takes ``input_ids`` alone (padding on the right needs no mask there, since no token sees a
later one), an encoder takes ``attention_mask`` as well. Both axes, batch and length, are symbolic.
Any other module is exported as it is called with the example that is given.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from transformers import PreTrainedModel

from blastnn.errors import BlastnnError, ExportError, first_line
from blastnn.integrations.transformers import is_causal

CHATTER = (r"`isinstance\(treespec", "torchvision is not installed")


class _Ids(nn.Module):
    """A language model as a function of ids alone, to the first of its outputs."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model
        self.takes_cache = "use_cache" in inspect.signature(model.forward).parameters

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        options: dict[str, Any] = {"use_cache": False} if self.takes_cache else {}
        if attention_mask is not None:
            options["attention_mask"] = attention_mask
        return self.model(input_ids=input_ids, return_dict=False, **options)[0]


def example_inputs(model: nn.Module, shape: tuple[int, int], seed: int = 0) -> dict[str, Tensor]:
    """Random token ids ``(batch, length)`` for a language model, and a mask where it takes one.

    Raises:
        ExportError: not a model of transformers that goes from token ids to one output.
    """
    if not isinstance(model, PreTrainedModel):
        raise ExportError(
            f"{type(model).__name__} is no model of transformers; give example=(tensor, ...), the "
            "arguments to trace it with"
        )
    known = inspect.signature(model.forward).parameters
    if "input_ids" not in known or model.config.is_encoder_decoder:
        raise ExportError(
            f"{type(model).__name__} is no decoder or encoder of token ids; export its parts as "
            "plain modules, with example=(tensor, ...)"
        )
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config().vocab_size
    inputs = {"input_ids": torch.randint(vocabulary, shape, generator=generator)}
    if not is_causal(model) and "attention_mask" in known:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    return inputs


def as_function(model: nn.Module) -> nn.Module:
    """The module that is exported: a model of transformers by its ids, any other as it is."""
    return _Ids(model) if isinstance(model, PreTrainedModel) else model


def export_program(
    model: nn.Module,
    *,
    example: Sequence[Tensor] | None = None,
    dynamic: Sequence[int] | None = None,
    strict: bool = False,
) -> ExportedProgram:
    """The model as one graph of aten operators, without graph breaks.

    Args:
        model: a decoder or encoder of transformers, or any module with structured layers; it is
            left as it is, and traced as in ``eval``.
        example: arguments to trace with; None makes up token ids for a model of transformers.
        dynamic: the axes of every input that may have any size; by default the first two, batch
            and length, of a model of transformers, and the first, the batch, of any other.
        strict: ``torch.export``'s mode; strict also proves that no Python side effect is lost.

    Raises:
        ExportError: the model cannot be traced; says why.
    """
    if dynamic is None:
        dynamic = (0, 1) if isinstance(model, PreTrainedModel) else (0,)
    # Sizes of 2 and more: torch.export takes an axis of size 1 for one that is always 1.
    arguments = tuple(example or example_inputs(model, (2, 7)).values())
    shapes = tuple({axis: Dim.DYNAMIC for axis in dynamic} for _ in arguments)
    try:
        with _evaluating(model), quietly(), torch.no_grad():
            return torch.export.export(
                as_function(model), arguments, dynamic_shapes=shapes, strict=strict
            )
    except BlastnnError:
        raise
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise ExportError(
            f"torch.export cannot trace {type(model).__name__}: {first_line(error)}"
        ) from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """``eval`` for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def quietly() -> Iterator[None]:
    """Without what the exporter says of packages and Python internals; all else is shown.

    numpy's "invalid value" is the exporter folding both sides of a ``where``, as in ``sinc(0)``.
    """
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")

    def wanted(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(CHATTER[1])

    logger.addFilter(wanted)
    try:
        with warnings.catch_warnings(), np.errstate(divide="ignore", invalid="ignore"):
            warnings.filterwarnings("ignore", CHATTER[0], FutureWarning)
            yield
    finally:
        logger.removeFilter(wanted)
