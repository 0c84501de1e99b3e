"""Batches of calibration for a module in memory: checked, and run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from blastnn.errors import BlastnnError, CalibrationError
from blastnn.models.context import window_length

Batch = Tensor | tuple[Any, ...] | list[Any] | Mapping[str, Any]


def batches_of(calibration: Iterable[Batch]) -> list[Batch]:
    """The batches as a list.

    Raises:
        CalibrationError: one is no batch, or empty.
    """
    if isinstance(calibration, Tensor | Mapping | str) or not isinstance(calibration, Iterable):
        raise CalibrationError(
            "calibration must be several batches, such as [inputs], but is a "
            f"{type(calibration).__name__}"
        )
    batches = list(calibration)
    for batch in batches:
        if not isinstance(batch, Tensor | tuple | list | Mapping):
            raise CalibrationError(
                "a batch of the calibration must be a tensor, a tuple or list of arguments or a "
                f"dict of keyword arguments, but one is a {type(batch).__name__}"
            )
        if isinstance(batch, Tensor) and not batch.numel():
            raise CalibrationError("a batch of the calibration is empty; leave it out")
    return batches


def token_shape(batch: Batch) -> tuple[int, ...] | None:
    """Of a batch of token ids; None of what cannot be one."""
    return tuple(batch.shape) if isinstance(batch, Tensor) and batch.ndim == 2 else None


def check_ids(model: PreTrainedModel, ids: Tensor) -> None:
    """Refuse what is no batch of token ids of the model, or longer than its positions."""
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"token ids must be whole numbers, but the batches are {ids.dtype}")
    words = model.get_input_embeddings().weight.shape[0]
    if int(ids.min()) < 0 or int(ids.max()) >= words:
        raise CalibrationError(
            f"token ids must be from 0 to {words - 1}, but the calibration has some from "
            f"{int(ids.min())} to {int(ids.max())}; is it the tokenizer of another model?"
        )
    length = ids.shape[1]
    if length > (longest := window_length(model.config, length)):
        raise CalibrationError(
            f"the calibration batches have {length} tokens in a row, but the model has "
            f"positions for {longest}; cut them"
        )


def run_on(model: nn.Module, batch: Batch) -> Any:
    """What the model gives for a batch.

    Raises:
        CalibrationError: it cannot be run on it.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, tuple | list) else model(batch)
    except BlastnnError:
        raise
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise CalibrationError(
            f"the model cannot be run on a batch of the calibration: {error}"
        ) from error
