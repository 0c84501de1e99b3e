"""``blastnn.compress`` of modules as people write them: shared, nested, called in any way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import blastnn
from blastnn.compress.in_memory import CompressionResult
from blastnn.errors import CalibrationError, PlanError
from blastnn.linear import StructuredLinear
from tests.made_up import make_model
from tests.memory import CONTEXTS

IDS = torch.arange(4 * 16).view(4, 16) * 7 % 250
X = torch.randn(50, 96, generator=torch.Generator().manual_seed(0))


def compressed(
    model: nn.Module, batches: list[Any] | None = None, **choices: Any
) -> CompressionResult:
    return blastnn.compress(
        model, 0.5, [X] if batches is None else batches, allow_slower=True, **choices
    )


def num_params(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def statuses(result: CompressionResult) -> dict[str, str]:
    return {record.name: record.status for record in result.records}


def test_a_layer_by_itself():
    layer = nn.Linear(96, 96)
    result = compressed(layer)
    assert isinstance(result.model, StructuredLinear)
    assert num_params(result.model) <= num_params(layer) // 2 + 96
    assert statuses(result) == {"": "compressed"}
    torch.testing.assert_close(
        result.model(X), X @ result.model.to_dense().T + layer.bias, rtol=1e-4, atol=1e-4
    )
    assert not torch.equal(result.model(X), layer(X))


def test_a_module_under_several_names_stays_one():
    layer = nn.Linear(96, 96)
    model = nn.Sequential(layer, nn.ReLU(), nn.Sequential(layer))
    small = compressed(model).model
    assert isinstance(small[0], StructuredLinear)
    assert small[2][0] is small[0]
    assert num_params(small) < num_params(model)


def test_weights_of_several_modules_stay_dense_and_tied():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.enter, self.inner, self.leave = (
                nn.Embedding(300, 96),
                nn.Linear(96, 96),
                nn.Linear(96, 300, bias=False),
            )
            self.leave.weight = self.enter.weight

        def forward(self, ids: Tensor) -> Tensor:
            return self.leave(self.inner(self.enter(ids)))

    model = Tied()
    result = compressed(model, [IDS])
    assert result.model.leave.weight is result.model.enter.weight
    assert statuses(result) == {"inner": "compressed", "leave": "kept"}
    [reason] = [record.reason for record in result.records if record.name == "leave"]
    assert "also that of enter" in reason
    assert num_params(result.model) < num_params(model)


@pytest.mark.parametrize("training", [False, True])
def test_layers_that_the_fast_path_of_a_transformer_reads_stay_dense(training):
    model = nn.Sequential(
        nn.TransformerEncoderLayer(96, 4, 128, batch_first=True), nn.Linear(96, 96)
    )
    x = torch.randn(2, 7, 96)
    result = compressed(model, [x])
    assert {n for n, s in statuses(result).items() if s == "compressed"} == {"1"}
    assert result.model.train(training)(x).shape == x.shape
    with pytest.raises(PlanError, match="no linear layer"):
        compressed(model[0], [x])


def test_every_module_keeps_its_mode():
    model = nn.Sequential(nn.Linear(96, 128), nn.BatchNorm1d(128), nn.Linear(128, 96)).train()
    model[1].eval()
    assert [m.training for m in compressed(model).model] == [True, False, True]
    llama = make_model("llama").train()
    llama.model.layers[0].eval()
    small = blastnn.compress(llama, 0.6, [IDS], allow_slower=True).model
    modes = {name: module.training for name, module in llama.named_modules()}
    assert {n: m.training for n, m in small.named_modules() if n in modes} == modes


@pytest.mark.parametrize("context", sorted(CONTEXTS))
@pytest.mark.parametrize("structure", ["blast", "lowrank"])
def test_the_callers_context_changes_nothing(structure, context):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 96))
    expected = compressed(model, structure=structure).model.state_dict()
    with CONTEXTS[context]():
        actual = compressed(model, structure=structure).model.state_dict()
    assert all(torch.equal(value, actual[name]) for name, value in expected.items())


class Keyword(nn.Module):
    """Calls its layers by keyword, and returns a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.second(input=self.first(input=x).relu())}


@pytest.mark.parametrize("outputs", ["equal", "weighted"])
def test_layers_called_by_keyword_in_a_model_that_returns_a_dict(outputs):
    torch.manual_seed(0)
    model = Keyword()
    plain = nn.Sequential(model.first, nn.ReLU(), model.second)
    found, expected = (compressed(m, outputs=outputs).model for m in (model, plain))
    torch.testing.assert_close(found(X)["logits"], expected(X), rtol=1e-4, atol=1e-4)


def test_batches_may_come_from_a_data_loader():
    data = DataLoader(TensorDataset(X), batch_size=10)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(96, 96))
    found, expected = (compressed(model, b).model for b in (data, list(X.split(10))))
    assert torch.equal(found(X), expected(X))


class Reader(nn.Module):
    """Uses a layer's weight without calling the layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.other = nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, x: Tensor, both: bool = False) -> Tensor:
        y = nn.functional.linear(x, self.layer.weight)
        return self.other(y) if both else y


@pytest.mark.parametrize("batch", [X, (X, True)], ids=["none", "one"])
def test_a_weight_that_is_read_without_a_call_is_told(batch):
    with pytest.raises(CalibrationError, match="layer.*never"):
        compressed(Reader(), [batch])
    result = compressed(Reader(), [batch], strict=False)
    assert statuses(result)["layer"] == "kept"
    assert statuses(result)["other"] == ("compressed" if isinstance(batch, tuple) else "kept")


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        (X, "several batches"),
        ("text", "several batches"),
        ({"x": X}, "several batches"),
        (3, "several batches"),
        ([[1.0, 2.0]], "cannot be run on a batch"),
        (["text"], "one is a str"),
        ([torch.randn(5, 95)], "cannot be run on a batch"),
        ([torch.ones(5, 96, dtype=torch.long)], "cannot be run on a batch"),
        ([{"y": X}], "cannot be run on a batch"),
        ([(X, X)], "cannot be run on a batch"),
    ],
)
def test_bad_calibration(batches, words):
    with pytest.raises(CalibrationError, match=words):
        blastnn.compress(nn.Sequential(nn.Linear(96, 96)), 0.5, batches, allow_slower=True)


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        (IDS.float(), "whole numbers"),
        (IDS + 100_000, "from 0 to"),
        (IDS - 9, "from 0 to"),
        (IDS > 3, "whole numbers"),
    ],
    ids=["float", "unknown", "negative", "bool"],
)
def test_bad_token_ids(batch, words):
    with pytest.raises(CalibrationError, match=words):
        blastnn.compress(make_model("llama"), 0.6, [batch], allow_slower=True)


@pytest.mark.parametrize("structure", ["blast", "lowrank", "channels"])
def test_saved_and_loaded_again(structure, tmp_path):
    model = make_model("llama")
    small = blastnn.compress(model, 0.6, [IDS], structure=structure, allow_slower=True).model
    small.save_pretrained(tmp_path)
    loaded = blastnn.load_model(tmp_path)
    assert torch.equal(loaded(IDS).logits, small.eval()(IDS).logits)
    assert not hasattr(model.config, "quantization_config")
