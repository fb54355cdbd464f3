"""What vLLM's engine core says, as deltas; its structs stood in for by plain ones of the same shape."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from configs.grammars.source import GrammarSource
from replicas.contract import Constraint, GenerateRequest, SamplingParams, TokenLogprob, pack_tokens
from replicas.vllm.deltas import OpenRequest
from replicas.vllm.line import Line, num_to_compute


def request(**more: Any) -> GenerateRequest:
    own = {name: more.pop(name) for name in list(more) if name in GenerateRequest.__struct_fields__}
    sampling = SamplingParams(**{"max_tokens": 9, "seed": 0} | more)
    return GenerateRequest(**{"request_id": "r", "prompt": pack_tokens([1, 2, 3]), "sampling": sampling} | own)


def output(*token_ids: int, **more: Any) -> Any:
    plain = {"new_logprobs": None, "new_prompt_logprobs_tensors": None, "finish_reason": None, "stop_reason": None,
             "prefill_stats": None}  # fmt: skip
    return SimpleNamespace(new_token_ids=list(token_ids), **plain | more)


def logprobs(*rows: list[float]) -> Any:
    values = np.array(rows)
    ids = np.arange(values.size).reshape(values.shape)
    return SimpleNamespace(logprob_token_ids=ids, logprobs=values)


def test_the_first_delta_tells_what_was_cached_and_never_more_than_the_prompt() -> None:
    entry = OpenRequest(request(), frozenset())
    first = entry.delta(output(7, prefill_stats=SimpleNamespace(num_cached_tokens=5)))
    assert (first.token_ids, first.num_cached_tokens) == ((7,), 3)
    assert entry.delta(output(8)).num_cached_tokens is None


def test_logprobs_are_cut_to_what_was_asked_for() -> None:
    wide = logprobs([-1.0, -1.0, -2.0, -3.0])
    assert OpenRequest(request(logprobs=1), frozenset()).delta(output(0, new_logprobs=wide)).logprobs == (
        TokenLogprob(0, -1.0, ((1, -1.0),)),
    )
    assert OpenRequest(request(logprobs=0), frozenset()).delta(output(0, new_logprobs=wide)).logprobs == (
        TokenLogprob(0, -1.0),
    )
    assert OpenRequest(request(), frozenset()).delta(output(0, new_logprobs=wide)).logprobs is None


def test_the_first_token_of_a_prompt_has_no_logprob() -> None:
    tensors = logprobs([-1.0, -0.5], [-2.0, -0.1])
    delta = OpenRequest(request(prompt_logprobs=1), frozenset()).delta(output(4, new_prompt_logprobs_tensors=tensors))
    assert delta.prompt_logprobs == (None, TokenLogprob(0, -1.0, ((1, -0.5),)), TokenLogprob(2, -2.0, ((3, -0.1),)))


@pytest.mark.parametrize(
    ("reason", "stop", "expected"),
    [("stop", None, ("stop", None)), ("stop", 2, ("stop", None)), ("stop", 5, ("stop", 5)),
     ("length", None, ("length", None)), ("repetition", None, ("stop", None))],
)  # fmt: skip
def test_ends_of_sequence_are_no_stop_reason(reason: str, stop: int | None, expected: tuple[str, int | None]) -> None:
    delta = OpenRequest(request(), frozenset({2})).delta(output(9, finish_reason=reason, stop_reason=stop))
    assert (delta.finish_reason, delta.stop_reason) == expected


def test_an_error_is_told_in_vllms_words_where_it_has_any() -> None:
    def fault(tokens: tuple[int, ...], **more: Any) -> tuple[str, str, bool, str | None]:
        constraint = more.pop("constraint", None)
        entry = OpenRequest(request(constraint=constraint), frozenset())
        found = entry.delta(output(*tokens, finish_reason="error", **more)).fault
        assert found is not None
        return (found.code, found.message, found.retryable, found.param)

    grammar = Constraint(source=GrammarSource(kind="regex", text="a"), param="p")
    said = SimpleNamespace(message="because")
    assert fault(())[0::2] == ("internal", True)
    assert fault((), error=said)[1] == "because"
    assert fault((), constraint=grammar, error=None)[0] == "invalid_grammar"
    assert fault((1,), constraint=grammar, error=said) == ("grammar_too_complex", "because", False, "p")


def test_short_prompts_and_lower_bands_come_first_and_ties_go_by_the_fair_tag() -> None:
    line = Line("shortest")
    place = {size: line.place(request(num_uncached=size, prompt=pack_tokens([1] * 900)), 100.0, 1000.0)
             for size in (10, 800)}  # fmt: skip
    assert place[10][0] < place[800][0]
    assert Line("priority").place(request(priority=-1), 0.0, 0.0) < Line("priority").place(
        request(priority=1), 0.0, 0.0
    )
    assert Line("fair").place(request(fair_tag=3.5), 7.0, 0.0) == (0, 3.5)
    first, second = (Line("fcfs").place(request(), now, 0.0) for now in (12.0, 12.5))
    assert first < second


def test_what_is_to_compute_is_what_no_cache_holds() -> None:
    assert num_to_compute(request()) == 3
    assert num_to_compute(request(num_uncached=1, produced=pack_tokens([4, 5]))) == 3
    assert num_to_compute(request(num_uncached=50)) == 3
