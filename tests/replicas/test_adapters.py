"""Adapters around an engine: one load for all who wait, nothing taken from who uses it, failures that stay theirs."""

from __future__ import annotations

import asyncio
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from replicas.contract import AdapterSpec, EngineDeadError, EngineError, GenerateRequest, RefusedError
from tests.replicas.adapter_kit import AdapterKit, settle


async def test_all_who_want_one_adapter_wait_for_one_load() -> None:
    kit = await AdapterKit().start()
    for i in range(5):
        kit.ask(f"r{i}", "a@1")
    kit.ask("plain", None)
    await settle()
    assert list(kit.inner.loads) == ["a@1"] and set(kit.inner.open) == {"plain"}
    stats = kit.engine.stats()
    assert (stats.num_waiting, stats.num_waiting_adapter, stats.num_waiting_tokens) == (5, 5, 15)
    assert stats.adapters == () and [name for name, _ in stats.loading] == ["a@1"]
    await kit.finish("a@1", took_s=0.4)
    assert list(kit.inner.open) == ["plain", "r0", "r1", "r2", "r3", "r4"] and kit.inner.num_loads == 1
    stats = kit.engine.stats()
    assert (stats.adapters, stats.loading, stats.num_waiting) == (("a@1",), (), 0)
    assert stats.adapter_load_s == pytest.approx(0.4)
    kit.ask("later", "a@1")
    assert "later" in kit.inner.open
    assert kit.num_changes == 2
    await kit.engine.close()


async def test_loads_at_once_are_bounded_and_the_queue_tells_how_long() -> None:
    kit = await AdapterKit(num_slots=8, max_loads=2).start()
    kit.ask("r0", "a@1")
    await settle()
    await kit.finish("a@1", took_s=1.0)
    for name in "bcde":
        kit.ask(name, f"{name}@1")
    await settle()
    assert list(kit.inner.loads) == ["b@1", "c@1"]
    kit.clock.sleep(0.25)
    stats = kit.engine.stats()
    assert dict(stats.loading) == pytest.approx({"b@1": 0.75, "c@1": 0.75, "d@1": 1.75, "e@1": 2.25})
    assert stats.adapter_queue_s == pytest.approx(0.75 + 2 * 1.0 / 2)
    await kit.finish("c@1")
    assert list(kit.inner.loads) == ["b@1", "d@1"]
    await kit.engine.close()


async def test_a_pinned_adapter_keeps_its_slot_until_the_catalogue_lets_it_go() -> None:
    kit = await AdapterKit(num_slots=2).start()
    kit.shelf.specs["a@1"] = AdapterSpec(adapter_id="a@1", pinned=True)
    kit.engine.prefetch("a@1")
    await settle()
    await kit.finish("a@1")
    kit.clock.sleep(3600.0)
    for name in "bcd":
        kit.ask(name, f"{name}@1")
        await settle()
        await kit.finish(f"{name}@1")
        await kit.end(name)
        assert "a@1" in kit.inner.resident
    kit.shelf.specs["e@1"] = AdapterSpec(adapter_id="e@1", pinned=True)
    kit.ask("e", "e@1")
    await settle()
    await kit.finish("e@1")
    await kit.end("e")
    kit.ask("f", "f@1")
    await settle()
    assert "f@1" in kit.inner.loads and kit.inner.resident == ["a@1"], "the last slot is everybody's"
    await kit.finish("f@1")
    await kit.end("f")
    kit.shelf.specs["a@1"] = AdapterSpec(adapter_id="a@1")
    for name in "gh":
        kit.ask(name, f"{name}@1")
        await settle()
        await kit.finish(f"{name}@1")
        await kit.end(name)
    assert "a@1" not in kit.inner.resident
    await kit.engine.close()


async def test_a_resident_adapter_that_becomes_pinned_takes_the_place_of_one_that_no_longer_is() -> None:
    kit = await AdapterKit(num_slots=2).start()
    kit.shelf.specs["x@1"] = AdapterSpec(adapter_id="x@1", pinned=True)
    kit.shelf.specs["x@2"] = AdapterSpec(adapter_id="x@2")
    for name in ("x@1", "x@2"):
        kit.ask(name, name)
        await settle()
        await kit.finish(name)
        await kit.end(name)
    kit.shelf.specs["x@1"] = AdapterSpec(adapter_id="x@1")
    kit.shelf.specs["x@2"] = AdapterSpec(adapter_id="x@2", pinned=True)
    kit.ask("again", "x@2")
    await settle()
    await kit.end("again")
    for name in "bc":
        kit.ask(name, f"{name}@1")
        await settle()
        await kit.finish(f"{name}@1")
        await kit.end(name)
    assert kit.inner.resident == ["x@2", "c@1"]
    await kit.engine.close()


