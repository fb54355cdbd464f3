"""A real vLLM behind the contract, on this machine's CPU."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from configs.grammars.source import GrammarSource
from replicas.contract import (
    AdapterSpec,
    BlocksStored,
    Constraint,
    EngineError,
    RefusedError,
    TokenLogprob,
    cache_namespace,
    pack_tokens,
)
from replicas.kv_blocks import BlocksOptions, RouteBlocks
from routing.prefix import Namespace, block_hashes_after
from tests.replicas.vllm.conftest import NEEDED
from tests.replicas.vllm.vllm_kit import (
    FRANCE,
    MARKS,
    STORY,
    Driver,
    config,
    dies,
    eventually,
    tokenizer_of,
    tokens_of,
    watched_by,
)

pytestmark = [*MARKS, NEEDED]

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "n": {"enum": [1, 2]}},
    "required": ["city", "n"],
    "additionalProperties": False,
}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def driver(smollm2: Path) -> AsyncIterator[Driver]:
    from replicas.vllm.launch import Wanted
    from replicas.vllm_engine import VllmEngine

    driver = Driver(tokenizer_of(smollm2))
    driver.engine = VllmEngine(Wanted(smollm2, config(), "m"))
    driver.facts = await driver.engine.start(driver.take)
    try:
        yield driver
    finally:
        await driver.engine.close()


async def test_facts_are_what_vllm_found(driver: Driver) -> None:
    facts = driver.facts
    assert facts is not None
    assert (facts.engine, facts.dtype, facts.device, facts.vocab_size) == ("vllm", "float32", "cpu", 49152)
    assert (facts.max_model_len, facts.block_size, facts.max_num_seqs) == (1024, 32, 8)
    assert facts.self_check.startswith("passed: 16 tokens after 96")
    assert facts.structured and facts.prompt_logprobs and facts.events and not facts.exact_resume
    assert facts.num_blocks * facts.block_size > 2000


async def test_the_model_answers_and_ends_by_itself(driver: Driver) -> None:
    deltas = await driver.ask(FRANCE)
    assert driver.text_of(deltas) == "The capital of France is Paris."
    assert deltas[-1].finish_reason == "stop" and deltas[-1].stop_reason is None
    assert sum(delta.finish_reason is not None for delta in deltas) == 1


async def test_max_tokens_and_stop_tokens_end_an_answer(driver: Driver) -> None:
    cut = await driver.ask(FRANCE, max_tokens=3)
    assert (len(tokens_of(cut)), cut[-1].finish_reason) == (3, "length")
    third = tokens_of(cut)[2]
    stopped = await driver.ask(FRANCE, stop_token_ids=(third,))
    assert tokens_of(stopped) == tokens_of(cut)
    assert (stopped[-1].finish_reason, stopped[-1].stop_reason) == ("stop", third)


async def test_ends_of_sequence_are_passed_over_when_asked_to(driver: Driver) -> None:
    assert len(tokens_of(await driver.ask(FRANCE, ignore_eos=True, max_tokens=20))) == 20
    assert len(tokens_of(await driver.ask(FRANCE, min_tokens=12, max_tokens=20))) >= 12


async def test_a_seed_draws_the_same_again_and_another_something_else(driver: Driver) -> None:
    drawn = [
        tokens_of(await driver.ask(STORY, temperature=1.0, seed=seed, max_tokens=20, top_p=0.95, top_k=50, min_p=0.01))
        for seed in (7, 7, 8)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


async def test_penalties_and_bias_reach_vllm(driver: Driver) -> None:
    plain = tokens_of(await driver.ask(STORY, max_tokens=24))
    first = plain[0]
    assert tokens_of(await driver.ask(STORY, max_tokens=1, logit_bias={first: -100.0}))[0] != first
    assert tokens_of(await driver.ask(STORY, max_tokens=24, repetition_penalty=2.0)) != plain
    assert tokens_of(await driver.ask(STORY, max_tokens=24, presence_penalty=2.0, frequency_penalty=2.0)) != plain


async def test_logprobs_are_the_models_own_whoever_is_in_the_batch(driver: Driver) -> None:
    narrow, wide = driver.request(FRANCE, logprobs=1), driver.request(STORY, logprobs=5)
    driver.engine.submit(narrow)
    driver.engine.submit(wide)
    for request, num_top in ((narrow, 1), (wide, 5)):
        deltas = await driver.end_of(request.request_id)
        found = [logprob for delta in deltas for logprob in delta.logprobs or ()]
        assert [logprob.token_id for logprob in found] == list(tokens_of(deltas))
        assert all(len(logprob.top) == num_top for logprob in found)
        assert all(logprob.top[0][0] == logprob.token_id for logprob in found)  # greedy
        assert all(logprob.logprob == pytest.approx(logprob.top[0][1]) for logprob in found)
    alone = await driver.ask(FRANCE, logprobs=0)
    assert all(logprob.top == () for delta in alone for logprob in delta.logprobs or ())


async def test_prompts_are_scored_as_they_are_continued(driver: Driver) -> None:
    answer = await driver.ask(FRANCE, logprobs=0, max_tokens=6)
    prompt = driver.request(FRANCE).prompt
    whole = driver.request("", prompt=prompt + pack_tokens(tokens_of(answer)), prompt_logprobs=2, max_tokens=1)
    scored = (await driver.run(whole))[0].prompt_logprobs
    assert scored is not None and scored[0] is None and len(scored) == whole.num_prompt_tokens
    tail = [logprob for logprob in scored[-6:] if isinstance(logprob, TokenLogprob)]
    drawn = [logprob.logprob for delta in answer for logprob in delta.logprobs or ()]
    assert [logprob.logprob for logprob in tail] == pytest.approx(drawn, abs=1e-3)


async def test_a_prefix_is_found_again_and_told_of(driver: Driver) -> None:
    prompt = STORY * 5
    num_tokens = driver.request(prompt).num_prompt_tokens
    first = await driver.ask(prompt, max_tokens=1)
    again = await driver.ask(prompt, max_tokens=1)
    assert first[0].num_cached_tokens == 0
    assert again[0].num_cached_tokens == num_tokens // 32 * 32
    salted = await driver.ask(prompt, max_tokens=1, salt=b"somebody else")
    assert salted[0].num_cached_tokens == 0


async def test_kv_events_are_those_that_routing_looks_for(driver: Driver) -> None:
    driver.engine.kv_events()
    salt, prompt = b"\x07salt", "The lighthouse stood. " * 40
    request = driver.request(prompt, max_tokens=1, salt=salt)
    await driver.run(request)
    events: list[object] = []
    await eventually(lambda: events.extend(driver.engine.kv_events()) or events)
    stored = [event for event in events if isinstance(event, BlocksStored)]
    assert {event.namespace for event in stored} == {cache_namespace(None, salt)}
    blocks = RouteBlocks(BlocksOptions("m", 64, 10_000))
    blocks.apply(stored)
    whole = request.num_prompt_tokens // 64
    hashes = block_hashes_after(Namespace("m", None, salt).root(), request.prompt[: whole * 64 * 4], 64)
    assert set(hashes) <= blocks.held.keys()
    assert driver.engine.stats().kv_seq == stored[-1].seq + 1


async def test_an_abort_frees_the_blocks(driver: Driver) -> None:
    engine = driver.engine
    await eventually(lambda: engine.stats().num_running == 0)
    before = engine.stats().num_free_blocks
    request = driver.request(STORY * 8, max_tokens=500, ignore_eos=True)
    engine.submit(request)
    await eventually(lambda: len(tokens_of(driver.deltas[request.request_id])) > 3)
    assert engine.stats().num_free_blocks < before
    engine.abort(request.request_id)
    deltas = await driver.end_of(request.request_id)
    assert deltas[-1].finish_reason == "abort"
    await eventually(lambda: engine.stats().num_free_blocks == before, 10.0)  # to its end it would take longer
    num_deltas = len(deltas)
    await asyncio.sleep(0.3)
    assert len(driver.deltas[request.request_id]) == num_deltas
    engine.abort(request.request_id)  # finished: nothing happens


async def test_what_is_aborted_at_once_never_runs(driver: Driver) -> None:
    request = driver.request(STORY, max_tokens=200)
    driver.engine.submit(request)
    driver.engine.abort(request.request_id)
    assert [delta.finish_reason for delta in await driver.end_of(request.request_id)] == ["abort"]
    assert driver.text_of(await driver.ask(FRANCE)) == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("source", "holds"),
    [
        (GrammarSource(kind="json", text=json.dumps(SCHEMA)), lambda text: json.loads(text)["n"] in (1, 2)),
        (GrammarSource(kind="regex", text="(yes|no) [0-9]{3}"), lambda text: text[-3:].isdigit() and len(text) < 8),
        (GrammarSource(kind="choice", text='["red", "green"]'), lambda text: text in ("red", "green")),
        (GrammarSource(kind="grammar", text='root ::= "<" [a-z]+ ">"'), lambda text: text[0] == "<"),
        (
            GrammarSource(kind="regex", text="[0-9]{2}", preface='preface: "Hm. "'),
            lambda text: text.startswith("Hm. ") and text[4:].isdigit(),
        ),
    ],
    ids=["json", "regex", "choice", "grammar", "preface"],
)
async def test_answers_follow_grammars(driver: Driver, source: GrammarSource, holds) -> None:
    deltas = await driver.ask(FRANCE, max_tokens=60, constraint=Constraint(source=source))
    text = driver.text_of(deltas)
    assert deltas[-1].fault is None, deltas[-1].fault
    assert source.kind == "grammar" or deltas[-1].finish_reason == "stop"
    assert holds(text), text


async def test_a_broken_grammar_hurts_that_request_only(driver: Driver) -> None:
    other = driver.request(FRANCE)
    driver.engine.submit(other)
    with pytest.raises(RefusedError) as refused:
        await driver.ask(FRANCE, constraint=Constraint(source=GrammarSource(kind="regex", text="("), param="p"))
    assert (refused.value.fault.code, refused.value.fault.param) == ("invalid_grammar", "p")
    assert driver.text_of(await driver.end_of(other.request_id)) == "The capital of France is Paris."


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"prompt": b""}, "unsupported_parameter", "prompt"),
        ({"prompt": pack_tokens([1] * 1024)}, "context_length_exceeded", "prompt"),
        ({"prompt": pack_tokens([1, 60_000])}, "unsupported_parameter", "prompt"),
        ({"adapter": "a@1"}, "adapter_not_found", "model"),
        ({"logprobs": 21}, "unsupported_parameter", "logprobs"),
        ({"temperature": 2.5}, "unsupported_parameter", "temperature"),
        ({"logit_bias": {60_000: 1.0}}, "unsupported_parameter", "logit_bias"),
        ({"logit_bias": dict.fromkeys(range(1025), 1.0)}, "unsupported_parameter", "logit_bias"),
        ({"stop_token_ids": tuple(range(129))}, "unsupported_parameter", "stop_token_ids"),
        ({"produced": pack_tokens([5]), "temperature": 1.0}, "unsupported_parameter", "produced"),
    ],
)
async def test_what_cannot_run_is_refused_by_name(driver: Driver, more, code: str, param: str) -> None:
    with pytest.raises(RefusedError) as refused:
        driver.engine.submit(driver.request(FRANCE, **more))
    assert (refused.value.fault.code, refused.value.fault.param) == (code, param)


async def test_a_greedy_answer_goes_on_where_another_attempt_ended(driver: Driver) -> None:
    whole = await driver.ask(STORY, max_tokens=24, ignore_eos=True)
    produced = tokens_of(whole)[:9]
    rest = await driver.ask(STORY, max_tokens=24, ignore_eos=True, produced=pack_tokens(produced), attempt=2)
    assert produced + tokens_of(rest) == tokens_of(whole)
    assert {delta.attempt for delta in rest} == {2}


async def test_an_answer_that_was_complete_ends_at_once(driver: Driver) -> None:
    deltas = await driver.ask(STORY, max_tokens=4, produced=pack_tokens([1, 2, 3, 4]))
    assert [(delta.finish_reason, delta.token_ids) for delta in deltas] == [("length", ())]


async def test_a_bands_answer_comes_before_those_that_wait(driver: Driver) -> None:
    """Nine requests, eight places: of two that wait the one of the lower band is taken first."""
    running = [driver.request(STORY, max_tokens=40, ignore_eos=True) for _ in range(8)]
    for request in running:
        driver.engine.submit(request)
    await eventually(lambda: driver.engine.stats().num_running == 8)
    late = driver.request("later " * 9, max_tokens=1, priority=5)
    soon = driver.request("sooner " * 9, max_tokens=1, priority=-5)
    driver.engine.submit(late)
    driver.engine.submit(soon)
    assert driver.engine.stats().num_waiting == 2
    order: list[str] = []
    for request in (soon, late):
        driver.ended[request.request_id] = asyncio.Event()
    await asyncio.gather(*(driver.end_of(request.request_id) for request in (*running, late, soon)))
    for request_id in driver.deltas:  # in the order of their first deltas
        order.append(request_id)
    assert order.index(soon.request_id) < order.index(late.request_id)


async def test_load_is_vllms_own(driver: Driver) -> None:
    before = driver.engine.stats()
    await asyncio.gather(*(driver.ask(STORY, max_tokens=8, ignore_eos=True) for _ in range(4)))
    await eventually(lambda: driver.engine.stats().num_running == 0)
    after = driver.engine.stats()
    assert after.num_output_tokens - before.num_output_tokens == 4 * 8
    assert after.num_steps > before.num_steps
    assert after.num_prompt_tokens > before.num_prompt_tokens
    assert 0.0 < after.step_time_s < 5.0 and after.prefill_tokens_per_s > 1.0
    assert (after.num_waiting, after.num_waiting_tokens, after.waiting_sizes) == (0, 0, ())


async def test_loading_an_adapter_without_slots_says_so(driver: Driver) -> None:
    with pytest.raises(EngineError, match="no adapter slots"):
        await driver.engine.load_adapter(AdapterSpec(adapter_id="a@1", path="/nowhere"))


async def test_requests_in_one_step_come_in_one_call(driver: Driver) -> None:
    calls: list[int] = []
    take = driver.engine._sink
    driver.engine._sink = lambda deltas: (calls.append(len(deltas)), take(deltas))
    try:
        await asyncio.gather(*(driver.ask(STORY, max_tokens=12, ignore_eos=True) for _ in range(4)))
    finally:
        driver.engine._sink = take
    assert max(calls) == 4
    assert list(itertools.accumulate(calls))[-1] == 4 * 12


async def test_the_engine_core_watches_its_replica(driver: Driver) -> None:
    """With which it ends: test_child.py kills one."""
    core = next(p for p in driver.engine._launched.processes if "EngineC" in " ".join([p.name(), *p.cmdline()]))
    assert os.getpid() in watched_by(core.pid)


async def test_a_killed_engine_core_is_found_out(driver: Driver) -> None:
    """The last test of this file: it ends the engine of the others. Workers: test_death.py."""
    await dies(driver, "EngineCore", signal.SIGKILL, 5.0)
