"""transformers: ``AutoModel...from_pretrained`` loads what blastnn saved, through its own registry.

Importing this module registers a quantisation method named ``blastnn``; no code from a model folder
is involved. Before any weight is loaded, every factor is looked for in the checkpoint and checked
against its spec, because transformers itself would initialise what is missing at random.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoModel, AutoModelForCausalLM, PreTrainedModel
from transformers.quantizers import HfQuantizer
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from blastnn.checkpoint import (
    METHOD,
    QUANTIZED,
    StoredLayer,
    check_factors,
    install_layers,
    parse_layers,
    quantization_config,
    read_layers,
)
from blastnn.errors import CheckpointError, DtypeError, ModelError, first_line
from blastnn.files import read_json
from blastnn.kernels import fix_choices
from blastnn.kernels.explain import FILE as KERNELS_FILE
from blastnn.linear import StructuredLinear
from blastnn.models.tensors import TensorFolder, find_name
from blastnn.structures.stack import RIGHT


@register_quantization_config(METHOD)
class BlastnnConfig(QuantizationConfigMixin):
    """The ``quantization_config`` entry of a compressed model: a spec for every layer."""

    def __init__(self, layers: dict[str, Any], format: int, **_: Any) -> None:  # noqa: A002
        self.quant_method = METHOD
        self.format = format
        self.layers = layers

    def to_dict(self) -> dict[str, Any]:
        """The entry as it was read."""
        return {"quant_method": METHOD, "format": self.format, "layers": self.layers}


@register_quantizer(METHOD)
class BlastnnQuantizer(HfQuantizer):
    """Swaps dense layers for structured ones on the meta device, then lets transformers load."""

    requires_calibration = True

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: list[str] | None = None, **_: Any
    ) -> PreTrainedModel:
        layers = parse_layers(self.quantization_config.to_dict())
        prefix = f"{model.base_model_prefix}."
        if not checkpoint_files:
            raise CheckpointError(
                "a blastnn model can only be loaded from its files, not from a given state_dict"
            )
        tensors = TensorFolder(Path(checkpoint_files[0]).parent)
        check_factors(layers, tensors, prefix)
        install_layers(model, layers, prefix)
        _check_rest(model, tensors, prefix)
        _mark_parents(model)
        tensors.close()
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes the factors and this configuration."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Factors are ordinary parameters, unless they are stored in few bits."""
        return not any(QUANTIZED in layer for layer in self.quantization_config.layers.values())


def _check_rest(model: PreTrainedModel, tensors: TensorFolder, prefix: str) -> None:
    """Whatever else the model has must be in the files too, tied weights aside."""
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    # The biases of quantised layers are buffers.
    structured = [n for n, m in model.named_modules() if isinstance(m, StructuredLinear)]
    biases = [f"{n}.bias" for n in structured if model.get_submodule(n).bias is not None]
    for name in dict.fromkeys([*(n for n, _ in model.named_parameters()), *biases]):
        if name not in tied and find_name(name, prefix, tensors) is None:
            raise CheckpointError(
                f"{tensors.folder} has no tensor for {name}; the folder is incomplete"
            )


def _mark_parents(model: PreTrainedModel) -> None:
    """Keep transformers from initialising ``parent.layer.weight``, which structured layers lack.

    Some families (GPT-2) rescale their output projections by name; every weight is in the files
    anyway. Parents with tensors of their own are left alone.
    """
    for module in model.modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if not own and any(isinstance(child, StructuredLinear) for child in module.children()):
            module._is_hf_initialized = True


def describe(model: PreTrainedModel) -> None:
    """Write the specs of a model's structured layers into its configuration.

    ``save_pretrained`` then makes a folder that ``load_model`` and ``from_pretrained`` read.
    """
    found = {n: m for n, m in model.named_modules() if isinstance(m, StructuredLinear)}
    if not found:
        return
    names = {id(layer): name for name, layer in found.items()}
    layers = {}
    for name, layer in found.items():
        holder = layer.holder(RIGHT)
        shared = None if holder is layer else names[id(holder)]
        layers[name] = StoredLayer(layer.spec, layer.quantization, shared)
    entry = quantization_config(layers)
    model.config.quantization_config = BlastnnConfig(entry["layers"], entry["format"])


def load_model(folder: str | Path, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A model folder, compressed or dense, as the class that its ``config.json`` names.

    Raises:
        CheckpointError: a broken folder, or one without all weights of its architecture.
        DtypeError: ``dtype`` is no floating-point dtype.
    """
    if not isinstance(folder, str | Path):
        raise CheckpointError(f"a model folder is named by a path, not by {folder!r}")
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise DtypeError(f"dtype must be a floating-point torch.dtype, but is {dtype!r}")
    folder = Path(folder)
    config = read_json(folder / "config.json")
    if not isinstance(config, dict) or "model_type" not in config:
        raise CheckpointError(f"{folder / 'config.json'} names no model_type")
    if "quantization_config" in config:
        read_layers(folder)
        use_measured_kernels(folder)
    options = {"dtype": dtype if dtype is not None else "auto", "use_safetensors": True}
    options["ignore_mismatched_sizes"] = True  # told below, in words
    try:
        model, loading = _class_of(config).from_pretrained(
            folder, trust_remote_code=False, output_loading_info=True, **options
        )
    except SafetensorError as error:
        raise CheckpointError(
            f"a weight file of {folder} is damaged or cut off: {error}; fetch it again"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from error
    for name, stored, wanted in sorted(loading["mismatched_keys"]):
        raise CheckpointError(
            f"{folder}: tensor {name} has the shape {tuple(stored)}, but config.json makes it "
            f"{tuple(wanted)}"
        )
    if missing := sorted(loading["missing_keys"]):
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder} has no tensor for {missing[0]}{more}: a {type(model).__name__} would begin "
            "with random numbers there; the folder is incomplete"
        )
    model.eval()
    return model


def _class_of(config: Mapping[str, Any]) -> Any:
    """The model class that a configuration names; ``AutoModel`` where it names none."""
    names = config.get("architectures")
    name = names[0] if isinstance(names, list) and names else None
    found = getattr(transformers, name, None) if isinstance(name, str) else None
    if isinstance(found, type) and issubclass(found, PreTrainedModel):
        return found
    return AutoModel


def use_measured_kernels(folder: Path) -> None:
    """Choose as ``blastnn kernels --measure --save`` found best, where that was on this machine."""
    if (folder / KERNELS_FILE).is_file():
        reason = fix_choices(read_json(folder / KERNELS_FILE))
        if reason is not None:
            logging.getLogger("blastnn").warning("the default kernels serve: %s", reason)


def is_causal(model: PreTrainedModel) -> bool:
    """Whether the model predicts the next token, so that it has a perplexity."""
    return type(model) in AutoModelForCausalLM._model_mapping.values()


def require_causal(model: PreTrainedModel, name: str, lacks: str) -> None:
    """Refuse a model that does not predict the next token, and so ``lacks`` something.

    Raises:
        ModelError: says what ``name`` does not have.
    """
    if not is_causal(model):
        raise ModelError(f"{name} does not predict the next token; it has no {lacks}")
