"""What answers look like, whole and streamed, checked against OpenAI's published schemas."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

import pytest

from gateway.errors import ReplicaLostError
from replicas.contract import Fault, StepDelta, TokenLogprob
from tests.gateway.openai_schema import problems
from tests.gateway.scripted import Options, Step, serve, spoken
from tests.gateway.sse_reader import events

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HI = {"model": "sim", "messages": [{"role": "user", "content": "hi"}]}
PROMPT = {"model": "sim", "prompt": "abc"}
SPOKEN = "Hello wörld!"


async def ask(path: str, body: dict[str, Any], script: Any = spoken, options: Options | None = None) -> Any:
    served = serve(script, options)
    async with served.client() as client:
        answer = await client.post(path, json=body)
    return answer, served


async def test_chat_answer_is_what_openai_specifies() -> None:
    answer, _ = await ask(CHAT, HI)
    body = answer.json()
    assert problems(body, "CreateChatCompletionResponse") == []
    assert body["id"].startswith("chatcmpl-") and body["id"].endswith(answer.headers["x-request-id"])
    assert body["model"] == "sim" and body["created"] == 1_800_000_000
    assert body["choices"][0]["message"] == {"role": "assistant", "content": SPOKEN, "refusal": None}
    assert body["usage"] == {
        "prompt_tokens": 21,
        "completion_tokens": 13,
        "total_tokens": 34,
        "prompt_tokens_details": {"cached_tokens": 16},
    }


async def test_alias_is_answered_with_the_models_id() -> None:
    answer, served = await ask(CHAT, {**HI, "model": "org/sim-model"})
    assert answer.json()["model"] == "sim"
    assert served.dispatcher.jobs[0].model.id == "sim"


async def test_chat_logprobs_carry_bytes_alternatives_and_refusal() -> None:
    answer, _ = await ask(CHAT, {**HI, "logprobs": True, "top_logprobs": 2})
    assert problems(answer.json(), "CreateChatCompletionResponse") == []
    logprobs = answer.json()["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert bytes(b for entry in logprobs["content"] for b in entry["bytes"]).decode() == SPOKEN
    assert all(len(entry["top_logprobs"]) == 2 for entry in logprobs["content"])
    half = logprobs["content"][7]
    assert (half["token"], half["bytes"]) == ("\\xc3", [0xC3])


async def test_logprobs_without_alternatives_have_empty_lists() -> None:
    answer, served = await ask(CHAT, {**HI, "logprobs": True})
    assert served.dispatcher.jobs[0].sampling.logprobs == 0
    assert answer.json()["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []


async def test_an_impossible_token_has_openais_floor_for_a_logprob() -> None:
    def script(job: Any) -> Iterable[Step]:
        scored = (TokenLogprob(65, float("-inf"), ((66, float("-inf")),)),)
        yield StepDelta(job.request_id, token_ids=(65,), text="A", finish_reason="stop", logprobs=scored)

    answer, _ = await ask(CHAT, {**HI, "logprobs": True, "top_logprobs": 1}, script)
    entry = answer.json()["choices"][0]["logprobs"]["content"][0]
    assert entry["logprob"] == entry["top_logprobs"][0]["logprob"] == -9999.0


async def test_chat_stream_has_role_first_finish_last_then_done() -> None:
    answer, _ = await ask(CHAT, {**HI, "stream": True})
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    for chunk in chunks:
        assert problems(chunk, "CreateChatCompletionStreamResponse") == []
        assert "usage" not in chunk
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": "", "refusal": None}
    assert all("role" not in delta for delta in deltas[1:])
    assert "".join(delta.get("content", "") for delta in deltas) == SPOKEN
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert deltas[-1] == {}
    assert len({(chunk["id"], chunk["created"], chunk["model"]) for chunk in chunks}) == 1
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"


async def test_usage_comes_last_with_no_choices_and_is_null_before() -> None:
    answer, _ = await ask(CHAT, {**HI, "stream": True, "stream_options": {"include_usage": True}})
    *chunks, last, done = events(answer.text)
    assert done == "[DONE]"
    assert all(chunk["usage"] is None for chunk in chunks)
    assert last["choices"] == [] and last["usage"]["total_tokens"] == 34
    assert last["usage"]["prompt_tokens_details"] == {"cached_tokens": 16}
    assert problems(last, "CreateChatCompletionStreamResponse") == []


async def test_usage_can_be_told_with_every_chunk() -> None:
    def script(job: Any) -> Iterable[Step]:
        for step in spoken(job):
            yield step
            yield 0.001

    options = {"include_usage": True, "continuous_usage_stats": True}
    answer, _ = await ask(CHAT, {**HI, "stream": True, "stream_options": options}, script)
    *chunks, last, _ = events(answer.text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [3, 3, 5, 12, 13, 13]
    assert last["usage"]["completion_tokens"] == 13


async def test_streamed_logprobs_and_token_ids_are_those_of_the_whole_answer() -> None:
    fields = {**HI, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    whole = (await ask(CHAT, fields))[0].json()
    *chunks, _ = events((await ask(CHAT, {**fields, "stream": True}))[0].text)
    choices = [chunk["choices"][0] for chunk in chunks]
    content = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
    assert content == whole["choices"][0]["logprobs"]["content"]
    assert [t for choice in choices for t in choice.get("token_ids", [])] == whole["choices"][0]["token_ids"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert whole["choices"][0]["token_ids"] == list(SPOKEN.encode())


async def test_text_that_is_held_back_makes_no_event() -> None:
    def script(job: Any) -> Iterable[Step]:
        yield StepDelta(job.request_id, token_ids=(0xC3,), num_cached_tokens=0)
        yield StepDelta(job.request_id, token_ids=(0xA9,), text="é")
        yield StepDelta(job.request_id, finish_reason="length")

    answer, _ = await ask(CHAT, {**HI, "stream": True}, script)
    _role, text, finish, _ = events(answer.text)
    assert text["choices"][0]["delta"] == {"content": "é"}
    assert finish["choices"][0]["finish_reason"] == "length"


async def test_line_separators_in_text_do_not_break_events() -> None:
    words = ['a\u2028b\u2029c\u0085d\re\nf"g\\h\x1e\x00', "\U0001f600"]
    for path, body in ((CHAT, HI), (TEXT, PROMPT)):
        answer, _ = await ask(path, {**body, "stream": True}, lambda job: spoken(job, words))
        *chunks, _ = events(answer.text)
        choices = [chunk["choices"][0] for chunk in chunks]
        assert "".join(c.get("text", c.get("delta", {}).get("content", "")) for c in choices) == "".join(words)


async def test_choices_of_one_prompt_have_their_own_seeds_and_indexes() -> None:
    answer, served = await ask(CHAT, {**HI, "n": 3, "seed": -1}, lambda job: spoken(job, [job.request_id[-1]]))
    body = answer.json()
    assert [(c["index"], c["message"]["content"]) for c in body["choices"]] == [(0, "0"), (1, "1"), (2, "2")]
    assert [job.sampling.seed for job in served.dispatcher.jobs] == [2**63 - 1, 0, 1]
    assert body["usage"]["prompt_tokens"] == 21 and body["usage"]["completion_tokens"] == 3
    assert problems(body, "CreateChatCompletionResponse") == []


async def test_streams_of_several_choices_interleave_under_their_indexes() -> None:
    def script(job: Any) -> Iterable[Step]:
        for step in spoken(job, [f"{job.request_id[-1]}{i}" for i in range(3)]):
            yield 0.001
            yield step

    answer, _ = await ask(CHAT, {**HI, "n": 2, "stream": True}, script)
    *chunks, done = events(answer.text)
    assert done == "[DONE]"
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["delta"]["role"] == "assistant"
        assert "".join(c["delta"].get("content", "") for c in mine) == f"{index}0{index}1{index}2"
        assert mine[-1]["finish_reason"] == "stop"


async def test_a_choice_that_fails_before_anything_was_sent_fails_the_request_and_cancels_the_others() -> None:
    never = asyncio.Event()

    def script(job: Any) -> Iterable[Step]:
        yield ReplicaLostError("gone") if job.request_id.endswith("-1") else never

    answer, served = await ask(CHAT, {**HI, "n": 3, "stream": True}, script)
    assert (answer.status_code, answer.json()["error"]["code"]) == (502, "replica_lost")
    begun = {job.request_id for job in served.dispatcher.jobs}
    assert {job_id for job_id in begun if job_id[-1] != "1"} == set(served.dispatcher.cancelled) != set()
    assert len(served.ledger.records) == 1


@pytest.mark.parametrize(
    ("end", "code"),
    [
        (ReplicaLostError("the replica died"), "replica_lost"),
        (StepDelta("r", finish_reason="error", fault=Fault("engine_dead", "it died")), "replica_lost"),
        (StepDelta("r", finish_reason="abort"), "internal_error"),
        (RuntimeError("secret"), "internal_error"),
    ],
)
@pytest.mark.parametrize("pause", [0.0, 0.002])
async def test_a_stream_that_breaks_off_ends_with_an_error_and_without_done(end: Any, code: str, pause: float) -> None:
    def script(job: Any) -> Iterable[Step]:
        yield StepDelta(job.request_id, token_ids=(1,), text="Once")
        yield pause
        yield end

    answer, served = await ask(CHAT, {**HI, "stream": True}, script)
    assert answer.status_code == 200
    *_, text, error = events(answer.text)
    assert text["choices"][0]["delta"] == {"content": "Once"}
    assert error["error"]["code"] == code and set(error) == {"error"}
    assert "secret" not in answer.text
    (record,) = served.ledger.records
    assert (record.outcome, record.code, record.num_completion_tokens) == ("error", code, 1)


async def test_an_iterator_that_just_ends_is_never_taken_for_an_end() -> None:
    def script(job: Any) -> Iterable[Step]:
        yield StepDelta(job.request_id, token_ids=(1,), text="Once")

    streamed, _ = await ask(CHAT, {**HI, "stream": True}, script)
    assert events(streamed.text)[-1]["error"]["code"] == "internal_error"
    whole, _ = await ask(CHAT, HI, script)
    assert whole.status_code == 500


async def test_completion_answer_is_what_openai_specifies() -> None:
    answer, _ = await ask(TEXT, PROMPT)
    body = answer.json()
    assert problems(body, "CreateCompletionResponse") == []
    assert body["id"].startswith("cmpl-") and body["object"] == "text_completion"
    assert body["choices"] == [{"index": 0, "text": SPOKEN, "logprobs": None, "finish_reason": "stop"}]


async def test_prompts_come_as_text_lists_ids_and_lists_of_ids() -> None:
    for prompt, expected in [
        ("ab", [b"a\0\0\0b\0\0\0"]),
        (["a", "b"], [b"a\0\0\0", b"b\0\0\0"]),
        ([97, 98], [b"a\0\0\0b\0\0\0"]),
        ([[97], [98, 99]], [b"a\0\0\0", b"b\0\0\0c\0\0\0"]),
    ]:
        answer, served = await ask(TEXT, {"model": "sim", "prompt": prompt, "n": 2})
        assert [job.prompt for job in served.dispatcher.jobs] == [p for p in expected for _ in range(2)]
        assert [choice["index"] for choice in answer.json()["choices"]] == list(range(2 * len(expected)))


async def test_echo_with_logprobs_scores_the_prompt_as_lm_eval_reads_it() -> None:
    body = {
        "model": "sim",
        "prompt": [[104, 105, 33], [98, 99]],
        "max_tokens": 1,
        "echo": True,
        "logprobs": 1,
        "seed": 1,
    }
    answer, served = await ask(TEXT, body, lambda job: spoken(job, ["!"], "length"))
    first, second = answer.json()["choices"]
    assert (first["text"], second["text"]) == ("hi!!", "bc!")
    logprobs = first["logprobs"]
    assert logprobs["tokens"] == ["h", "i", "!", "!"]
    assert logprobs["token_logprobs"] == [None, -0.5, -0.5, -0.5]
    assert logprobs["top_logprobs"] == [None, {"i": -0.5}, {"!": -0.5}, {"!": -0.5}]
    assert logprobs["text_offset"] == [0, 1, 2, 3]
    assert served.dispatcher.jobs[0].sampling.prompt_logprobs == 1
    assert served.dispatcher.jobs[0].sampling.max_tokens == 1


async def test_offsets_count_characters_across_halves_and_echo() -> None:
    answer, _ = await ask(TEXT, {"model": "sim", "prompt": "é1", "echo": True, "logprobs": 0})
    choice = answer.json()["choices"][0]
    assert choice["text"] == "é1" + SPOKEN
    logprobs = choice["logprobs"]
    assert logprobs["tokens"][:3] == ["bytes:\\xc3", "bytes:\\xa9", "1"]
    whole = [(t, o) for t, o in zip(logprobs["tokens"], logprobs["text_offset"], strict=True) if "bytes:" not in t]
    assert all(choice["text"][offset] == token for token, offset in whole)
    assert logprobs["text_offset"][:3] == [0, 0, 1]


async def test_streamed_echo_begins_with_the_prompt_and_equals_the_whole_answer() -> None:
    fields = {**PROMPT, "echo": True, "logprobs": 2, "return_token_ids": True, "n": 2}
    whole = (await ask(TEXT, fields))[0].json()
    *chunks, done = events((await ask(TEXT, {**fields, "stream": True}))[0].text)
    assert done == "[DONE]"
    for index in (0, 1):
        mine = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert mine[0]["text"] == "abc"
        assert "".join(c["text"] for c in mine) == whole["choices"][index]["text"]
        for name, values in whole["choices"][index]["logprobs"].items():
            assert [v for c in mine if c["logprobs"] for v in c["logprobs"][name]] == values
        assert mine[-1] == {"index": index, "text": "", "logprobs": None, "finish_reason": "stop"}


async def test_best_of_returns_the_likeliest_per_token_and_counts_all() -> None:
    def script(job: Any) -> Iterable[Step]:
        number = int(job.request_id[-1])
        logprob = {0: -3.0, 1: -0.1, 2: -1.0}[number]
        scored = (TokenLogprob(65, logprob),)
        yield StepDelta(job.request_id, token_ids=(65,), text=str(number), finish_reason="stop", logprobs=scored)

    answer, _ = await ask(TEXT, {**PROMPT, "n": 2, "best_of": 3}, script)
    body = answer.json()
    assert [choice["text"] for choice in body["choices"]] == ["1", "2"]
    assert [choice["index"] for choice in body["choices"]] == [0, 1]
    assert body["usage"]["completion_tokens"] == 3
    assert body["choices"][0]["logprobs"] is None


async def test_every_sampling_field_reaches_the_engine() -> None:
    fields = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "max_tokens": 9, "min_tokens": 2, "stop": "END",
        "stop_token_ids": [5], "ignore_eos": True, "seed": 11, "presence_penalty": 0.1, "frequency_penalty": -0.2,
        "repetition_penalty": 1.1, "logit_bias": {"5": -100}, "include_stop_str_in_output": True,
        "skip_special_tokens": False,
    }  # fmt: skip
    _, served = await ask(CHAT, {**HI, **fields})
    sampling = served.dispatcher.jobs[0].sampling
    fields |= {"stop": ("END",), "stop_token_ids": (5,), "logit_bias": {5: -100.0}}
    assert {name: getattr(sampling, name) for name in fields} == fields


async def test_defaults_are_openais_and_the_cap_is_the_profiles_or_what_fits() -> None:
    _, served = await ask(CHAT, HI)
    sampling = served.dispatcher.jobs[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k, sampling.max_tokens) == (1.0, 1.0, None, 100)
    _, served = await ask(TEXT, {"model": "sim", "prompt": [7] * 500})
    assert served.dispatcher.jobs[0].sampling.max_tokens == 12
    _, served = await ask(CHAT, {**HI, "max_completion_tokens": 5})
    assert served.dispatcher.jobs[0].sampling.max_tokens == 5


async def test_text_parts_names_and_developer_reach_the_template() -> None:
    messages = [
        {"role": "developer", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": "bob"},
    ]
    answer, served = await ask("/tokenize", {"model": "sim", "messages": messages})
    text = served.gateway.prompters["sim"].tokenizer.decode(answer.json()["tokens"], skip_special_tokens=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\na\nb<|im_end|>\n<|im_start|>assistant\n"
    )


async def test_cache_salt_narrows_the_tenants_salt() -> None:
    served = serve()
    async with served.client() as client:
        for salt in ("x", "x", "y", None):
            await client.post(CHAT, json={**HI, "cache_salt": salt})
    x, again, y, plain = (job.salt for job in served.dispatcher.jobs)
    assert x == again and len({x, y, plain}) == 3


async def test_concurrent_answers_never_mix() -> None:
    def script(job: Any) -> Iterable[Step]:
        for step in spoken(job, [f"<{job.prompt.hex()}>"] * 5):
            yield 0.0005
            yield step

    served = serve(script)
    async with served.client() as client:
        bodies = [{"model": "sim", "prompt": [i, i + 1], "stream": i % 2 == 0} for i in range(40)]
        answers = await asyncio.gather(*(client.post(TEXT, json=body) for body in bodies))
    for body, answer in zip(bodies, answers, strict=True):
        ids = body["prompt"]
        expected = f"<{ids[0]:02x}000000{ids[1]:02x}000000>" * 5
        if body["stream"]:
            text = "".join(c["choices"][0]["text"] for c in events(answer.text)[:-1])
        else:
            text = answer.json()["choices"][0]["text"]
        assert text == expected