async def test_a_pinned_adapter_that_would_fill_the_memory_of_all_is_not_kept_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    kit = await AdapterKit(num_slots=8, num_ranks=100).start()
    kit.shelf.specs["a@1"] = AdapterSpec(adapter_id="a@1", rank=64, pinned=True)
    kit.engine.prefetch("a@1")
    await settle()
    assert not kit.inner.loads, "held, it would leave no room for an adapter of rank 64"
    kit.ask("a", "a@1")
    await settle()
    await kit.finish("a@1")
    await kit.end("a")
    assert "adapter a@1 is pinned but not kept" in caplog.text
    kit.shelf.specs["b@1"] = AdapterSpec(adapter_id="b@1", rank=64)
    kit.ask("b", "b@1")
    await settle()
    await kit.finish("b@1")
    assert kit.inner.resident == ["b@1"]
    kit.shelf.specs["c@1"] = AdapterSpec(adapter_id="c@1", rank=30, pinned=True)
    kit.engine.prefetch("c@1")
    await settle()
    await kit.finish("c@1")
    kit.engine.prefetch("d@1")
    await settle()
    assert not kit.inner.loads, "30 and 8 are held, 64 would not fit"
    await kit.engine.close()


async def test_a_resident_adapter_whose_files_the_catalogue_no_longer_means_is_loaded_anew() -> None:
    kit = await AdapterKit(num_slots=4).start()
    for digest in ("old", "new"):
        kit.shelf.specs["a@1"] = AdapterSpec(adapter_id="a@1", digest=digest)
        kit.ask(digest, "a@1")
        await settle()
        await kit.finish("a@1")
        assert digest in kit.inner.open
        if digest == "old":
            kit.shelf.specs["a@1"] = AdapterSpec(adapter_id="a@1", digest="new")
            with pytest.raises(RefusedError, match="has other weights now") as refused:
                kit.ask("early", "a@1")
            assert (refused.value.fault.code, refused.value.fault.retryable) == ("adapter_not_found", True)
        await kit.end(digest)
    assert kit.inner.num_loads == 2 and kit.inner.resident == ["a@1"]
    await kit.engine.close()


async def test_an_idle_adapter_that_the_catalogue_has_no_more_gives_its_slot_up() -> None:
    kit = await AdapterKit(num_slots=4).start()
    for name in "abc":
        kit.ask(name, f"{name}@1")
        await settle()
        await kit.finish(f"{name}@1")
    await kit.end("a")
    del kit.shelf.specs["a@1"], kit.shelf.specs["b@1"]
    kit.ask("late", "b@1")
    assert "late" in kit.inner.open, "who uses it still uses what everybody meant"
    kit.ask("d", "d@1")
    await settle()
    assert kit.inner.resident == ["b@1", "c@1"] and kit.engine.stats().adapters == ("b@1", "c@1")
    kit.ask("gone", "a@1")
    await settle()
    assert (fault := kit.fault("gone")) is not None and "is not in the catalogue" in fault.message
    await kit.engine.close()


async def test_a_load_that_evicts_nobody_waits_for_the_room_another_is_still_making() -> None:
    kit = await AdapterKit(num_slots=4, num_ranks=64).start()
    kit.shelf.specs["a@1"] = AdapterSpec(adapter_id="a@1", rank=64)
    kit.ask("a", "a@1")
    await settle()
    await kit.finish("a@1")
    await kit.end("a")
    kit.inner.unload_gate.clear()
    kit.ask("b", "b@1")
    kit.ask("c", "c@1")
    await settle()
    assert kit.inner.resident == ["a@1"] and not kit.inner.loads, "neither counts on pages that are not free yet"
    kit.inner.unload_gate.set()
    await settle()
    assert list(kit.inner.loads) == ["b@1", "c@1"]
    for name in "bc":
        await kit.finish(f"{name}@1")
    assert set(kit.inner.open) == {"b", "c"}
    await kit.engine.close()


