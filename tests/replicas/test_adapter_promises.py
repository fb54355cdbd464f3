"""Requests whose adapter comes after their deadline: refused at once with when it will be there, and it will be."""

from __future__ import annotations

import pytest

from replicas.adapter_files import AdapterUnreachableError
from replicas.contract import AdapterLoadStats, Fault, RefusedError
from tests.replicas.adapter_kit import AdapterKit, settle


async def kit_that_takes(seconds: float, **options: int) -> AdapterKit:
    """An engine whose loads took so long."""
    kit = await AdapterKit(**options).start()  # type: ignore[arg-type]
    kit.ask("first", "h@1")
    await settle()
    await kit.finish("h@1", took_s=seconds)
    await kit.end("first")
    return kit


def refusal(kit: AdapterKit, request_id: str, adapter: str, deadline_s: float) -> Fault:
    with pytest.raises(RefusedError) as caught:
        kit.ask(request_id, adapter, deadline_s=deadline_s)
    return caught.value.fault


async def test_a_wait_beyond_the_deadline_is_refused_and_the_load_goes_on_for_the_retry() -> None:
    kit = await kit_that_takes(4.0)
    fault = refusal(kit, "r", "a@1", 3.0)
    assert (fault.code, fault.retryable, fault.param) == ("adapter_loading", False, "model")
    assert fault.retry_after_s == pytest.approx(4.0)
    await settle()
    assert list(kit.inner.loads) == ["a@1"], "it is loaded though nobody waits"
    kit.clock.sleep(2.5)
    assert refusal(kit, "r2", "a@1", 1.0).retry_after_s == pytest.approx(1.5), "what is left of the load under way"
    kit.ask("patient", "a@1", deadline_s=2.0)
    await kit.finish("a@1", took_s=1.5)
    assert set(kit.inner.open) == {"patient"} and "a@1" in kit.engine.stats().adapters
    await kit.engine.close()


async def test_what_was_promised_is_held_until_the_retry() -> None:
    kit = await kit_that_takes(4.0, num_slots=2)
    refusal(kit, "r", "a@1", 1.0)
    await settle()
    await kit.finish("a@1", took_s=4.0)
    for name in ("b@1", "c@1"):
        kit.ask(name, name)
        await settle()
        await kit.finish(name)
        await kit.end(name)
    kit.ask("retry", "a@1", deadline_s=1.0)
    assert "retry" in kit.inner.open
    await kit.engine.close()


async def test_a_request_given_up_at_its_deadline_leaves_its_load_in_the_queue() -> None:
    kit = await AdapterKit(max_loads=1).start()
    kit.ask("other", "b@1")
    kit.ask("early", "c@1", deadline_s=5.0)
    kit.ask("late", "a@1", deadline_s=1.0)
    await settle()
    kit.engine.abort("early")
    kit.clock.sleep(1.0)
    kit.engine.abort("late")
    await kit.finish("b@1")
    assert list(kit.inner.loads) == ["a@1"], "who left before its deadline will not come back"
    await kit.engine.close()


async def test_loads_queued_before_count_and_full_slots_are_a_matter_of_capacity() -> None:
    kit = await kit_that_takes(2.0, num_slots=2, max_loads=1)
    kit.ask("b", "b@1")
    await settle()
    assert refusal(kit, "c", "c@1", 3.9).retry_after_s == pytest.approx(4.0)
    await kit.finish("b@1", took_s=2.0)
    await kit.finish("c@1", took_s=2.0)
    kit.ask("c", "c@1")
    fault = refusal(kit, "d", "d@1", 1.0)
    assert fault.code == "adapter_slots_busy" and fault.retry_after_s is not None and fault.retry_after_s >= 2.0
    await kit.engine.close()


async def test_no_deadline_and_nothing_measured_wait() -> None:
    kit = await AdapterKit().start()
    kit.ask("unknown", "a@1", deadline_s=0.001)
    await settle()
    await kit.finish("a@1")
    kit.ask("boundless", "b@1")
    assert kit.engine.stats().num_waiting_adapter == 1
    await kit.engine.close()


async def test_the_first_delta_tells_how_long_it_waited_and_stats_what_loads_took() -> None:
    kit = await AdapterKit(num_slots=1).start()
    kit.ask("cold", "a@1")
    await settle()
    await kit.finish("a@1", took_s=0.75)
    kit.ask("warm", "a@1")
    await kit.end("cold", "warm")
    assert [kit.deltas[name][0].adapter_wait_s for name in ("cold", "warm")] == [pytest.approx(0.75), 0.0]
    kit.ask("next", "b@1")
    await settle()
    await kit.finish("b@1", OSError("broken"))
    stats = kit.engine.stats().adapter_loads
    assert stats == AdapterLoadStats(0.75, (0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0), num_failed=1, num_evicted=1)
    await kit.engine.close()


async def test_files_that_cannot_be_reached_are_no_missing_adapter() -> None:
    kit = await AdapterKit().start()
    kit.ask("r", "a@1")
    await settle()
    await kit.finish("a@1", AdapterUnreachableError("the store is away"))
    fault = kit.fault("r")
    assert fault is not None and (fault.code, fault.retryable, fault.retry_after_s) == (
        "adapter_unreachable",
        True,
        5.0,
    )
    await kit.engine.close()


async def test_what_the_catalogue_has_no_more_leaves_when_it_is_idle() -> None:
    kit = await AdapterKit().start()
    for name in ("a@1", "b@1"):
        kit.ask(name, name)
        await settle()
        await kit.finish(name)
    await kit.end("b@1")
    kit.shelf.specs.clear()
    kit.engine.drop_outdated()
    assert kit.engine.stats().adapters == ("a@1",), "one is in use"
    await kit.end("a@1")
    assert kit.engine.stats().adapters == () and kit.inner.resident == []
    await kit.engine.close()
