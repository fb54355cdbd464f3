"""LoRA over HTTP on the native engine: adapters of every rank in one batch, and which of them keep their pages."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest

from replicas.engine.lora.rows import LoraRows, Span
from replicas.engine.lora.store import LoraStore
from tests.gateway.test_compose import Stack, running, until
from tests.gateway.test_lora import ROOT, USER, World, host, load, profile, says, unload, valkey, world
from tests.replicas.engine.lora_kit import Written, write_adapter
from tests.routing.conftest import Valkey

__all__ = ["valkey", "world"]  # fixtures

RANKS = (4, 8, 16, 32, 64, 128)


@pytest.fixture(scope="module")
def mixed(world: World) -> dict[str, Written]:
    """An adapter of each rank."""
    return {f"r{r}": write_adapter(world.folder / f"mixed-{r}", world.model, rank=r, seed=r + 1) for r in RANKS}


@pytest.fixture
async def wide(valkey: Valkey, world: World) -> AsyncIterator[Stack]:
    """Slots for all of them."""
    config = profile(world, max_adapters=8, max_lora_rank=128, lora_pool_gib=0.2)
    async with running(config, valkey) as stack:
        yield stack


@pytest.fixture
async def narrow(valkey: Valkey, world: World) -> AsyncIterator[Stack]:
    async with running(profile(world), valkey) as stack:
        yield stack


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[set[str | None]]:
    """The adapters of every step that had any; None where a row had none."""
    seen: list[set[str | None]] = []
    rows = LoraStore.rows

    def noted(store: LoraStore, spans: Sequence[Span]) -> LoraRows | None:
        seen.append({span.adapter_id for span in spans})
        return rows(store, spans)

    monkeypatch.setattr(LoraStore, "rows", noted)
    return seen


async def settles(stack: Stack, *adapters: str) -> None:
    """The gateway hears from its replica that these are resident, and no others."""
    await until(lambda: stack.composed.fleet.states("m")[0].adapters == set(adapters))


async def both_stay(stack: Stack, *names: str) -> None:
    """Once the replica has heard that nothing is pinned any more, these can be resident together."""
    for _ in range(50):
        for name in names:
            await says(stack, name)
        if stack.composed.fleet.states("m")[0].adapters == {f"{name}@1" for name in names}:
            return
        await asyncio.sleep(0.05)
    pytest.fail(f"{names} never were")


async def test_ranks_4_to_128_share_a_batch_and_none_says_a_token_of_another(
    wide: Stack, world: World, mixed: dict[str, Written], batches: list[set[str | None]]
) -> None:
    await host(wide)
    for name, written in mixed.items():
        assert (await load(wide, name, written))[0] == 200
    listed = {c["id"] for c in (await wide.client.get("/v1/models", headers=USER)).json()["data"]}
    assert listed == {"m", "declared", *mixed}
    batches.clear()
    names = [*mixed, "m"]
    answers = dict(zip(names, await asyncio.gather(*(says(wide, name, 40) for name in names)), strict=True))
    assert {f"{name}@1" for name in mixed} | {None} in batches, "they never met in one step"
    merged = {name: written.merged(world.model) for name, written in mixed.items()}
    for name, model in {**merged, "m": world.model}.items():
        assert answers[name] == world.greedy(model, 40), name


async def test_a_pinned_adapter_keeps_its_pages_while_others_take_turns(narrow: Stack, world: World) -> None:
    await host(narrow)
    names = ("a", "b", "c")
    for name in names:
        assert (await load(narrow, name, world.adapters[name], pinned=name == "a"))[0] == 200
    for _ in range(2):
        for name in ("b", "c"):
            assert await says(narrow, name) == world.says(name)
            await settles(narrow, "a@1", f"{name}@1")
    assert (await unload(narrow, "a"))[0] == 200
    await both_stay(narrow, "b", "c")


async def test_a_new_version_is_pinned_in_the_place_of_the_one_before(narrow: Stack, world: World) -> None:
    await host(narrow)

    def versions() -> dict[str, bool]:
        return {a.adapter_id: a.pinned for a in narrow.composed.gateway.catalogue().versions("x")}

    fields: dict[str, Any] = {"load_inplace": True}
    assert (await load(narrow, "x", world.adapters["a"], pinned=True))[0] == 200
    assert (await load(narrow, "x", world.adapters["b"], **fields))[0] == 200
    assert versions() == {"x@1": True, "x@2": True}
    assert (await load(narrow, "y", world.adapters["c"]))[0] == 200
    for name in ("x", "declared", "y", "declared"):
        assert await says(narrow, name) == world.says({"x": "b"}.get(name, "c"))
    await settles(narrow, "x@2", "declared@1")  # the version before is not pinned any more
    assert (await load(narrow, "x", world.adapters["b"], pinned=False, **fields))[0] == 200
    assert versions() == {"x@1": True, "x@2": False}, "the same weights keep their version"
    await both_stay(narrow, "y", "declared")


async def test_the_field_pinned_is_no_number(narrow: Stack) -> None:
    body = {"lora_name": "x", "lora_path": "/x", "pinned": 1}
    answer = await narrow.client.post("/v1/load_lora_adapter", json=body, headers=ROOT)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "pinned")


async def test_a_replica_begins_with_what_is_pinned(valkey: Valkey, world: World) -> None:
    config = profile(world)
    (declared,) = config.adapters
    pinned = msgspec.structs.replace(declared, pinned=True)
    async with running(msgspec.structs.replace(config, adapters=(pinned,)), valkey) as stack:
        await host(stack)
        await settles(stack, "declared@1")
        assert await says(stack, "declared") == world.says("c")
