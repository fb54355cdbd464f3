"""The sim engine: its text depends on the whole context, its clock on the configuration, and on torch nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.contract import EngineError, SamplingParams
from replicas.local import LocalEngine
from replicas.sim_engine import SimOptions, build_sim, sim_engine
from replicas.sim_model import SimModel, next_state, root_state
from tests.replicas.engine_kit import EOS, LETTERS, VOCAB_SIZE, adapter, engine_config, make_kit, make_request

MODEL = SimModel(VOCAB_SIZE, (EOS,), LETTERS)
GREEDY = SamplingParams(max_tokens=10, seed=1, temperature=0.0)


def test_the_sim_engine_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, replicas.sim_engine, replicas.detokenize, replicas.local, replicas.engine.loop\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'numpy', 'redis') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@given(st.lists(st.integers(0, 258), min_size=1, max_size=60), st.data())
@settings(max_examples=100, deadline=None)
def test_any_changed_token_of_the_context_changes_the_state(context: list[int], data: st.DataObject) -> None:
    index = data.draw(st.integers(0, len(context) - 1))
    other = data.draw(st.integers(0, 258).filter(lambda token_id: token_id != context[index]))

    def state(tokens: list[int]) -> int:
        value = root_state(None)
        for token_id in tokens:
            value = next_state(value, token_id)
        return value

    changed = [*context[:index], other, *context[index + 1 :]]
    assert len({state(context), state(changed), state(context[:index] + context[index + 1 :])}) == 3


@given(
    prompt=st.lists(st.integers(0, 258), min_size=1, max_size=70),
    budget=st.integers(2, 40),
    block_size=st.integers(1, 9),
    temperature=st.sampled_from([0.0, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_chunks_and_blocks_of_any_size_give_the_naive_answer(
    prompt: list[int], budget: int, block_size: int, temperature: float
) -> None:
    kit = make_kit(block_size=block_size, num_blocks=200, max_num_batched_tokens=budget)
    for name in ("cold", "warm"):
        request = make_request(name, prompt, max_tokens=12, temperature=temperature)
        kit.add(request)
        kit.run()
        assert kit.tokens(name) == kit.expected(request)


def test_greedy_ignores_the_seed_and_sampling_follows_it() -> None:
    greedy = {tuple(MODEL.generate([1, 2], SamplingParams(max_tokens=20, seed=s, temperature=0.0))) for s in range(5)}
    drawn = {tuple(MODEL.generate([1, 2], SamplingParams(max_tokens=20, seed=s))) for s in range(5)}
    assert len(greedy) == 1 and len(drawn) == 5


def test_tokens_come_from_the_alphabet_and_end_of_sequence_only_by_rule() -> None:
    tokens = MODEL.generate([5], SamplingParams(max_tokens=500, seed=1))
    assert len(tokens) == 500 and set(tokens) <= set(LETTERS) and len(set(tokens)) == len(LETTERS)


def test_answers_end_by_themselves_after_the_mean_number_of_tokens() -> None:
    model = SimModel(VOCAB_SIZE, (EOS,), LETTERS, mean_output_tokens=8)
    for temperature in (0.0, 1.0):
        sampling = SamplingParams(max_tokens=200, seed=3, temperature=temperature)
        lengths = [len(model.generate([i], sampling)) for i in range(250)]
        assert 6.5 < sum(lengths) / len(lengths) < 9.5
    minimal = SamplingParams(max_tokens=200, seed=3, min_tokens=10)
    assert min(len(model.generate([i], minimal)) for i in range(100)) > 10


def test_logprobs_are_a_distribution_and_sampling_follows_it() -> None:
    state = root_state("x")
    every = [MODEL.logprob(state, token_id, 20) for token_id in range(VOCAB_SIZE)]
    assert math.isclose(sum(math.exp(one.logprob) for one in every), 1.0)
    top = every[0].top
    assert len(top) == 20 and [p for _, p in top] == sorted((p for _, p in top), reverse=True)
    assert all(math.isclose(every[token_id].logprob, logprob) for token_id, logprob in top)
    drawn = Counter(MODEL.sample(state, SamplingParams(max_tokens=1, seed=s), 0).token_id for s in range(4000))
    for token_id, logprob in top[:4]:
        assert drawn[token_id] / 4000 == pytest.approx(math.exp(logprob), abs=0.03)
    assert MODEL.sample(state, GREEDY, 0).token_id == top[0][0]


def test_sampled_tokens_carry_the_logprobs_asked_for() -> None:
    kit = make_kit()
    kit.add(make_request("none", range(5)))
    kit.add(make_request("zero", range(5), logprobs=0))
    kit.add(make_request("three", range(5), logprobs=3, temperature=1.0))
    kit.run()
    assert all(delta.logprobs is None for delta in kit.deltas["none"])
    for name, count in (("zero", 0), ("three", 3)):
        for delta in kit.deltas[name]:
            (logprob,) = delta.logprobs or ()
            assert logprob.token_id == delta.token_ids[0] and logprob.logprob < 0 and len(logprob.top) == count


def test_steps_take_the_configured_time() -> None:
    kit = make_kit(step_base_s=0.01, step_per_sequence_s=0.001, prefill_tokens_per_s=100.0, max_num_batched_tokens=64)
    kit.add(make_request("a", range(20), max_tokens=3))
    kit.add(make_request("b", range(50, 60), max_tokens=3))
    times = []
    while kit.core.has_work:
        before = kit.clock.now
        kit.step()
        times.append(kit.clock.now - before)
    assert times == pytest.approx([0.01 + 0.002 + 0.3, 0.012, 0.012])


def test_adapters_speak_differently_and_reading_one_takes_time_by_its_rank() -> None:
    kit = make_kit(max_adapters=2, adapter_load_s=0.5, step_base_s=0.0)
    for name, rank in (("x@1", 8), ("y@1", 16)):
        before = kit.clock.now
        kit.core.load_adapter(adapter(name, rank))
        assert kit.clock.now - before == pytest.approx(0.5 * rank / 8)
    answers = {}
    for i, name in enumerate(["y@1", "x@1", None]):
        request = make_request(f"r{i}", range(5), adapter=name)
        kit.add(request)
        kit.run()
        assert kit.tokens(f"r{i}") == kit.expected(request)
        answers[name] = tuple(kit.tokens(f"r{i}"))
    assert len(set(answers.values())) == 3
    assert kit.core.stats().adapters == ("y@1", "x@1"), "x was used last"


def test_an_adapter_that_does_not_fit_is_refused_and_harms_nobody() -> None:
    kit = make_kit(max_adapters=1, adapter_load_s=0.0, max_adapter_rank=16)
    with pytest.raises(EngineError, match="rank 32 of big@1 is beyond 16"):
        kit.core.load_adapter(adapter("big@1", 32))
    kit.core.load_adapter(adapter("x@1"))
    with pytest.raises(EngineError, match="no slot is free for y@1"):
        kit.core.load_adapter(adapter("y@1"))
    kit.core.unload_adapter("x@1")
    kit.core.load_adapter(adapter("y@1"))
    assert kit.core.stats().adapters == ("y@1",)


def test_the_facts_are_what_the_scheduler_and_pool_found() -> None:
    config = engine_config(num_blocks=10, block_size=16, max_model_len=4096, order="deadline")
    facts = build_sim(config, MODEL, "m", SimOptions(LETTERS)).facts
    assert (facts.max_model_len, facts.kv_tokens, facts.prefill_order) == (160, 160, "deadline")
    assert facts.exact_resume and facts.events and facts.prompt_logprobs and facts.eos_token_ids == (EOS,)


def test_an_alphabet_outside_the_vocabulary_is_an_error() -> None:
    with pytest.raises(ValueError, match="vocab_size=50"):
        sim_engine(engine_config(), 50, (1,), "m")
    with pytest.raises(ValueError, match="end-of-sequence"):
        SimModel(10, (), (1, 2), mean_output_tokens=4)


async def test_by_default_the_text_is_printable_ascii() -> None:
    config = engine_config(step_base_s=0.0, step_per_sequence_s=0.0, mean_output_tokens=40)
    async with LocalEngine(sim_engine(config, VOCAB_SIZE, (EOS,), "m")) as local:
        deltas = await local.generate(make_request("a", b"Hello", max_tokens=100, temperature=1.0))
    ids = [token_id for delta in deltas for token_id in delta.token_ids]
    if deltas[-1].finish_reason == "stop":
        assert ids.pop() == EOS
    assert bytes(ids).decode("ascii").isprintable()
