"""What one token, or one prompt, costs at the least: bytes to read and multiplications to do.

From the model alone, whatever kernel runs. Decoding one token of every sequence reads each weight
of a linear layer once (the output layer too, also where it shares its tensor with the embedding),
one row of each embedding for every sequence, all other parameters, and the filled part of the
cache. A prompt multiplies by every linear layer for each of its tokens, by the output layer for the
last token only, and attends causally. Modules that run more than once, and experts that do not run,
are not known here: each counts once.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from blastnn.linear import StructuredLinear


@dataclass(frozen=True)
class Parts:
    """Counts that add up."""

    @property
    def total(self) -> int:
        """All of them."""
        return sum(asdict(self).values())

    def to_json(self) -> dict[str, int]:
        """The parts and their sum."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class DecodeBytes(Parts):
    """Bytes read for one token of every sequence."""

    linear_layers: int
    output_layer: int
    embedding_rows: int
    other_parameters: int
    cache: int


@dataclass(frozen=True)
class PrefillProducts(Parts):
    """Multiplications for one prompt of every sequence."""

    linear_layers: int
    output_layer: int
    attention: int


def decode_bytes(model: PreTrainedModel, batch: int, context: float) -> DecodeBytes:
    """The bytes of one decoding step over ``context`` cached tokens (a mean over steps)."""
    output = model.get_output_embeddings()
    layers = [module for module in linears(model) if module is not output]
    rows = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    counted = {id(p) for module in [*layers, output, *rows] for p in _own(module)}
    rest = {id(p): p for p in model.parameters() if id(p) not in counted}
    return DecodeBytes(
        linear_layers=sum(_bytes(p) for module in layers for p in _own(module)),
        output_layer=sum(_bytes(p) for p in _own(output)),
        embedding_rows=sum(batch * _bytes(module.weight[:1]) for module in rows),
        other_parameters=sum(_bytes(p) for p in rest.values()),
        cache=round(batch * context * cache_bytes_per_token(model)),
    )


def prefill_products(model: PreTrainedModel, batch: int, tokens: int) -> PrefillProducts:
    """The multiplications of ``batch`` prompts of ``tokens`` tokens, logits for the last one."""
    output = model.get_output_embeddings()
    each = {id(module): multiplications(module) for module in linears(model)}
    last = each.pop(id(output), 0)
    heads, width, blocks = _attention_shape(model)
    pairs = tokens * (tokens + 1) // 2
    return PrefillProducts(
        linear_layers=batch * tokens * sum(each.values()),
        output_layer=batch * last,
        attention=batch * blocks * 2 * heads * width * pairs,
    )


def linears(model: nn.Module) -> list[nn.Module]:
    """Every dense or structured linear layer, once each."""
    kinds = (nn.Linear, Conv1D, StructuredLinear)
    return [module for module in model.modules() if isinstance(module, kinds)]


def multiplications(module: nn.Module) -> int:
    """Of one linear layer, for one token."""
    if isinstance(module, StructuredLinear):
        return module.spec.num_multiplications
    weight: Any = module.weight
    return int(weight.numel())


def cache_bytes_per_token(model: PreTrainedModel) -> int:
    """Keys and values of one token of one sequence, in the model's dtype."""
    config = model.config
    heads, width, blocks = _attention_shape(model)
    shared = getattr(config, "num_key_value_heads", None) or heads
    return int(2 * blocks * shared * width * model.dtype.itemsize)


def _attention_shape(model: PreTrainedModel) -> tuple[int, int, int]:
    """Query heads, their width, and the number of blocks."""
    config = model.config
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return heads, width, config.num_hidden_layers


def _own(module: nn.Module | None) -> list[Tensor]:
    if module is None:
        return []
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
