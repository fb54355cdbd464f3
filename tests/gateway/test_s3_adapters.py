"""Adapters in an object store, all the way: a real S3 server, catalogue, cache, native engine."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from configs.schema import AdapterFilesConfig, AdapterSourceConfig
from tests.configs.s3_server import BUCKET, S3, s3
from tests.gateway.test_adapter_sources import eventually, status, unreachable, until_async
from tests.gateway.test_adapters_api import adapters, add
from tests.gateway.test_compose import Stack, running, until
from tests.gateway.test_lora import World, host, load, profile, says, valkey, world
from tests.routing.conftest import Valkey

__all__ = ["s3", "valkey", "world"]


@pytest.fixture
async def stack(valkey: Valkey, world: World, s3: S3) -> AsyncIterator[Stack]:
    source = AdapterSourceConfig(url=f"s3://{BUCKET}/team", base_model="m", poll_s=0.2, timeout_s=5.0)
    config = msgspec.structs.replace(
        profile(world),
        adapter_sources=(source,),
        adapter_files=AdapterFilesConfig(roots=(str(world.folder), f"s3://{BUCKET}/shared"), fetch_timeout_s=5.0),
    )
    async with running(config, valkey) as stack:
        await host(stack)
        yield stack


async def put(s3: S3, folder: Path, prefix: str) -> None:
    await asyncio.to_thread(s3.put, folder, prefix)


async def test_a_bucket_is_a_source(stack: Stack, world: World, s3: S3) -> None:
    await put(s3, world.adapters["a"].path, "team/x")
    await put(s3, world.adapters["b"].path, "team/y")
    found = await eventually(stack, lambda found: {"x", "y"} <= found.keys())
    assert found["x"]["path"] == f"s3://{BUCKET}/team/x" and found["x"]["num_bytes"] > 0
    assert (await says(stack, "x"), await says(stack, "y")) == (world.says("a"), world.says("b"))
    await put(s3, world.adapters["c"].path, "team/x")
    await eventually(stack, lambda found: found["x"]["version"] == "2")
    assert await says(stack, "x") == world.says("c")
    await asyncio.to_thread(s3.remove, "team/y")
    await eventually(stack, lambda found: "y" not in found)
    await asyncio.to_thread(s3.stop)
    await until_async(lambda: unreachable(stack))
    assert "cannot be read" in (await status(stack)).error
    assert await says(stack, "x") == world.says("c"), "what is known goes on"


async def test_a_replica_fetches_what_is_not_in_its_cache_and_checks_that_it_is_the_same(
    stack: Stack, world: World, s3: S3
) -> None:
    await put(s3, world.adapters["a"].path, "shared/x")
    assert (await add(stack, "x", f"s3://{BUCKET}/shared/x"))[0] == 201
    cache = stack.runtime.home / "adapters"

    async def leaves_its_slot() -> None:
        shutil.rmtree(cache)
        for name in ("b", "c"):  # both slots
            await load(stack, name, world.adapters[name])
            await says(stack, name)
        await until(lambda: "x@1" not in stack.composed.fleet.states("m")[0].adapters)

    await leaves_its_slot()
    assert await says(stack, "x") == world.says("a") and len(list(cache.iterdir())) == 1
    await put(s3, world.adapters["b"].path, "shared/x")
    await leaves_its_slot()
    assert "have changed since it was added" in (await says(stack, "x"))["message"]
    assert list(cache.iterdir()) == []


async def test_paths_must_lie_within_the_roots(stack: Stack, world: World, s3: S3, tmp_path: Path) -> None:
    shutil.copytree(world.adapters["a"].path, tmp_path / "outside")
    link = world.folder / "link"
    link.symlink_to(tmp_path / "outside")
    try:
        for path in (
            str(tmp_path / "outside"),
            str(link),
            f"s3://{BUCKET}/team/x",
            "/etc",
            f"file://{tmp_path}/outside",
        ):
            status, error = await add(stack, "x", path)
            assert (status, error["code"]) == (400, "adapter_not_loadable"), error
            assert (
                error["message"] == f"{path} does not lie within adapter_files.roots (links resolved), as adapters must"
            )
    finally:
        link.unlink()
    assert (await add(stack, "y", world.adapters["a"].path))[0] == 201
    assert (await adapters(stack))["x"]["state"] == "failed"


async def test_a_replica_refuses_what_was_written_past_the_gateway(stack: Stack, world: World, tmp_path: Path) -> None:
    from routing.adapters import Adapter, AdapterRegistry
    from routing.store import Store

    shutil.copytree(world.adapters["a"].path, tmp_path / "outside")
    store = Store(stack.valkey.url, "test")
    try:
        await AdapterRegistry(store).add(Adapter(name="z", base_model="m", path=str(tmp_path / "outside"), rank=4))
    finally:
        await store.close()
    await asyncio.sleep(0.6)
    error = await says(stack, "z")
    assert error["code"] == "model_not_found" and "does not lie within adapter_files.roots" in error["message"]


async def test_a_store_that_is_away_is_no_fault_of_the_adapter(stack: Stack, s3: S3) -> None:
    await asyncio.to_thread(s3.stop)
    status, error = await add(stack, "x", f"s3://{BUCKET}/shared/x")
    assert (status, error["code"]) == (503, "adapter_unreachable")
    assert "x" not in await adapters(stack)
