"""Many sequences in one row: log-likelihoods as each would have alone, or a reason why not."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import PreTrainedModel

from blastnn.errors import ModelError
from blastnn.evaluate import packed as module
from blastnn.evaluate.packed import Request, alone, obstacle, packed
from tests.made_up import FAMILIES, make_model

CAUSAL = [
    name for name, (kind, *_) in FAMILIES.items() if kind.endswith(("CausalLM", "LMHeadModel"))
]


def made_up_requests(contexts: int = 9) -> Iterator[Request]:
    """Contexts of 1 to 30 tokens, each with one to four continuations of 1 to 7 tokens."""
    generator = torch.Generator().manual_seed(0)

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(0, 256, (length,), generator=generator).tolist())

    for index in range(contexts):
        context = ids(1, 31)
        for _ in range(1 + index % 4):
            yield Request(context, ids(1, 8))


@torch.no_grad()
def by_loss(model: PreTrainedModel, request: Request) -> float:
    """The log-likelihood by transformers' own loss, which is the mean over the continuation."""
    ids = torch.tensor([request.context + request.continuation])
    labels = ids.clone()
    labels[:, : len(request.context)] = -100
    return -float(model(input_ids=ids, labels=labels).loss) * len(request.continuation)


@pytest.mark.parametrize(
    ("family", "row"), [("llama", 20), ("llama", 4096), *((name, 48) for name in CAUSAL)]
)
def test_as_each_sequence_alone(family: str, row: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "ROW", row)
    model, requests, told = make_model(family), list(made_up_requests()), []
    assert obstacle(model, requests) is None
    expected = [by_loss(model, request) for request in requests]
    for way in (packed, alone):
        answers = way(model, requests, told.append)
        assert [value for value, _ in answers] == pytest.approx(expected, rel=1e-5, abs=1e-4)
        assert told == sorted(told) and told.pop() == len(requests)
        told.clear()


def test_greedy_is_what_the_model_would_say() -> None:
    model, context = make_model("llama"), (3, 1, 4, 1, 5)
    said = model.generate(
        torch.tensor([context]), do_sample=False, max_new_tokens=4, pad_token_id=0, eos_token_id=-1
    )
    likeliest = tuple(said[0, len(context) :].tolist())
    other = (*likeliest[:-1], (likeliest[-1] + 1) % 256)
    requests = [Request(context, likeliest), Request(context, other)]
    for way in (packed, alone):
        assert [greedy for _, greedy in way(model, requests, id)] == [True, False]


def test_too_long_a_request_loses_its_start() -> None:
    request = Request((1, 2, 3, 4), (5, 6))
    assert request.clipped(5) is request
    assert request.clipped(4) == Request((2, 3, 4), (5, 6))


def test_a_window_of_attention_is_found_out() -> None:
    model = make_model("mistral", sliding_window=4)
    reason = obstacle(model, list(made_up_requests()))
    assert reason is not None and "differ by" in reason


def test_a_model_without_the_arguments_is_named() -> None:
    assert obstacle(make_model("bert"), []) == "BertModel takes no logits_to_keep"


def test_a_non_finite_logit_is_refused() -> None:
    model = make_model("llama")
    model.model.norm.weight.data[0] = float("nan")
    for way in (packed, alone):
        with pytest.raises(ModelError, match="non-finite"):
            way(model, list(made_up_requests(2)), id)