async def test_a_rank_that_never_fits_is_refused_at_once_and_holds_nobody_up() -> None:
    kit = await AdapterKit(num_slots=1).start()
    kit.shelf.specs["huge@1"] = AdapterSpec(adapter_id="huge@1", rank=65)
    with pytest.raises(RefusedError, match="huge@1 has rank 65, the most is 64"):
        kit.ask("r", "huge@1")
    with pytest.raises(EngineError, match="the most is 64"):
        await kit.engine.load_adapter(AdapterSpec(adapter_id="x@1", rank=100))
    kit.engine.prefetch("huge@1")
    kit.shelf.late["late@1"] = AdapterSpec(adapter_id="late@1", rank=65)
    kit.ask("late", "late@1")
    kit.ask("a", "a@1")
    await settle()
    assert (fault := kit.fault("late")) is not None and "rank 65" in fault.message
    assert list(kit.inner.loads) == ["a@1"]
    await kit.engine.close()


async def test_learnt_load_seconds_are_for_rank_8() -> None:
    kit = await AdapterKit(num_slots=8).start()
    kit.shelf.specs["big@1"] = AdapterSpec(adapter_id="big@1", rank=32)
    kit.ask("r", "big@1")
    await settle()
    await kit.finish("big@1", took_s=2.0)
    assert kit.engine.stats().adapter_load_s == pytest.approx(0.5)
    await kit.engine.close()


async def test_an_adapter_in_use_keeps_its_slot_and_the_next_waits_for_one_to_end() -> None:
    kit = await AdapterKit(num_slots=2).start()
    for name in "ab":
        kit.ask(name, f"{name}@1")
    await settle()
    for name in "ab":
        await kit.finish(f"{name}@1")
    kit.ask("c", "c@1")
    await settle()
    assert not kit.inner.loads and kit.inner.resident == ["a@1", "b@1"]
    kit.clock.sleep(3.0)
    await kit.end("b")
    assert list(kit.inner.loads) == ["c@1"] and kit.inner.resident == ["a@1"]
    await kit.finish("c@1")
    assert set(kit.inner.open) == {"a", "c"}
    assert kit.engine.stats().adapter_queue_s > 0, "both slots are in use"
    await kit.engine.close()


@pytest.mark.parametrize("error", [EngineError("rank 99 is beyond 64"), OSError("no such file"), ValueError("a bug")])
async def test_a_load_that_fails_hurts_only_who_waits_for_it(error: Exception) -> None:
    kit = await AdapterKit().start()
    for request_id, name in (("r0", "a@1"), ("r1", "a@1"), ("other", "b@1")):
        kit.ask(request_id, name)
    await settle()
    await kit.finish("a@1", error)
    for request_id in ("r0", "r1"):
        fault = kit.fault(request_id)
        assert fault is not None and str(error) in fault.message
        assert (fault.code, fault.retryable, fault.param) == ("adapter_not_found", True, "model")
    await kit.finish("b@1")
    assert set(kit.inner.open) == {"other"}
    with pytest.raises(RefusedError, match=str(error)):
        kit.ask("again", "a@1")
    kit.clock.sleep(1.0)
    kit.ask("third", "a@1")
    await settle()
    await kit.finish("a@1")
    assert "third" in kit.inner.open and kit.inner.num_loads == 3
    await kit.engine.close()


async def test_an_engine_that_dies_while_loading_says_so() -> None:
    kit = await AdapterKit().start()
    kit.ask("r", "a@1")
    await settle()
    await kit.finish("a@1", EngineDeadError("it stopped"))
    fault = kit.fault("r")
    assert fault is not None and (fault.code, fault.retryable) == ("engine_dead", True)
    await kit.engine.close()


async def test_an_adapter_that_nobody_knows_is_looked_for_once_before_it_is_refused() -> None:
    kit = await AdapterKit().start()
    kit.shelf.late["new@1"] = AdapterSpec(adapter_id="new@1")
    for request_id, name in (("r0", "new@1"), ("r1", "new@1"), ("lost", "nobody@1")):
        kit.ask(request_id, name)
    await settle()
    fault = kit.fault("lost")
    assert fault is not None and (fault.code, fault.retryable) == ("adapter_not_found", True)
    assert list(kit.inner.loads) == ["new@1"] and kit.shelf.num_refreshes == 2
    await kit.finish("new@1")
    assert set(kit.inner.open) == {"r0", "r1"}
    await kit.engine.close()


async def test_aborting_one_who_waits_leaves_the_others_and_aborting_all_forgets_a_queued_load() -> None:
    kit = await AdapterKit(max_loads=1).start()
    for request_id, name in (("r0", "a@1"), ("r1", "a@1"), ("q0", "b@1"), ("q1", "b@1")):
        kit.ask(request_id, name)
    await settle()
    for request_id in ("r0", "q0", "q1", "unknown"):
        kit.engine.abort(request_id)
    await settle()
    assert [kit.deltas[r][-1].finish_reason for r in ("r0", "q0", "q1")] == ["abort"] * 3
    assert kit.inner.aborted == ["unknown"]
    await kit.finish("a@1")
    assert set(kit.inner.open) == {"r1"} and not kit.inner.loads and kit.inner.num_loads == 1
    assert kit.engine.stats().num_waiting_tokens == 0
    await kit.engine.close()


