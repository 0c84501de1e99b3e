"""A short deterministic look at a model's output, the same in every process."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

PROBE_POSITIONS = 64


@torch.no_grad()
def probe(model: nn.Module, ids: Tensor) -> Tensor:
    """The logits of the last positions for token ids ``(1, window)``, or the last hidden states."""
    return output_of(model(**probe_arguments(model, ids)))


def probe_arguments(model: nn.Module, ids: Tensor) -> dict[str, Any]:
    """The arguments with which ``probe`` calls the model."""
    arguments: dict[str, Any] = {"input_ids": ids}
    accepted = inspect.signature(model.forward).parameters
    if "logits_to_keep" in accepted:
        arguments["logits_to_keep"] = PROBE_POSITIONS
    if "use_cache" in accepted:
        arguments["use_cache"] = False
    return arguments


def output_of(outputs: Any) -> Tensor:
    """The last positions of the first tensor of a model's output, in its own dtype."""
    first = outputs if isinstance(outputs, Tensor) else outputs[0]
    return first[:, -PROBE_POSITIONS:].contiguous()


def digest(output: Tensor) -> str:
    """Hex digest of a tensor's bits."""
    plain = output.contiguous().view(torch.uint8).cpu()
    return hashlib.sha256(plain.numpy().tobytes()).hexdigest()


def matches(model: nn.Module, expected: Mapping[str, Any]) -> bool:
    """Whether a loaded model's output has the very bits that the job computed.

    ``expected`` holds the job's ``ids`` and the digest of its output, ``logits_sha256``.
    """
    return digest(probe(model, torch.tensor([expected["ids"]]))) == expected["logits_sha256"]
