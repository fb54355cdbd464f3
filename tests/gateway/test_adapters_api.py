"""`/v1/adapters`: adapters as resources, on the native engine and a real catalogue."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from routing.adapters import AdapterRegistry, Failure
from routing.store import Store
from tests.gateway.test_compose import Stack, until
from tests.gateway.test_lora import ROOT, USER, World, host, says, stack, valkey, world

__all__ = ["stack", "valkey", "world"]


async def adapters(stack: Stack) -> dict[str, Any]:
    answer = await stack.client.get("/v1/adapters", headers=ROOT)
    assert answer.status_code == 200, answer.text
    assert answer.json()["object"] == "list"
    return {view["id"]: view for view in answer.json()["data"]}


async def add(stack: Stack, name: str, path: str | Path, **fields: Any) -> tuple[int, Any]:
    answer = await stack.client.post("/v1/adapters", json={"name": name, "path": str(path), **fields}, headers=ROOT)
    return answer.status_code, answer.json() if answer.status_code == 201 else answer.json()["error"]


async def test_an_adapter_is_added_ready_and_gone(stack: Stack, world: World) -> None:
    await host(stack)
    assert (await adapters(stack))["declared"]["state"] == "registered"
    status, view = await add(stack, "x", world.adapters["b"].path, pinned=True)
    assert status == 201
    assert (view["id"], view["version"], view["base_model"], view["rank"]) == ("x", "1", "m", 8)
    assert view["pinned"] and view["num_bytes"] > 0 and "last_failure" in view
    await until(lambda: "x@1" in stack.composed.fleet.states("m")[0].adapters)
    one = (await stack.client.get("/v1/adapters/x", headers=ROOT)).json()
    assert (one["state"], one["ready_replicas"], one["loading_replicas"]) == ("ready", 1, 0)
    assert await says(stack, "x") == world.says("b")
    gone = await stack.client.delete("/v1/adapters/x", headers=ROOT)
    assert gone.json() == {"id": "x", "object": "adapter", "deleted": True}
    assert "x" not in await adapters(stack)
    missing = await stack.client.get("/v1/adapters/x", headers=ROOT)
    assert missing.status_code == 404 and missing.json()["error"]["code"] == "model_not_found"
    assert (await stack.client.delete("/v1/adapters/x", headers=ROOT)).status_code == 404


async def test_a_new_version_takes_over_unless_told_not_to(stack: Stack, world: World) -> None:
    await host(stack)
    assert (await add(stack, "x", world.adapters["a"].path))[0] == 201
    status, error = await add(stack, "x", world.adapters["b"].path, replace=False)
    assert status == 400 and "already been loaded" in error["message"]
    assert "'replace' to true" in error["message"] and error["param"] == "name"
    status, error = await add(stack, "x", "somewhere")
    assert (status, error["param"]) == (400, "path") and "'path' must be" in error["message"]
    status, error = await add(stack, "x", world.adapters["b"].path, pinnd=True)
    assert (status, error["param"], error["message"]) == (400, "pinnd", "Unknown field: pinnd.")
    status, view = await add(stack, "x", world.adapters["b"].path)
    assert (status, view["version"]) == (201, "2")
    assert await says(stack, "x") == world.says("b")


async def test_a_failed_load_says_why_and_leaves_the_old_version(stack: Stack, world: World, tmp_path: Path) -> None:
    await host(stack)
    assert (await add(stack, "x", world.adapters["a"].path))[0] == 201
    broken = tmp_path / "broken"
    shutil.copytree(world.adapters["b"].path, broken)
    (broken / "adapter_model.safetensors").write_bytes(b"not a file")
    status, error = await add(stack, "x", broken)
    assert (status, error["code"]) == (400, "adapter_not_loadable")
    view = (await adapters(stack))["x"]
    assert view["version"] == "1" and view["last_failure"] == error["message"]
    assert await says(stack, "x") == world.says("a")
    assert (await add(stack, "x", world.adapters["b"].path))[0] == 201
    assert (await adapters(stack))["x"]["last_failure"] is None


async def test_one_that_never_loaded_is_listed_as_failed_until_it_is_removed(stack: Stack, tmp_path: Path) -> None:
    await host(stack)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4}))
    status, error = await add(stack, "y", tmp_path)
    assert status == 400
    view = (await adapters(stack))["y"]
    assert (view["state"], view["version"], view["last_failure"]) == ("failed", None, error["message"])
    assert (await stack.client.delete("/v1/adapters/y", headers=ROOT)).status_code == 200
    assert "y" not in await adapters(stack)


async def test_only_administrators_look_after_adapters(stack: Stack) -> None:
    for method, path in (("GET", ""), ("POST", ""), ("GET", "/x"), ("DELETE", "/x")):
        answer = await stack.client.request(method, f"/v1/adapters{path}", headers=USER, json={})
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_required")
    wrong = await stack.client.put("/v1/adapters", headers=ROOT, json={})
    assert wrong.status_code == 405 and "error" in wrong.json()
    empty = await stack.client.post("/v1/adapters", headers=ROOT, json={"name": "x"})
    assert empty.status_code == 400 and empty.json()["error"]["param"] == "path"


async def test_failures_that_make_no_sense_are_left_out(stack: Stack) -> None:
    store = Store(stack.runtime.redis_url, stack.config.cluster)
    try:
        registry = AdapterRegistry(store)
        await registry.note_failure(Failure(name="z", path="/p", message="why", at=1.0))
        await store.execute("HSET", store.keys("adapters", "failures"), "bad", b"{garbage")
        assert list(await registry.failures()) == ["z"]
    finally:
        await store.close()
