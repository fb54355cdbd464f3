"""LoRA over HTTP, all the way: administrators' routes, catalogue in Valkey, routing, the native engine on a tiny model
that loads adapters from disk, and answers that are those of merged weights."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedModel

import gateway.line as line_module
import routing.adapters as adapters_module
from configs.schema import (
    AdapterConfig,
    ChannelConfig,
    Config,
    EngineConfig,
    GroupConfig,
    ModelConfig,
    RedisConfig,
    TenantConfig,
)
from routing.adapters import AdapterRegistry
from routing.store import Store
from tests.gateway.test_compose import Stack, running, until
from tests.replicas.engine.lora_kit import Written, write_adapter
from tests.replicas.engine.tiny import VOCAB, make_tiny, oracle_logits
from tests.routing import conftest as routing_conftest
from tests.routing.conftest import Valkey

valkey = routing_conftest.valkey

ROOT, USER = ({"authorization": f"Bearer sk-{name}"} for name in ("root", "user"))
ENGINE = EngineConfig(
    dtype="float32", kv_cache_gib=0.01, max_model_len=128, max_num_seqs=8, max_adapters=2, max_lora_rank=16,
    lora_pool_gib=0.05, self_check=False, structured=False,
)  # fmt: skip
PROMPT = [5, 9, 33, 71, 8, 12]


@dataclass(frozen=True)
class World:
    """A tiny model on disk, and some adapters of it."""

    folder: Path
    model: PreTrainedModel
    adapters: dict[str, Written]

    def says(self, adapter: str | None, count: int = 6) -> list[int]:
        """Greedy tokens of the model merged with an adapter, everything recomputed for each."""
        return self.greedy(self.model if adapter is None else self.adapters[adapter].merged(self.model), count)

    def greedy(self, model: PreTrainedModel, count: int) -> list[int]:
        """What a model says next, the likeliest token each time."""
        tokens = list(PROMPT)
        for _ in range(count):
            tokens.append(int(oracle_logits(model, tokens)[-1].argmax()))
        return tokens[len(PROMPT) :]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tiny")
    model = make_tiny("llama", folder)
    Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0")).save(str(folder / "tokenizer.json"))
    adapters = {
        name: write_adapter(folder / "adapters" / name, model, rank=rank, seed=rank)
        for name, rank in (("a", 4), ("b", 8), ("c", 16), ("large", 64))
    }
    return World(folder, model, adapters)


def profile(world: World, **changes: Any) -> Config:
    """Model `m` with adapter `declared`; `root` is an administrator."""
    declared = AdapterConfig(name="declared", base_model="m", path=str(world.adapters["c"].path), rank=16)
    return Config(
        cluster="test",
        models=(ModelConfig(id="m", source=str(world.folder), default_max_tokens=16),),
        groups=(GroupConfig(name="g", model="m", engine=msgspec.structs.replace(ENGINE, **changes)),),
        adapters=(declared,),
        tenants=(TenantConfig(id="root", keys=("sk-root",), admin=True), TenantConfig(id="user", keys=("sk-user",))),
        channel=ChannelConfig(heartbeat_s=0.2, dead_after_s=2.0),
        redis=RedisConfig(timeout_s=5.0),  # the engine shares this process: an answer may be read late
    )


@pytest.fixture
async def stack(valkey: Valkey, world: World) -> AsyncIterator[Stack]:
    async with running(profile(world), valkey) as stack:
        yield stack


async def host(stack: Stack) -> None:
    await stack.host("m", stack.config.groups[0].engine)


async def says(stack: Stack, name: str, count: int = 6) -> Any:
    """Token ids of a greedy completion, or the error."""
    body = {"model": name, "prompt": PROMPT, "max_tokens": count, "temperature": 0, "return_token_ids": True}
    answer = (await stack.client.post("/v1/completions", json={**body, "ignore_eos": True}, headers=USER)).json()
    return answer["choices"][0]["token_ids"] if "choices" in answer else answer["error"]


async def load(stack: Stack, name: str, written: Written | str, **fields: Any) -> tuple[int, Any]:
    path = written if isinstance(written, str) else str(written.path)
    body = {"lora_name": name, "lora_path": path, **fields}
    answer = await stack.client.post("/v1/load_lora_adapter", json=body, headers=ROOT)
    return answer.status_code, answer.text if answer.status_code == 200 else answer.json()["error"]


async def unload(stack: Stack, name: str) -> tuple[int, Any]:
    answer = await stack.client.post("/v1/unload_lora_adapter", json={"lora_name": name}, headers=ROOT)
    return answer.status_code, answer.text if answer.status_code == 200 else answer.json()["error"]


async def test_a_loaded_adapter_is_served_listed_and_goes_again(stack: Stack, world: World) -> None:
    await host(stack)
    assert await load(stack, "x", world.adapters["b"]) == (200, "Success: LoRA adapter 'x' added successfully.")
    assert await says(stack, "x") == world.says("b") != world.says(None)
    assert await says(stack, "m") == world.says(None)
    cards = {c["id"]: c for c in (await stack.client.get("/v1/models", headers=USER)).json()["data"]}
    assert (cards["x"]["parent"], cards["x"]["root"]) == ("m", "x@1")
    assert await unload(stack, "x") == (200, "Success: LoRA adapter 'x' removed successfully.")
    assert (await says(stack, "x"))["code"] == "model_not_found"
    status, error = await unload(stack, "x")
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "lora_name")
    assert error["message"] == "The lora adapter 'x' cannot be found."


async def test_adapters_of_a_profile_are_loaded_when_asked_for(stack: Stack, world: World) -> None:
    await host(stack)
    assert await says(stack, "declared") == world.says("c")
    assert (await unload(stack, "declared"))[0] == 200
    assert (await says(stack, "declared"))["code"] == "model_not_found"


async def test_more_adapters_than_slots_take_turns(stack: Stack, world: World) -> None:
    await host(stack)
    for name in ("a", "b", "c"):
        assert (await load(stack, name, world.adapters[name]))[0] == 200
    expected = {name: world.says(name) for name in ("a", "b", "c")}
    for _ in range(2):
        answers = await asyncio.gather(*(says(stack, name) for name in expected))
        assert answers == list(expected.values())
    (state,) = stack.composed.fleet.states("m")
    assert len(state.adapters) == 2


async def test_a_reloaded_name_is_a_new_version_and_running_answers_keep_theirs(stack: Stack, world: World) -> None:
    await host(stack)
    folder = world.folder / "reloaded"
    shutil.copytree(world.adapters["a"].path, folder)
    assert (await load(stack, "x", str(folder)))[0] == 200
    status, error = await load(stack, "x", str(folder))
    assert status == 400 and "has already been loaded" in error["message"] and "load_inplace" in error["message"]
    running_ = asyncio.create_task(says(stack, "x", 100))
    await until(lambda: stack.composed.fleet.states("m")[0].num_running > 0)
    fresh = world.folder / "fresh"
    shutil.copytree(world.adapters["b"].path, fresh)
    assert (await load(stack, "x", str(fresh), load_inplace=True))[0] == 200
    assert await says(stack, "x") == world.says("b")
    assert (await running_)[:6] == world.says("a")
    assert await says(stack, "x@1") == world.says("a")
    same = await stack.client.post(
        "/v1/load_lora_adapter",
        json={"lora_name": "x", "lora_path": str(fresh), "load_inplace": True},
        headers=ROOT,
    )
    assert same.headers["x-warmgate-adapter"] == "x@2", "the same weights keep their version, and their caches"
    assert (await load(stack, "x", world.adapters["c"], load_inplace=True))[0] == 200
    assert (await says(stack, "x@1"))["code"] == "model_not_found", "two versions are kept"
    assert (await says(stack, "x@2"), await says(stack, "x")) == (world.says("b"), world.says("c"))


async def test_what_cannot_be_loaded_is_told_and_changes_nothing(stack: Stack, world: World) -> None:
    await host(stack)
    assert (await load(stack, "x", world.adapters["a"]))[0] == 200
    broken = world.folder / "broken"
    shutil.copytree(world.adapters["b"].path, broken)
    config = json.loads((broken / "adapter_config.json").read_text())
    (broken / "adapter_config.json").write_text(json.dumps({**config, "use_dora": True}))
    other = world.folder / "other"
    shutil.copytree(world.adapters["b"].path, other)
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    for path, words in (
        (str(broken), "DoRA cannot be served"),
        (str(world.adapters["large"].path), "has rank 64, the most is 16"),
        (str(other), "trained on 'org/other', which is none of the names of this model (engine.lora_base_models): m"),
        (str(world.folder / "nowhere"), "adapter_config.json is missing"),
        ("~nosuchuser/x", "'~nosuchuser/x' names no folder"),
        ("/" + "a" * 300, "File name too long"),
    ):
        status, error = await load(stack, "x", path, load_inplace=True)
        assert (status, error["code"], error["param"]) == (400, "adapter_not_loadable", "lora_path"), error
        assert words in error["message"]
        assert await says(stack, "x") == world.says("a")
    listed = {c["id"] for c in (await stack.client.get("/v1/models", headers=USER)).json()["data"]}
    assert listed == {"m", "declared", "x"}


async def test_files_that_changed_after_they_were_added_are_refused(stack: Stack, world: World) -> None:
    await host(stack)
    folder = world.folder / "changing"
    shutil.copytree(world.adapters["a"].path, folder)
    assert (await load(stack, "x", str(folder)))[0] == 200
    for name in ("b", "c"):  # takes both slots
        await load(stack, name, world.adapters[name])
        await says(stack, name)
    await until(lambda: "x@1" not in stack.composed.fleet.states("m")[0].adapters)
    shutil.copytree(world.adapters["b"].path, folder, dirs_exist_ok=True)
    config = json.loads((folder / "adapter_config.json").read_text())
    write_adapter(folder, world.model, rank=4, seed=99)
    assert json.loads((folder / "adapter_config.json").read_text())["r"] != config["r"]
    error = await says(stack, "x")
    assert "have changed since it was added" in error["message"]


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"lora_name": "m"}, 400, None),
        ({"lora_name": "../x"}, 400, "invalid_value"),
        ({"lora_path": ""}, 400, "invalid_value"),
        ({"lora_path": "relative/path"}, 400, None),
        ({"base_model": "nobody"}, 404, "model_not_found"),
        ({"owner": "nobody"}, 400, None),
        ({"rank": 0}, 400, "invalid_value"),
    ],
    ids=str,
)
async def test_bad_fields_are_refused(fields: dict[str, Any], status: int, code: str | None, stack: Stack) -> None:
    body = {"lora_name": "x", "lora_path": "/x", **fields}
    answer = await stack.client.post("/v1/load_lora_adapter", json=body, headers=ROOT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text


async def test_only_administrators_may(stack: Stack) -> None:
    for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
        body = {"lora_name": "x", "lora_path": "/x"}
        refused = await stack.client.post(path, json=body, headers=USER)
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "admin_required")
        assert (await stack.client.post(path, json=body)).status_code == 401


async def test_an_owner_s_adapter_is_nobody_else_s(stack: Stack, world: World) -> None:
    await host(stack)
    assert (await load(stack, "x", world.adapters["a"], owner="root"))[0] == 200
    assert (await says(stack, "x"))["code"] == "model_not_found"


async def test_a_new_version_is_its_owner_s_unless_another_is_named(stack: Stack, world: World) -> None:
    await host(stack)
    assert (await load(stack, "x", world.adapters["a"], owner="root"))[0] == 200
    assert (await load(stack, "x", world.adapters["b"], load_inplace=True))[0] == 200
    assert (await says(stack, "x"))["code"] == "model_not_found"
    assert (await load(stack, "x", world.adapters["b"], load_inplace=True))[0] == 200, "the same weights"
    assert (await says(stack, "x"))["code"] == "model_not_found"
    assert (await load(stack, "x", world.adapters["b"], load_inplace=True, owner="user"))[0] == 200
    assert await says(stack, "x") == world.says("b")


async def test_a_name_that_comes_back_hours_later_has_its_new_weights(
    stack: Stack, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await host(stack)
    assert (await load(stack, "x", world.adapters["a"]))[0] == 200
    assert await says(stack, "x") == world.says("a")
    assert (await unload(stack, "x"))[0] == 200
    await asyncio.sleep(0.6)  # every watch has seen that it is gone
    monkeypatch.setattr(adapters_module, "FORGET_S", -5.0)
    assert (await load(stack, "y", world.adapters["c"]))[0] == 200
    monkeypatch.undo()
    status, answer = await load(stack, "x", world.adapters["b"])
    assert status == 200, answer
    assert await says(stack, "x") == world.says("b") != world.says("a")


async def test_a_new_name_is_not_listed_before_its_trial_has_gone_well(stack: Stack, world: World) -> None:
    await host(stack)
    other = world.folder / "misfit"
    shutil.copytree(world.adapters["b"].path, other)
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/other"}))
    seen: set[str] = set()

    async def look() -> None:
        while True:
            await stack.composed.adapters.refresh()
            seen.update(adapter.name for adapter in stack.composed.adapters.catalogue.current())

    looking = asyncio.create_task(look())
    assert (await load(stack, "new", str(other)))[0] == 400
    looking.cancel()
    assert seen == {"declared"}


async def test_without_redis_nothing_is_loaded_and_everything_known_goes_on(stack: Stack, world: World) -> None:
    await host(stack)
    assert (await load(stack, "x", world.adapters["a"]))[0] == 200
    stack.valkey.kill()
    status, error = await load(stack, "y", world.adapters["b"])
    assert (status, error["code"]) == (503, "registry_unavailable")
    assert (await unload(stack, "x"))[0] == 503
    assert await says(stack, "x") == world.says("a")


async def test_no_replica_is_no_success(stack: Stack, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_module, "NO_REPLICA_S", 0.2)
    store = Store(stack.valkey.url, "test")
    try:
        status, error = await load(stack, "x", world.adapters["a"])
        assert (status, error["code"]) == (503, "no_replica_available")
        entries = await AdapterRegistry(store).read()
        assert all(entry.removed for entry in entries.values())
    finally:
        await store.close()