async def test_time_spent_waiting_comes_off_the_deadline_and_a_passed_one_ends_the_request() -> None:
    kit = await AdapterKit().start()
    kit.ask("short", "a@1", deadline_s=1.0)
    kit.ask("long", "a@1", deadline_s=10.0)
    await settle()
    await kit.finish("a@1", took_s=4.0)
    fault = kit.fault("short")
    assert fault is not None and (fault.code, fault.retry_after_s) == ("adapter_loading", 0.0)
    assert kit.inner.open["long"].deadline_s == pytest.approx(6.0)
    await kit.engine.close()


async def test_draining_lets_those_who_wait_have_their_adapter_and_refuses_new_ones() -> None:
    kit = await AdapterKit().start()
    kit.ask("r", "a@1")
    await settle()
    drain = asyncio.create_task(kit.engine.drain())
    await settle()
    with pytest.raises(RefusedError, match="draining"):
        kit.ask("late", "b@1")
    assert not kit.inner.draining
    await kit.finish("a@1")
    assert kit.inner.draining and not drain.done()
    await kit.end("r")
    await asyncio.wait_for(drain, 10)
    await kit.engine.close()


async def test_closing_answers_everybody_who_waits_and_leaves_no_task() -> None:
    kit = await AdapterKit(max_loads=1).start()
    for name in "abz":
        kit.ask(name, f"{name}@1")
    await kit.engine.close()
    faults = [kit.fault(name) for name in "abz"]
    assert [fault and fault.code for fault in faults] == ["engine_dead"] * 3
    await settle()
    assert len(asyncio.all_tasks()) == 1


async def test_more_may_not_wait_than_the_bound_allows_and_an_open_id_is_refused() -> None:
    kit = await AdapterKit(max_waiting=2).start()
    kit.ask("r0", "a@1")
    with pytest.raises(RefusedError, match="open already"):
        kit.ask("r0", "b@1")
    kit.ask("r1", "b@1")
    with pytest.raises(RefusedError, match="2 requests wait for adapters") as refused:
        kit.ask("r2", "c@1")
    assert (refused.value.fault.code, refused.value.fault.retryable) == ("overloaded", True)
    await kit.engine.close()


async def test_a_prefetched_adapter_is_there_when_its_request_comes() -> None:
    kit = await AdapterKit(num_slots=4).start()
    kit.engine.prefetch("a@1")
    kit.engine.prefetch("a@1")
    kit.engine.prefetch("nobody@1")
    await settle()
    await kit.finish("a@1")
    kit.ask("r", "a@1")
    assert "r" in kit.inner.open and kit.inner.num_loads == 1
    await kit.engine.close()


async def test_prefetches_keep_at_most_half_of_the_slots_and_requests_come_before_them() -> None:
    kit = await AdapterKit(num_slots=4, max_loads=1).start()
    for name in "abcd":
        kit.engine.prefetch(f"{name}@1")
    kit.ask("r", "e@1")
    await settle()
    assert list(kit.inner.loads) == ["a@1"]
    await kit.finish("a@1")
    assert list(kit.inner.loads) == ["e@1"], "before the second prefetch"
    await kit.finish("e@1")
    await kit.finish("b@1")
    assert not kit.inner.loads and kit.inner.resident == ["a@1", "e@1", "b@1"]
    await kit.engine.close()


async def test_a_queued_prefetch_whose_request_gave_up_does_not_count_any_more() -> None:
    kit = await AdapterKit(num_slots=2, max_loads=1).start()
    kit.ask("r", "a@1")
    kit.engine.prefetch("b@1")
    kit.ask("gone", "b@1")
    kit.engine.abort("gone")
    kit.engine.prefetch("c@1")
    await settle()
    await kit.finish("a@1")
    assert list(kit.inner.loads) == ["c@1"], "the one place for prefetches is free again"
    await kit.engine.close()


async def test_a_prefetched_adapter_that_nobody_uses_makes_room_after_a_while() -> None:
    kit = await AdapterKit(num_slots=2, hold_s=0.05).start()
    kit.engine.prefetch("a@1")
    kit.ask("b", "b@1")
    await settle()
    for name in "ab":
        await kit.finish(f"{name}@1")
    kit.ask("c", "c@1")
    await settle()
    assert not kit.inner.loads, "one is in use, the other held"
    await asyncio.sleep(0.1)
    assert list(kit.inner.loads) == ["c@1"] and kit.inner.resident == ["b@1"]
    await kit.engine.close()


