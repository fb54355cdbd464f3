"""The step, the learnt rates, and the thread around them: start, hand-over, abort, drain, close, death, stall."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Sequence
from typing import cast

import msgspec
import pytest

from replicas.contract import (
    EngineDeadError,
    EngineError,
    EngineFacts,
    RefusedError,
    StepDelta,
    pack_tokens,
)
from replicas.engine import loop as engine_loop
from replicas.engine.core import EngineCore
from replicas.engine.limits import refusal
from replicas.engine.loop import BuiltEngine, ThreadedEngine
from replicas.engine.rates import Rates
from replicas.engine.sequence import Plan, PlanItem, StepResult
from replicas.engine.sequence import Sequence as EngineSequence
from replicas.engine.structured.grammar import Grammar
from replicas.engine.thread import Abort, Constrained, EngineThread
from replicas.local import LocalEngine
from replicas.sim_engine import SimOptions, build_sim
from replicas.sim_model import SimModel
from tests.replicas.engine_kit import EOS, LETTERS, VOCAB_SIZE, adapter, engine_config, make_kit, make_request

MODEL = SimModel(VOCAB_SIZE, (EOS,), LETTERS)
FACTS = EngineFacts(
    engine="t", model="m", vocab_size=100, max_model_len=50, block_size=4, num_blocks=32, max_num_seqs=4,
    max_num_batched_tokens=16,
)  # fmt: skip


class Gate:
    """A runner that waits before each step until it is let through, or fails."""

    def __init__(self, core: EngineCore) -> None:
        self.inner = core.runner
        self.open = threading.Event()
        self.entered = threading.Event()
        self.failure: Exception | None = None
        self.num_steps = 0

    def execute(self, plan: Plan) -> StepResult:
        self.entered.set()
        assert self.open.wait(10)
        if self.failure is not None:
            raise self.failure
        self.num_steps += 1
        return self.inner.execute(plan)


def threaded(clock: Callable[[], float] = time.monotonic, **changes: object) -> tuple[ThreadedEngine, list[Gate]]:
    """An engine whose steps take no time, and a list that will hold its gate (open)."""
    gates: list[Gate] = []

    def build() -> BuiltEngine:
        config = engine_config(step_base_s=0.0, step_per_sequence_s=0.0, prefill_tokens_per_s=1e12, **changes)
        built = build_sim(config, MODEL, "sim", SimOptions(LETTERS, time.monotonic, lambda _: None))
        gates.append(Gate(built.core))
        gates[0].open.set()
        built.core.runner = gates[0]
        return built

    return ThreadedEngine(build, clock), gates


async def entered(gate: Gate) -> None:
    assert await asyncio.to_thread(gate.entered.wait, 20)


def test_the_prefill_rate_counts_chunks_by_their_size() -> None:
    rates = Rates()
    seq = EngineSequence.from_request(make_request("a", range(100)), 0.0)
    assert rates.prefill_tokens_per_s == 0.0 and rates.predict(512) == 0.0
    for _ in range(50):
        rates.observe(Plan((PlanItem(seq, 0, 500, False),)), 0.5)
        rates.observe(Plan((PlanItem(seq, 0, 2, True),)), 0.003)
    assert rates.prefill_tokens_per_s == pytest.approx(1000, rel=0.02)


def test_the_step_time_is_that_of_decodes_alone() -> None:
    rates = Rates()
    seq = EngineSequence.from_request(make_request("a", range(100)), 0.0)
    decode, chunk = PlanItem(seq, 99, 1, True), PlanItem(seq, 0, 100, False)
    for _ in range(60):
        rates.observe(Plan((decode, decode)), 0.02)
        rates.observe(Plan((decode, chunk)), 0.12)
    assert rates.step_time_s == pytest.approx(0.02)
    assert rates.prefill_tokens_per_s == pytest.approx(1000, rel=0.01), "the decode's part of a mixed step is taken off"
    assert rates.predict(500) == pytest.approx(0.52, rel=0.01)


def test_the_core_learns_its_rates_on_its_own_clock() -> None:
    kit = make_kit(step_base_s=0.02, step_per_sequence_s=0.0, prefill_tokens_per_s=200.0, num_blocks=128)
    kit.add(make_request("a", range(200), max_tokens=40))
    kit.run()
    stats = kit.core.stats()
    assert stats.step_time_s == pytest.approx(0.02)
    assert stats.prefill_tokens_per_s == pytest.approx(160, rel=0.1), "16 tokens take 0.08 + 0.02 s"
    assert (stats.num_prompt_tokens, stats.num_output_tokens, stats.num_running) == (200, 40, 0)
    assert stats.num_steps == len(kit.runner.plans) == 13 + 39


def test_waiting_tokens_are_those_still_to_be_computed() -> None:
    kit = make_kit(max_num_seqs=1)
    kit.add(make_request("a", range(40)))
    kit.add(make_request("b", range(30)))
    assert kit.core.stats().num_waiting_tokens == 70
    kit.step()
    assert kit.core.stats().num_waiting_tokens == 54
    assert (kit.core.stats().num_running, kit.core.stats().num_waiting) == (1, 1)


def test_a_failing_runner_ends_every_open_request_and_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    kit = make_kit(max_num_seqs=1)
    for name in "ab":
        kit.core.add(make_request(name, range(5)))

    class Broken:
        def execute(self, plan: Plan) -> StepResult:
            raise ZeroDivisionError("no kernel")

    kit.core.runner = Broken()
    deltas = kit.core.step()
    assert sorted(delta.request_id for delta in deltas) == ["a", "b"]
    assert all(delta.fault and delta.fault.code == "engine_dead" and delta.fault.retryable for delta in deltas)
    assert kit.core.dead is not None and "no kernel" in kit.core.dead.message
    assert not kit.core.has_work and kit.core.scheduler.pool.num_used == 0
    assert "engine step failed" in caplog.text


@pytest.mark.parametrize(
    ("changes", "code", "param"),
    [
        ({"prompt": b""}, "unsupported_parameter", "prompt"),
        ({"prompt": b"abc"}, "unsupported_parameter", "prompt"),
        ({"prompt": pack_tokens([1] * 50)}, "context_length_exceeded", "prompt"),
        ({"prompt": pack_tokens([1] * 49), "produced": pack_tokens([1, 2])}, "context_length_exceeded", "prompt"),
        ({"produced": pack_tokens([1])}, "unsupported_parameter", "produced"),
        ({"adapter": "x@1"}, "adapter_not_found", "model"),
        ({"logprobs": 21}, "unsupported_parameter", "logprobs"),
        ({"prompt_logprobs": 0}, "unsupported_parameter", "prompt_logprobs"),
        ({"logit_bias": {100: 1.0}}, "unsupported_parameter", "logit_bias"),
        ({"stop_token_ids": (5, 100)}, "unsupported_parameter", "stop_token_ids"),
    ],
)
def test_what_the_facts_rule_out_is_refused_before_acceptance(changes: dict, code: str, param: str) -> None:  # type: ignore[type-arg]
    packed = changes.pop("prompt", None)
    request = make_request("a", [1, 2, 3], **changes)
    if packed is not None:
        request = msgspec.structs.replace(request, prompt=packed)
    fault = refusal(request, FACTS)
    assert fault is not None and (fault.code, fault.param) == (code, param)
    assert refusal(make_request("a", [1, 2, 3], logprobs=20, logit_bias={99: 1.0}), FACTS) is None


async def test_all_deltas_of_a_step_come_in_one_call_on_the_event_loop() -> None:
    engine, gates = threaded()
    calls: list[Sequence[StepDelta]] = []
    here = threading.get_ident()

    def sink(deltas: Sequence[StepDelta]) -> None:
        assert threading.get_ident() == here
        calls.append(deltas)

    facts = await engine.start(sink)
    assert facts.engine == "sim" and facts.exact_resume
    gates[0].open.clear()
    engine.submit(make_request("first", range(3), max_tokens=2))
    await entered(gates[0])
    for i in range(5):
        engine.submit(make_request(f"r{i}", [i, 1], max_tokens=3))
    gates[0].open.set()
    await engine.drain()
    assert [len(deltas) for deltas in calls] == [1, 6, 5, 5]
    await engine.close()


async def test_an_idle_engine_takes_no_steps() -> None:
    engine, gates = threaded()
    async with LocalEngine(engine) as local:
        await local.generate(make_request("a", range(3)))
        steps = gates[0].num_steps
        await asyncio.sleep(0.05)
        assert gates[0].num_steps == steps
        assert len(await local.generate(make_request("b", range(3)))) == 4


async def test_answers_of_concurrent_requests_never_mix() -> None:
    engine, _ = threaded(num_blocks=40)
    requests = [
        make_request(f"r{i}", [i % 3, *range(i % 11)], max_tokens=9, temperature=i % 2, seed=i) for i in range(40)
    ]
    async with LocalEngine(engine) as local:
        answers = await asyncio.gather(*(local.generate(request) for request in requests))
    for request, deltas in zip(requests, answers, strict=True):
        got = [token_id for delta in deltas for token_id in delta.token_ids]
        assert got == MODEL.generate(memoryview(request.prompt).cast("I"), request.sampling)


async def test_an_abort_takes_effect_within_two_steps() -> None:
    engine, gates = threaded()
    deltas: list[StepDelta] = []
    await engine.start(deltas.extend)
    gates[0].open.clear()
    engine.submit(make_request("a", range(3), max_tokens=100))
    await entered(gates[0])
    engine.abort("a")
    engine.abort("unknown")
    gates[0].open.set()
    await engine.drain()
    assert [delta.finish_reason for delta in deltas] == [None, "abort"]
    assert gates[0].num_steps == 1 and engine.stats().num_free_blocks == 32
    await engine.close()


async def test_a_load_counts_what_was_sent_since_the_last_step_began() -> None:
    engine, gates = threaded()
    await engine.start(lambda deltas: None)
    gates[0].open.clear()
    engine.submit(make_request("a", range(3), max_tokens=5))
    await entered(gates[0])
    engine.submit(make_request("b", range(7), max_tokens=5))
    engine.submit(make_request("c", range(4), max_tokens=5))
    load = engine.stats()
    assert load.num_unseen >= 2 and load.num_waiting >= 2
    assert load.num_waiting_tokens >= 7 + 4
    assert sum(num for num, _ in load.waiting_sizes) >= 2
    gates[0].open.set()
    await engine.drain()
    load = engine.stats()
    assert (load.num_unseen, load.num_waiting, load.num_waiting_tokens) == (0, 0, 0)
    await engine.close()


def test_a_load_counts_requests_that_were_sent_with_their_grammars() -> None:
    def build() -> BuiltEngine:
        raise AssertionError("it is not started")

    thread = EngineThread(build, time.monotonic)
    grammar = cast(Grammar, None)
    thread.send(make_request("a", range(3)))
    thread.send(Constrained(make_request("b", range(7)), grammar))
    thread.send(Abort("a"))
    load = thread.load([make_request("c", range(4))])
    assert (load.num_waiting, load.num_unseen, load.num_waiting_tokens) == (3, 3, 3 + 7 + 4)
    assert sum(num for num, _ in load.waiting_sizes) == 3


async def test_closing_an_iterator_early_aborts_its_request() -> None:
    engine, _ = threaded(max_model_len=100000, num_blocks=30000)
    async with LocalEngine(engine) as local:
        stream = local.stream(make_request("a", range(3), max_tokens=90000))
        await anext(stream)
        await stream.aclose()
        await engine.drain()
        assert engine.stats().num_free_blocks == 30000 and engine.stats().num_output_tokens < 90000


async def test_a_draining_engine_refuses_and_finishes_what_runs() -> None:
    engine, gates = threaded()
    deltas: list[StepDelta] = []
    await engine.start(deltas.extend)
    gates[0].open.clear()
    engine.submit(make_request("a", range(3), max_tokens=5))
    draining = asyncio.create_task(engine.drain())
    await asyncio.sleep(0)
    with pytest.raises(RefusedError) as refused:
        engine.submit(make_request("b", range(3)))
    assert refused.value.fault.code == "draining" and refused.value.fault.retryable
    assert engine.stats().draining and not draining.done()
    gates[0].open.set()
    await draining
    assert [delta.finish_reason for delta in deltas] == [None] * 4 + ["length"]
    await engine.close()


async def test_closing_ends_open_requests_with_engine_dead_and_is_idempotent() -> None:
    engine, gates = threaded()
    deltas: list[StepDelta] = []
    await engine.start(deltas.extend)
    gates[0].open.clear()
    engine.submit(make_request("a", range(3), max_tokens=10**3))
    engine.submit(make_request("b", range(3), max_tokens=10**3))
    await entered(gates[0])
    gates[0].open.set()
    await engine.close()
    await engine.close()
    ends = [delta for delta in deltas if delta.finish_reason]
    assert sorted(delta.request_id for delta in ends) == ["a", "b"]
    assert all(delta.fault and delta.fault.code == "engine_dead" for delta in ends)
    with pytest.raises(RefusedError):
        engine.submit(make_request("c", range(3)))
    assert not any(thread.name == "engine" for thread in threading.enumerate())


async def test_an_engine_never_started_can_be_closed() -> None:
    engine, _ = threaded()
    await engine.close()


async def test_a_failing_step_is_delivered_and_visible() -> None:
    engine, gates = threaded()
    deltas: list[StepDelta] = []
    await engine.start(deltas.extend)
    gates[0].failure = RuntimeError("out of memory")
    engine.submit(make_request("a", range(3)))
    await engine.drain()
    assert [delta.fault.code for delta in deltas if delta.fault] == ["engine_dead"]
    await engine.close()
    assert engine.dead is not None and "out of memory" in engine.dead.message
    with pytest.raises(EngineDeadError, match="out of memory"):
        engine.stats()
    with pytest.raises(RefusedError) as refused:
        engine.submit(make_request("b", range(3)))
    assert refused.value.fault.code == "engine_dead"
    await engine.close()


async def test_an_engine_that_cannot_be_built_does_not_start() -> None:
    def build() -> BuiltEngine:
        raise MemoryError("7 GiB needed, 2 GiB free")

    engine = ThreadedEngine(build)
    with pytest.raises(EngineError, match="7 GiB needed"):
        await engine.start(lambda deltas: None)
    await engine.close()


async def test_a_step_that_never_ends_is_death(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_loop, "WATCH_PERIOD_S", 0.005)
    now = [100.0]
    engine, gates = threaded(clock=lambda: now[0])
    deltas: list[StepDelta] = []
    await engine.start(deltas.extend)
    now[0] += 1000  # idle is not stalled
    assert not engine.stalled
    gates[0].open.clear()
    engine.submit(make_request("a", range(3)))
    await entered(gates[0])
    now[0] += 29.9  # five times what a first step may take
    assert not engine.stalled
    now[0] += 0.2
    assert engine.stalled
    await asyncio.wait_for(engine.drain(), 20)
    assert [(delta.finish_reason, delta.fault and delta.fault.code) for delta in deltas] == [("error", "engine_dead")]
    with pytest.raises(EngineDeadError, match=r"no progress for 30\.1 s"):
        engine.stats()
    gates[0].open.set()
    await engine.close()
    assert len(deltas) == 1, "the step's late deltas are dropped"


async def test_a_token_outside_the_vocabulary_ends_with_a_fault_and_harms_nobody() -> None:
    engine, _ = threaded()
    async with LocalEngine(engine) as local:
        (delta,) = await local.generate(make_request("a", [1, VOCAB_SIZE]))
        assert delta.fault is not None and delta.fault.code == "unsupported_parameter"
        assert len(await local.generate(make_request("b", [1, VOCAB_SIZE - 1]))) == 4


async def test_an_engine_full_of_requests_refuses_with_overloaded() -> None:
    engine, gates = threaded(max_waiting=1, max_num_seqs=2)
    await engine.start(lambda deltas: None)
    gates[0].open.clear()
    for i in range(3):
        engine.submit(make_request(f"r{i}", range(3)))
    with pytest.raises(RefusedError) as refused:
        engine.submit(make_request("more", range(3)))
    assert refused.value.fault.code == "overloaded"
    with pytest.raises(RefusedError, match="open already"):
        engine.submit(make_request("r0", range(3)))
    gates[0].open.set()
    await engine.close()


async def test_adapters_are_loaded_in_the_thread_and_known_to_submit() -> None:
    engine, _ = threaded(max_adapters=2, adapter_load_s=0.0)
    async with LocalEngine(engine) as local:
        request = make_request("a", range(3), adapter="x@1")
        with pytest.raises(RefusedError) as refused:
            await local.generate(request)
        assert refused.value.fault.code == "adapter_not_found"
        await engine.load_adapter(adapter("x@1"))
        assert engine.stats().adapters == ("x@1",)
        got = [token_id for delta in await local.generate(request) for token_id in delta.token_ids]
        assert got == MODEL.generate(range(3), request.sampling, "x@1") != MODEL.generate(range(3), request.sampling)
        await engine.unload_adapter("x@1")
        with pytest.raises(RefusedError):
            await local.generate(request)


async def test_an_adapter_in_use_is_not_unloaded() -> None:
    engine, _ = threaded(max_adapters=1, adapter_load_s=0.0, max_model_len=100000, num_blocks=30000)
    async with LocalEngine(engine) as local:
        await engine.load_adapter(adapter("x@1"))
        stream = local.stream(make_request("a", range(3), adapter="x@1", max_tokens=90000))
        await anext(stream)
        with pytest.raises(EngineError, match="in use"):
            await engine.unload_adapter("x@1")
        await stream.aclose()
        await engine.drain()


async def test_an_engine_without_adapter_slots_says_so() -> None:
    engine, _ = threaded()
    async with LocalEngine(engine):
        with pytest.raises(EngineError, match="no adapter slots"):
            await engine.load_adapter(adapter("x@1"))


async def test_kv_events_reach_the_event_loop_in_order() -> None:
    engine, _ = threaded()
    async with LocalEngine(engine) as local:
        await local.generate(make_request("a", range(12), max_tokens=8))
        events = engine.kv_events()
        assert events and [event.seq for event in events] == list(range(len(events)))
        assert engine.kv_events() == []
