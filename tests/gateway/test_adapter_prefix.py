"""Prefixes and adapters together: a turn finds both where it was before, and nobody finds another's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from configs.schema import (
    AdapterConfig,
    Config,
    EngineConfig,
    GroupConfig,
    ModelConfig,
    SimConfig,
    TenantConfig,
)
from gateway.homes import PLACE_EVERY_S
from tests.gateway.test_compose import Stack, running, until
from tests.routing.conftest import Valkey

NUM_REPLICAS, NUM_SLOTS, NUM_ADAPTERS = 3, 4, 9
BLOCK = 64
ENGINE = EngineConfig(
    kind="sim", max_num_seqs=16, sim=SimConfig(step_base_s=0.002, max_adapters=NUM_SLOTS, adapter_load_s=0.1)
)
WORDS = "the same words for everybody who asks "


def profile(folder: Path) -> Config:
    return Config(
        cluster="test",
        models=(ModelConfig(id="m", source="sim:bytes", route_block_tokens=BLOCK),),
        groups=(GroupConfig(name="g", model="m", engine=ENGINE),),
        adapters=tuple(AdapterConfig(name=f"lora-{i}", base_model="m") for i in range(NUM_ADAPTERS)),
        tenants=tuple(TenantConfig(id=name, keys=(f"sk-{name}",)) for name in ("acme", "other")),
    )


@pytest.fixture
async def stack(valkey: Valkey) -> AsyncIterator[Stack]:
    async with running(profile(valkey.path.parent), valkey) as stack:
        for _ in range(NUM_REPLICAS):
            await stack.host("m", ENGINE)
        yield stack


async def ask(stack: Stack, adapter: int, prompt: str, tenant: str = "acme", **fields: Any) -> tuple[str, int]:
    """(replica, cached prompt tokens) of a completion."""
    body = {"model": f"lora-{adapter}", "prompt": prompt, "temperature": 0, "max_tokens": 4, "ignore_eos": True}
    headers = {"authorization": f"Bearer sk-{tenant}"}
    answer = await stack.client.post("/v1/completions", json={**body, **fields}, headers=headers)
    assert answer.status_code == 200, answer.text
    return answer.headers["x-warmgate-replica"], answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]


def num_resident(stack: Stack) -> int:
    """Copies of adapters in all slots together."""
    return sum(len(state.adapters) for state in stack.composed.fleet.states("m"))


async def test_a_turn_finds_its_adapter_and_its_prefix_in_one_place(stack: Stack) -> None:
    adapters = range(NUM_ADAPTERS)
    await asyncio.gather(*(ask(stack, adapter, "hello") for adapter in adapters))
    assert num_resident(stack) == NUM_ADAPTERS, "each was loaded once"
    await asyncio.sleep(PLACE_EVERY_S + 0.2)  # by now they have homes by demand
    places: dict[int, list[str]] = {adapter: [] for adapter in adapters}
    for turn in range(4):
        prompt = WORDS * (6 + 4 * turn)
        found = await asyncio.gather(*(ask(stack, adapter, f"chat {adapter} {prompt}") for adapter in adapters))
        for adapter, (replica_id, num_cached) in enumerate(found):
            places[adapter].append(replica_id)
            before = len(f"chat {adapter} " + WORDS * (6 + 4 * (turn - 1)))
            assert not turn or num_cached >= before - BLOCK, f"{adapter=} {turn=} {num_cached=} {places=}"
        await until(stack.idle)
    assert all(len(set(where)) == 1 for where in places.values()), places
    assert len({where[0] for where in places.values()}) == NUM_REPLICAS
    assert num_resident(stack) <= NUM_ADAPTERS + NUM_REPLICAS, "second copies are left from moving, if any"


async def test_one_adapter_and_one_prompt_are_two_prefixes_for_two_tenants(stack: Stack) -> None:
    prompt = WORDS * 10
    await ask(stack, 1, prompt)
    await until(stack.idle)
    here, warm = await ask(stack, 1, prompt)
    assert warm >= len(prompt) - BLOCK
    there, theirs = await ask(stack, 1, prompt, "other")
    assert theirs == 0, "no tenant can hit, or time, another's blocks"
    assert there == here, "the adapter itself is shared: loaded once"
    _, narrowed = await ask(stack, 1, prompt, cache_salt="of one user")
    assert narrowed == 0
    _, other_adapter = await ask(stack, 2, prompt)
    assert other_adapter == 0
    assert (await ask(stack, 1, prompt))[1] >= len(prompt) - BLOCK
