"""Cold adapters: deadlines and honest Retry-After, who paid, unloading that drains; over HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import msgspec
import pytest

from configs.schema import AdapterConfig, Config, EngineConfig, ModelConfig, TenantConfig
from gateway.cold import too_late
from gateway.errors import AdapterLoadingError
from gateway.types import Job, Tenant
from replicas.contract import SamplingParams
from routing.types import ReplicaState
from tests.gateway.test_adapters import engine
from tests.gateway.test_adapters import profile as sim_profile
from tests.gateway.test_compose import Stack, running, until
from tests.gateway.test_lora import PROMPT, ROOT, World, host, load, profile, says, unload, valkey, world
from tests.routing.conftest import Valkey

__all__ = ["valkey", "world"]

HASTY, PATIENT = ({"authorization": f"Bearer sk-{name}"} for name in ("hasty", "patient"))
GREEDY = SamplingParams(max_tokens=1, seed=0)
SLOW = engine(adapter_load_s=2.3, max_adapters=2)


def slow_profile(valkey: Valkey) -> Config:
    config = sim_profile(valkey.path.parent)
    tenants = (
        TenantConfig(id="hasty", keys=("sk-hasty",), max_wait_s=1.2),
        TenantConfig(id="patient", keys=("sk-patient",)),
        TenantConfig(id="acme", keys=("sk-acme",)),
    )
    adapters = tuple(AdapterConfig(name=f"lora-{i}", base_model="m") for i in range(8))
    return msgspec.structs.replace(config, tenants=tenants, adapters=adapters)


@pytest.fixture
async def slow(valkey: Valkey) -> AsyncIterator[Stack]:
    """A sim replica that takes two seconds for an adapter."""
    async with running(slow_profile(valkey), valkey) as stack:
        await stack.host("m", SLOW)
        yield stack


async def ask(stack: Stack, model: str, headers: dict[str, str], max_tokens: int = 2) -> Any:
    body = {"model": model, "prompt": "hello", "max_tokens": max_tokens, "ignore_eos": True}
    return await stack.client.post("/v1/completions", json=body, headers=headers)


async def test_who_would_wait_too_long_is_told_at_once_when_to_come_back_and_then_it_is_there(slow: Stack) -> None:
    assert (await ask(slow, "lora-0", PATIENT)).status_code == 200, "now a load's seconds are known"
    began = time.monotonic()
    refused = await ask(slow, "lora-1", HASTY)
    took_s = time.monotonic() - began
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_loading"), refused.text
    assert took_s < 1.0, "well before its deadline"
    after_s = int(refused.headers["retry-after"])
    assert after_s == 3 and 2000 < int(refused.headers["retry-after-ms"]) <= 3000
    await asyncio.sleep(after_s - (time.monotonic() - began))
    began = time.monotonic()
    assert (await ask(slow, "lora-1", HASTY)).status_code == 200
    assert time.monotonic() - began < 2.0


async def test_an_unknown_wait_is_tried_and_at_the_deadline_the_error_says_the_same(slow: Stack) -> None:
    refused = await ask(slow, "lora-0", HASTY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "adapter_loading"), refused.text
    assert int(refused.headers["retry-after"]) in (1, 2), "as long again as it waited"
    await until(lambda: "lora-0@1" in slow.composed.fleet.states("m")[0].adapters)
    assert (await ask(slow, "lora-0", HASTY)).status_code == 200


async def test_slots_that_are_all_in_use_are_a_matter_of_capacity(slow: Stack) -> None:
    for name in ("lora-0", "lora-1"):
        await ask(slow, name, PATIENT)
    busy = [asyncio.create_task(ask(slow, name, PATIENT, 2000)) for name in ("lora-0", "lora-1")]
    await until(lambda: slow.composed.fleet.states("m")[0].num_running == 2)
    refused = await ask(slow, "lora-2", HASTY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "adapter_slots_busy"), refused.text
    assert int(refused.headers["retry-after"]) >= 2
    for task in busy:
        task.cancel()
    await asyncio.gather(*busy, return_exceptions=True)


async def test_metrics_and_books_say_what_loads_took_and_who_paid(slow: Stack) -> None:
    await asyncio.gather(ask(slow, "lora-0", PATIENT), ask(slow, "lora-0", PATIENT))
    await ask(slow, "lora-0", PATIENT)
    await ask(slow, "lora-1", {"authorization": "Bearer sk-acme"})
    await ask(slow, "lora-2", {"authorization": "Bearer sk-acme"})
    text = (await slow.client.get("/metrics")).text
    found = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("warmgate_adapter"))
    assert found[_loads(found)] == "3.0"
    assert float(found['warmgate_adapter_wait_seconds_total{model="m",tenant="patient"}']) > 3.0
    assert found['warmgate_adapter_cold_requests_total{model="m",tenant="patient"}'] == "2.0"
    assert found['warmgate_adapter_cold_requests_total{model="m",tenant="acme"}'] == "2.0"
    assert any(name.startswith("warmgate_adapter_evictions_total") and v == "1.0" for name, v in found.items())
    buckets = {name: v for name, v in found.items() if name.startswith("warmgate_adapter_load_seconds_bucket")}
    assert [v for name, v in buckets.items() if 'le="1.0"' in name] == ["0.0"]
    assert [v for name, v in buckets.items() if 'le="5.0"' in name] == ["3.0"]
    await slow.composed.gateway.ledger.close()
    lines = (slow.runtime.run_dir / "usage.jsonl").read_text().splitlines()
    waits = [msgspec.json.decode(line)["adapter_wait_s"] for line in lines]
    assert sorted(wait > 1.0 for wait in waits) == [False, True, True, True, True]


def _loads(found: dict[str, str]) -> str:
    (name,) = [n for n in found if n.startswith("warmgate_adapter_loads_total") and 'outcome="ok"' in n]
    return name


def test_only_an_adapter_that_is_on_its_way_and_nowhere_else_is_what_a_deadline_was_missed_for() -> None:
    def late(*replicas: ReplicaState, adapter: str | None = "a@1", waited_s: float = 4.0) -> AdapterLoadingError | None:
        job = Job("r", ModelConfig(id="m", source="s"), Tenant("t", b""), b"", GREEDY, b"", adapter=adapter)
        return too_late(job, replicas, waited_s)

    def replica(*loading: tuple[str, float], resident: frozenset[str] = frozenset()) -> ReplicaState:
        return ReplicaState("r", "m", 512, 4, adapters=resident, max_adapters=4, loading=loading)

    assert late(replica()) is None and late(replica(("b@1", 1.0))) is None
    assert late(replica(("a@1", 1.0)), adapter=None) is None
    assert late(replica(("a@1", 1.0)), replica(resident=frozenset({"a@1"}))) is None
    error = late(replica(("a@1", 3.2)), replica(("a@1", 2.2)))
    assert error is not None and (error.retry_after_s, error.waited_s) == (2.2, 4.0)
    assert error.headers() == {"retry-after": "3", "retry-after-ms": "2200"}
    unknown = late(replica(("a@1", 0.0)))
    assert unknown is not None and unknown.retry_after_s == 4.0


# Unloading.


async def finishes(stack: Stack, name: str, count: int) -> Any:
    body = {"model": name, "prompt": PROMPT, "max_tokens": count, "temperature": 0, "return_token_ids": True}
    headers = {"authorization": "Bearer sk-user"}
    return await stack.client.post("/v1/completions", json={**body, "ignore_eos": True}, headers=headers)


async def test_what_is_removed_drains_and_then_leaves_its_slot(valkey: Valkey, world: World) -> None:
    async with running(profile(world), valkey) as stack:
        await host(stack)
        for name in ("a", "b"):
            assert (await load(stack, f"x{name}", world.adapters[name]))[0] == 200
        under_way = asyncio.create_task(says(stack, "xa", 110))
        await until(lambda: stack.composed.fleet.states("m")[0].num_running > 0)
        gone = await stack.client.delete("/v1/adapters/xa", headers=ROOT)
        assert gone.json() == {"id": "xa", "object": "adapter", "deleted": True}
        assert (await says(stack, "xa"))["code"] == "model_not_found"
        assert not under_way.done(), "it was still running"
        assert (await stack.client.get("/v1/adapters/xa", headers=ROOT)).status_code == 404
        assert (await stack.client.delete("/v1/adapters/xb", headers=ROOT)).status_code == 200
        assert await under_way == world.says("a", 110)
        await until(lambda: stack.composed.fleet.states("m")[0].adapters == frozenset())


async def test_what_is_removed_drains_on_the_sim_engine_too(valkey: Valkey) -> None:
    config = slow_profile(valkey)
    tenants = (*config.tenants, TenantConfig(id="root", keys=("sk-root",), admin=True))
    async with running(msgspec.structs.replace(config, tenants=tenants), valkey) as stack:
        quick = engine(max_adapters=2)
        assert isinstance(quick, EngineConfig)
        await stack.host("m", quick)
        for name in ("lora-0", "lora-1"):
            assert (await ask(stack, name, PATIENT)).status_code == 200
        under_way = asyncio.create_task(ask(stack, "lora-0", PATIENT, 500))
        await until(lambda: stack.composed.fleet.states("m")[0].num_running > 0)
        for name in ("lora-0", "lora-1"):
            assert (await unload(stack, name))[0] == 200
        await until(lambda: stack.composed.fleet.states("m")[0].adapters == {"lora-0@1"})
        assert (await ask(stack, "lora-0", PATIENT)).status_code == 404
        assert not under_way.done()
        answer = (await under_way).json()
        assert answer["usage"]["completion_tokens"] == 500
        await until(lambda: stack.composed.fleet.states("m")[0].adapters == frozenset())
