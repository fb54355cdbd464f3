"""LoRA adapters through the whole request path: HTTP, catalogue, queue, routing, channel, sim replicas, few slots."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from configs.schema import (
    AdapterConfig,
    ChannelConfig,
    Config,
    EngineConfig,
    GroupConfig,
    ModelConfig,
    SimConfig,
    TelemetryConfig,
    TenantConfig,
)
from replicas.contract import SamplingParams
from replicas.sim_engine import PRINTABLE_ASCII
from replicas.sim_model import SimModel
from routing.adapters import Adapter, AdapterRegistry
from routing.store import Store
from tests.gateway.test_compose import Stack, running, until
from tests.routing import conftest as routing_conftest
from tests.routing.conftest import Valkey

valkey = routing_conftest.valkey

NUM_ADAPTERS, NUM_SLOTS = 50, 8
MODEL = SimModel(259, (257,), PRINTABLE_ASCII)
ACME, OTHER = ({"authorization": f"Bearer sk-{name}"} for name in ("acme", "other"))


def engine(**sim: Any) -> EngineConfig:
    """A quick one with few slots."""
    chosen = {"step_base_s": 0.002, "max_adapters": NUM_SLOTS, "adapter_load_s": 0.01, **sim}
    return EngineConfig(kind="sim", max_num_seqs=16, sim=SimConfig(**chosen))


def profile(folder: Path) -> Config:
    adapters = [AdapterConfig(name=f"lora-{i}", base_model="m", rank=8 * (1 + i % 4)) for i in range(NUM_ADAPTERS)]
    adapters += [
        AdapterConfig(name="secret", base_model="m", owner="acme"),
        AdapterConfig(name="voice", base_model="m", version="1"),
        AdapterConfig(name="voice", base_model="m", version="2"),
        AdapterConfig(name="too-big", base_model="m", rank=512),
    ]
    return Config(
        cluster="test",
        models=(ModelConfig(id="m", source="sim:bytes", aliases=("alias",), default_max_tokens=64),),
        groups=(GroupConfig(name="g", model="m", engine=engine()),),
        adapters=tuple(adapters),
        tenants=(TenantConfig(id="acme", keys=("sk-acme",)), TenantConfig(id="other", keys=("sk-other",))),
        channel=ChannelConfig(heartbeat_s=0.2, dead_after_s=2.0),
        telemetry=TelemetryConfig(usage_log=str(folder / "usage.jsonl")),
    )


@pytest.fixture
async def stack(valkey: Valkey) -> AsyncIterator[Stack]:
    async with running(profile(valkey.path.parent), valkey) as stack:
        yield stack


def expected(prompt: str, max_tokens: int, adapter_id: str | None) -> str:
    """What the model with this adapter says, the slow obvious way."""
    sampling = SamplingParams(max_tokens=max_tokens, seed=0, temperature=0.0, ignore_eos=True)
    return bytes(MODEL.generate(prompt.encode(), sampling, adapter_id)).decode()


async def complete(stack: Stack, model: str, prompt: str, headers: dict[str, str] = ACME, **fields: Any) -> Any:
    """A completion's JSON, whatever the status; `status` is added."""
    body = {"model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True, "max_tokens": 6, **fields}
    answer = await stack.client.post("/v1/completions", json=body, headers=headers)
    return {**answer.json(), "status": answer.status_code}


def resident(stack: Stack) -> list[set[str]]:
    return [set(state.adapters) for state in stack.composed.fleet.states("m")]


async def test_fifty_adapters_on_two_times_eight_slots_never_say_a_token_of_another(stack: Stack) -> None:
    for _ in range(2):
        await stack.host("m", engine())
    rng = random.Random(5)
    weights = [(i + 1) ** -1.0 for i in range(NUM_ADAPTERS)]
    chosen: list[int | None] = [*rng.choices(range(NUM_ADAPTERS), weights, k=220), *[None] * 30]
    rng.shuffle(chosen)
    gate = asyncio.Semaphore(24)
    most = 0

    async def ask(i: int, adapter: int | None) -> None:
        nonlocal most
        prompt = f"question {i % 7} " + "word " * (i % 40)
        async with gate:
            answer = await complete(stack, "m" if adapter is None else f"lora-{adapter}", prompt)
        assert answer["status"] == 200, answer
        adapter_id = None if adapter is None else f"lora-{adapter}@1"
        assert answer["choices"][0]["text"] == expected(prompt, 6, adapter_id)
        most = max(most, *(len(slots) for slots in resident(stack)))

    await asyncio.gather(*(ask(i, adapter) for i, adapter in enumerate(chosen)))
    await until(stack.idle)
    assert most == NUM_SLOTS, "slots were full, and never more than full"
    assert len({frozenset(slots) for slots in resident(stack)}) == 2


async def test_adapters_and_their_versions_share_no_prefix(stack: Stack) -> None:
    await stack.host("m", engine())
    prompt = "the same words for everybody " * 12
    names = ("m", "lora-1", "lora-2", "voice@1", "voice@2")
    for times in ("cold", "warm"):
        texts = set()
        for name in names:
            answer = await complete(stack, name, prompt)
            cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
            assert (cached == 0) if times == "cold" else (cached > 300), (times, name, cached)
            texts.add(answer["choices"][0]["text"])
        assert len(texts) == len(names)
    by_name, by_version = [await complete(stack, name, prompt) for name in ("voice", "voice@2")]
    assert by_name["choices"] == by_version["choices"], "the last declared version is the current one"


async def test_an_adapter_s_name_is_answered_under_and_written_into_the_books(stack: Stack) -> None:
    await stack.host("m", engine())
    answer = await complete(stack, "voice", "hello")
    assert answer["model"] == "voice"
    chat = {"model": "voice", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3, "stream": True}
    streamed = await stack.client.post("/v1/chat/completions", json=chat, headers=ACME)
    assert streamed.status_code == 200 and '"model":"voice"' in streamed.text
    await stack.composed.gateway.ledger.close()
    lines = (stack.runtime.run_dir / "usage.jsonl").read_text().splitlines()
    assert len(lines) == 2 and all('"model":"m"' in line and '"adapter":"voice@2"' in line for line in lines)


async def test_an_adapter_of_another_tenant_is_as_unknown_as_one_that_is_not_there(stack: Stack) -> None:
    await stack.host("m", engine())
    assert (await complete(stack, "secret", "x"))["choices"][0]["text"] == expected("x", 6, "secret@1")
    for name in ("secret", "secret@1"):
        refused, unknown = [await complete(stack, asked, "x", OTHER) for asked in (name, "nobody")]
        assert refused["status"] == 404 and refused["error"]["code"] == "model_not_found"
        assert refused["error"]["message"].replace(name, "nobody") == unknown["error"]["message"]
        assert (await stack.client.get(f"/v1/models/{name}", headers=OTHER)).status_code == 404
    listed = {
        who: {card["id"]: card for card in (await stack.client.get("/v1/models", headers=headers)).json()["data"]}
        for who, headers in (("acme", ACME), ("other", OTHER))
    }
    assert listed["acme"].keys() - listed["other"].keys() == {"secret"}
    voice = listed["other"]["voice"]
    assert (voice["parent"], voice["root"]) == ("m", "voice@2")
    assert (listed["other"]["alias"]["parent"], listed["other"]["alias"]["root"]) == (None, "m")


async def test_an_adapter_that_cannot_be_loaded_is_a_404_and_harms_nobody(stack: Stack) -> None:
    await stack.host("m", engine())
    broken, fine = await asyncio.gather(complete(stack, "too-big", "x"), complete(stack, "lora-3", "x"))
    assert (broken["status"], broken["error"]["code"]) == (404, "model_not_found")
    assert "rank 512" in broken["error"]["message"]
    assert fine["choices"][0]["text"] == expected("x", 6, "lora-3@1")


async def test_an_adapter_added_while_it_runs_is_served_at_once_and_a_removed_one_no_more(stack: Stack) -> None:
    await stack.host("m", engine())
    store = Store(stack.valkey.url, "test")
    registry = AdapterRegistry(store)
    try:
        await registry.add(Adapter(name="fresh", base_model="m", version="7"))
        catalogue = stack.composed.adapters
        await until(lambda: catalogue.catalogue.named("fresh") is not None, 5.0)
        answer = await complete(stack, "fresh", "x")
        assert answer["choices"][0]["text"] == expected("x", 6, "fresh@7"), answer
        await registry.remove("fresh")
        await until(lambda: catalogue.catalogue.named("fresh") is None, 5.0)
        assert (await complete(stack, "fresh", "x"))["status"] == 404
        stack.valkey.kill()
        assert (await complete(stack, "lora-4", "x"))["choices"][0]["text"] == expected("x", 6, "lora-4@1")
    finally:
        await store.close()


async def test_a_request_that_waits_in_the_queue_finds_its_adapter_loaded(stack: Stack) -> None:
    slow = SimConfig(step_base_s=0.02, max_adapters=NUM_SLOTS, adapter_load_s=0.05)
    await stack.host("m", EngineConfig(kind="sim", max_num_seqs=1, sim=slow))
    admission = stack.composed.admission
    ahead = [asyncio.create_task(complete(stack, "m", f"{i}", max_tokens=12)) for i in range(14)]
    await until(lambda: admission.num_waiting > 0)
    waiting = asyncio.create_task(complete(stack, "lora-5", "x"))
    await until(lambda: "lora-5@1" in resident(stack)[0])
    assert admission.num_waiting > 0 and not waiting.done(), "loaded before the request could leave the queue"
    assert (await waiting)["choices"][0]["text"] == expected("x", 6, "lora-5@1")
    await asyncio.gather(*ahead)


async def test_a_replica_without_slots_is_never_asked_for_an_adapter(stack: Stack) -> None:
    await stack.host("m", engine(max_adapters=0))
    able = await stack.host("m", engine())
    for i in range(4):
        answer = await stack.client.post(
            "/v1/completions", json={"model": f"lora-{i}", "prompt": "x", "max_tokens": 2}, headers=ACME
        )
        assert answer.status_code == 200 and answer.headers["x-warmgate-replica"] == able.replica_id


async def test_a_model_whose_groups_take_no_adapters_says_so_at_once(valkey: Valkey) -> None:
    without = GroupConfig(name="g", model="m", engine=engine(max_adapters=0))
    async with running(msgspec.structs.replace(profile(valkey.path.parent), groups=(without,)), valkey) as stack:
        await stack.host("m", engine(max_adapters=0))
        async with asyncio.timeout(2.0):
            answer = await complete(stack, "lora-1", "x")
    error = answer["error"]
    assert (answer["status"], error["code"], error["param"]) == (400, "adapter_not_loadable", "model")
    assert "no replica of model 'm' takes any" in error["message"]


async def test_while_replicas_with_slots_are_away_a_request_waits_for_one(stack: Stack) -> None:
    await stack.host("m", engine(max_adapters=0))
    waiting = asyncio.create_task(complete(stack, "lora-1", "x"))
    await asyncio.sleep(0.3)
    assert not waiting.done()
    await stack.host("m", engine())
    async with asyncio.timeout(5.0):
        assert (await waiting)["choices"][0]["text"] == expected("x", 6, "lora-1@1")