async def test_an_operator_s_load_and_unload_go_through_the_slots() -> None:
    kit = await AdapterKit(num_slots=1).start()
    loading = asyncio.create_task(kit.engine.load_adapter(AdapterSpec(adapter_id="mine@1", rank=4)))
    await settle()
    await kit.finish("mine@1")
    await loading
    kit.ask("r", "mine@1")
    with pytest.raises(EngineError, match="in use"):
        await kit.engine.unload_adapter("mine@1")
    await kit.end("r")
    await kit.engine.unload_adapter("mine@1")
    assert kit.inner.resident == [] and kit.engine.stats().adapters == ()
    failing = asyncio.create_task(kit.engine.load_adapter(AdapterSpec(adapter_id="bad@1")))
    await settle()
    await kit.finish("bad@1", EngineError("broken"))
    with pytest.raises(EngineError, match="broken"):
        await failing
    await kit.engine.close()


async def test_an_engine_without_slots_is_left_as_it_is() -> None:
    kit = await AdapterKit(num_slots=0).start()
    with pytest.raises(RefusedError, match="let it through"):
        kit.ask("r", "a@1")
    kit.engine.prefetch("a@1")
    await settle()
    assert kit.inner.num_loads == 0 and kit.engine.stats().adapters == ()
    await kit.engine.close()


@given(st.integers(0, 10_000), st.integers(1, 4), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_whatever_happens_every_waiter_is_answered_once_and_slots_hold(
    seed: int, num_slots: int, max_loads: int
) -> None:
    asyncio.run(_random_walk(random.Random(seed), num_slots, max_loads))


async def _random_walk(rng: random.Random, num_slots: int, max_loads: int) -> None:
    """Asks, aborts, prefetches, ends answers and loads (some with errors) at random, then lets everything end."""
    kit = await AdapterKit(num_slots, max_loads, retry_s=0.5).start()
    accepted: set[str] = set()
    for step in range(60):
        kit.clock.sleep(rng.random())
        match rng.choice(["ask", "ask", "ask", "prefetch", "abort", "end", "load", "load"]):
            case "ask":
                try:
                    kit.ask(f"r{step}", rng.choice(["a@1", "b@1", "c@1", "d@1", "nobody@1", None]))
                    accepted.add(f"r{step}")
                except RefusedError:
                    pass
            case "prefetch":
                kit.engine.prefetch(rng.choice(["a@1", "e@1", "f@1"]))
            case "abort" if accepted:
                kit.engine.abort(rng.choice(sorted(accepted)))
            case "end" if kit.inner.open:
                await kit.end(rng.choice(sorted(kit.inner.open)))
            case "load" if kit.inner.loads:
                await kit.finish(rng.choice(sorted(kit.inner.loads)), rng.choice([None, None, EngineError("no")]))
        if rng.random() < 0.5:
            await settle()
        kit.engine._slots.check()
        assert len(kit.inner.loads) <= max_loads and len(kit.inner.resident) <= num_slots
        assert all(r.adapter is None or r.adapter in kit.inner.resident for r in kit.inner.open.values())
    for _ in range(200):
        await settle()
        if kit.inner.loads:
            await kit.finish(next(iter(kit.inner.loads)))
        elif kit.inner.open:
            await kit.end(next(iter(kit.inner.open)))
        elif all(map(kit.ended, accepted)):
            break
        else:
            for adapter_id in list(kit.engine._holds._timers):
                kit.engine._holds.end(adapter_id)
    assert all(map(kit.ended, accepted)), "somebody was forgotten"
    assert kit.engine.stats().num_waiting == 0 and not kit.engine._uses
    await kit.engine.close()


async def test_a_request_that_the_engine_cannot_take_keeps_nobody_else_from_theirs() -> None:
    kit = await AdapterKit().start()
    for i in range(3):
        kit.ask(f"r{i}", "a@1")
    await settle()
    submit = kit.inner.submit

    def stumbling(request: GenerateRequest) -> None:
        if request.request_id == "r0":
            raise ValueError("a bug of ours")
        submit(request)

    kit.inner.submit = stumbling  # type: ignore[method-assign]
    await kit.finish("a@1")
    assert list(kit.inner.open) == ["r1", "r2"]
    fault = kit.fault("r0")
    assert kit.ended("r0") and fault is not None and fault.code == "internal"
    await kit.engine.close()
