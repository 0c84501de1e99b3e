"""The engine, its race, what bounds it, and ``blastnn bench``; one test compiles."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from typer.testing import CliRunner

from blastnn import Blast, StructuredLinear
from blastnn.cli import app
from blastnn.errors import MeasurementError, ModelError
from blastnn.evaluate import peak
from blastnn.evaluate.bench import bench
from blastnn.evaluate.bench_options import BenchOptions
from blastnn.evaluate.bench_picture import draw
from blastnn.evaluate.energy import EnergyMeter
from blastnn.evaluate.engine import Engine, open_engine
from blastnn.evaluate.generate import continue_text
from blastnn.evaluate.race import race
from blastnn.evaluate.speed import compare_speed
from blastnn.evaluate.work import decode_bytes, prefill_products
from tests.made_up import byte_tokenizer, make_folder, make_model

DECODERS = ["gpt2", "llama", "mistral", "olmo2", "opt", "phi3", "qwen3", "smollm3"]
CPU = torch.device("cpu")


@torch.library.custom_op("blastnn_tests::product", mutates_args=())
def product(x: Tensor, weight: Tensor) -> Tensor:
    """A kernel of one's own, which a compiler cannot look into."""
    return x @ weight.T


@product.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


class Opaque(nn.Module):
    """A linear layer by that kernel."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = linear.weight

    def forward(self, x: Tensor) -> Tensor:
        return product(x, self.weight)


def prompts(batch: int, tokens: int) -> Tensor:
    return torch.randint(256, (batch, tokens), generator=torch.Generator().manual_seed(3))


def expected_tokens(model: PreTrainedModel, ids: Tensor, count: int) -> Tensor:
    """What transformers itself generates."""
    made = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        max_new_tokens=count,
        eos_token_id=None,
        pad_token_id=0,
    )
    return made[:, ids.shape[1] :]


def engine_tokens(engine: Engine, ids: Tensor, count: int) -> Tensor:
    return torch.cat(list(engine.tokens(ids, count)), 1)


@pytest.mark.parametrize("family", DECODERS)
def test_engine_generates_what_transformers_does(family: str) -> None:
    model, ids = make_model(family), prompts(2, 11)
    before = model.config._attn_implementation
    with open_engine(model, 11 + 9) as engine:
        for _ in range(2):  # a second prompt finds nothing of the first
            assert torch.equal(engine_tokens(engine, ids, 9), expected_tokens(model, ids, 9))
    assert model.config._attn_implementation == before


def test_compiled_prefill_and_step_give_the_same_tokens_around_structured_and_opaque_layers() -> (
    None
):
    model, ids = make_model("llama", num_hidden_layers=1), prompts(1, 7)
    block = model.model.layers[0].mlp
    spec = Blast(out_features=40, in_features=24, blocks=(2, 2), rank=5)
    block.up_proj, block.down_proj = StructuredLinear(spec, bias=False), Opaque(block.down_proj)
    with open_engine(model, 15, compiled=True, compiled_prefill=True) as engine:
        compiled = engine_tokens(engine, ids, 8)
        assert engine.fallback is None and engine.compile_seconds > 0
    with open_engine(model, 15) as engine:
        assert torch.equal(engine_tokens(engine, ids, 8), compiled)
        assert engine.compile_seconds is None


def test_without_a_compiler_the_text_is_made_eagerly_and_said_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("no working C++ compiler was found\nsecond line")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: refuse)
    model, tokenizer, said = make_model("llama"), byte_tokenizer(), []
    plain = continue_text(model, tokenizer, "a text", 6)
    assert continue_text(model, tokenizer, "a text", 6, compiled=True, say=said.append) == plain
    assert len(said) == 1 and "no working C++ compiler" in said[0]
    assert "second line" not in said[0]


def test_sampling_depends_on_its_seed_alone() -> None:
    model, tokenizer = make_model("llama"), byte_tokenizer()
    texts = [continue_text(model, tokenizer, "a text", 20, 3.0, seed) for seed in (0, 0, 1)]
    assert texts[0] == texts[1] != texts[2]


def test_text_ends_with_the_positions_of_the_model_and_says_so() -> None:
    model, tokenizer, said = make_model("llama"), byte_tokenizer(), []
    fits = continue_text(model, tokenizer, "a" * 60, 4, say=said.append)
    assert not said
    assert continue_text(model, tokenizer, "a" * 60, 9, say=said.append) == fits
    assert said == ["at most 4 new tokens instead of 9: the model has no more positions"]


def test_more_positions_than_the_model_has_are_refused() -> None:
    with (
        pytest.raises(ModelError, match="take 65 positions.*made for 64"),
        open_engine(make_model("llama"), 65),
    ):
        pass


def test_a_wrong_step_yields_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    step = Engine.step

    def wrong(self: Engine, token: Tensor) -> tuple[Tensor, Tensor]:
        token, logits = step(self, token)
        return token, logits * 1.01

    monkeypatch.setattr(Engine, "step", wrong)
    with pytest.raises(MeasurementError, match="logits differ"):
        race({"dense": make_model("llama")}, prompts(1, 5), 4, 1, compiled=False)


def test_runs_alternate_and_the_first_round_is_not_counted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    models = {"dense": make_model("llama"), "compressed": make_model("llama", seed=1)}
    order, prefill = [], Engine.prefill

    def noting(self: Engine, ids: Tensor) -> tuple[Tensor, Tensor]:
        order.append(next(name for name, model in models.items() if model is self.model))
        return prefill(self, ids)

    monkeypatch.setattr(Engine, "prefill", noting)
    racers = race(models, prompts(2, 5), 4, 3, compiled=False)
    assert order == ["dense", "compressed"] * 5  # the check, the warm-up, three rounds
    assert all(len(racer.decode.seconds) == 3 for racer in racers.values())


def test_bytes_and_multiplications_by_hand() -> None:
    # hidden 24, intermediate 40, 3 blocks, 4 heads of 6 of which 2 have keys, tied output layer.
    model = make_model("llama")
    block = 24 * 24 + 2 * 24 * 12 + 24 * 24 + 3 * 24 * 40
    found = decode_bytes(model, batch=2, context=10.5)
    assert found.linear_layers == 4 * 3 * block
    assert found.output_layer == 4 * 257 * 24
    assert found.embedding_rows == 4 * 2 * 24
    assert found.other_parameters == 4 * 7 * 24  # the norms
    assert found.cache == 2 * 10.5 * 3 * 2 * 12 * 4
    products = prefill_products(model, batch=2, tokens=5)
    assert products.linear_layers == 2 * 5 * 3 * block
    assert products.output_layer == 2 * 257 * 24
    assert products.attention == 2 * 3 * 4 * 2 * 6 * (5 + 4 + 3 + 2 + 1)


def test_structured_layers_count_what_their_spec_says() -> None:
    model = make_model("llama")
    spec = Blast(out_features=40, in_features=24, blocks=(2, 2), rank=3)
    before = decode_bytes(model, 1, 0), prefill_products(model, 1, 1)
    model.model.layers[0].mlp.up_proj = StructuredLinear(spec, bias=False)
    after = decode_bytes(model, 1, 0), prefill_products(model, 1, 1)
    fewer = 24 * 40 - (2 * 20 * 3 + 2 * 12 * 3 + 4 * 3)
    assert before[0].total - after[0].total == 4 * fewer
    assert before[1].total - after[1].total == fewer


def test_energy_counters_are_summed_and_may_go_round(tmp_path: Path) -> None:
    for name, counter in (("intel-rapl:0", 10), ("intel-rapl:1", 990), ("intel-rapl:0:0", 5)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text(f"{counter}\n")
        (tmp_path / name / "max_energy_range_uj").write_text("1000\n")
    meter = EnergyMeter(CPU, tmp_path)
    before = meter.read()
    (tmp_path / "intel-rapl:0" / "energy_uj").write_text("30\n")
    (tmp_path / "intel-rapl:1" / "energy_uj").write_text("15\n")
    assert meter.joules(before, meter.read()) == pytest.approx((20 + 25) / 1e6)


def test_no_energy_counter_is_said(tmp_path: Path) -> None:
    meter = EnergyMeter(CPU, tmp_path)
    assert meter.source is None and "no counter" in str(meter.reason)
    assert meter.joules(meter.read(), meter.read()) is None


def test_report_speeds_keep_their_form() -> None:
    ids = prompts(1, 64)  # as many as the model has positions
    found = compare_speed(make_model("llama"), make_model("llama", seed=1), ids, rounds=3)
    for phase, tokens in (("prefill", 64), ("decode", 16)):
        row = found[phase]
        assert row["tokens"] == tokens
        assert row["ratio"] == pytest.approx(row["compressed"] / row["dense"])
        assert 0.0 < row["least"] <= row["most"]


def test_bench_command_writes_figures_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, model = (make_folder(tmp_path / str(seed), seed=seed) for seed in (0, 1))
    # Another process would import torch once more for each model.
    monkeypatch.setattr(
        peak,
        "peak_bytes",
        lambda folder, shapes, new_tokens, device: peak.measure(
            {"folder": folder, "shapes": shapes, "new_tokens": new_tokens, "device": device}
        ),
    )
    monkeypatch.setattr("blastnn.evaluate.machine.READ_BYTES", 2**20)
    monkeypatch.setattr("blastnn.evaluate.machine.PRODUCT_SIZE", {"cpu": 96})
    output, picture = tmp_path / "bench.json", tmp_path / "bench.svg"
    asked = ["--batch", "1", "--batch", "3", "--prompt", "9", "--new-tokens", "4", "--rounds", "2"]
    files = ["--output", str(output), "--picture", str(picture), "--no-compile"]
    command = ["bench", str(model), "--against", str(dense), *asked, *files]
    ran = CliRunner().invoke(app, command)
    assert ran.exit_code == 0, ran.output
    report = json.loads(output.read_text())
    assert [(s["batch"], s["prompt"]) for s in report["settings"]] == [(1, 9), (3, 9)]
    for setting in report["settings"]:
        for phase in ("prefill", "decode"):
            found = setting[phase]
            assert found["speedup_allowed"] == 1.0  # two dense models of one shape
            assert found["share_of_allowed"] == pytest.approx(found["speedup"])
            times = [found[name]["seconds"]["median"] for name in ("dense", "compressed")]
            assert found["speedup"] == pytest.approx(times[0] / times[1])
            assert len(found["dense"]["seconds"]["runs"]) == 2
    drawn = ElementTree.fromstring(picture.read_text())
    assert len([e for e in drawn.iter() if e.get("class") in ("prefill", "decode")]) == 4
    assert "decode" in ran.output and "protocol" in ran.output


@pytest.mark.slow
def test_peak_memory_comes_from_another_process(tmp_path: Path) -> None:
    found = peak.peak_bytes(make_folder(tmp_path / "model"), [(1, 5)], 4, "cpu")
    assert len(found) == 1
    if peak.STATUS.exists():
        assert 2**26 < found[0]["resident"] < 2**32


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"prompts": (0,)}, {"rounds": 0}])
def test_impossible_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(MeasurementError, match=next(iter(wrong))):
        BenchOptions(**wrong)


def test_encoders_have_no_decoding_speed(tmp_path: Path) -> None:
    folder = str(make_folder(tmp_path / "bert", "bert"))
    with pytest.raises(ModelError, match="does not predict the next token"):
        bench(folder, folder, BenchOptions(batches=(1,), prompts=(4,), new_tokens=2))


def test_picture_escapes_names() -> None:
    side = {"tokens_per_second": 1.0}
    phase = {"dense": side, "compressed": side, "speedup": 1.5, "speedup_allowed": 1.6}
    setting = {"batch": 1, "prompt": 2, "prefill": phase, "decode": phase}
    machine = {"gpu": None, "processor": "a & b", "threads": 2}
    report = {"models": {"dense": "<d>", "compressed": "c"}, "machine": machine}
    drawn = draw({**report, "dtype": "float32", "settings": [setting]})
    words = [e.text for e in ElementTree.fromstring(drawn).iter() if e.text]
    assert "Speed of c beside <d>" in words
