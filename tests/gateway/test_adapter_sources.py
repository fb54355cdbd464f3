"""A watched folder of adapters, all the way: catalogue in Valkey, trial on the native engine, its answers."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

import gateway.line as line_module
import gateway.source_plan as source_plan
from configs.adapters import remote
from configs.adapters.remote import UnreachableError
from configs.schema import AdapterConfig, AdapterSourceConfig
from gateway.adapter_admin import AdapterAdmin, NewAdapter
from gateway.compose import compose
from gateway.errors import ApiError, DeadlineError, InternalError, ReplicaLostError
from gateway.source_plan import Plan, Seen, plan
from routing.adapter_sources import FolderRecord, SourceBoard, SourceStatus
from routing.adapters import EMPTY, Adapter, AdapterRegistry, Catalogue, Entry
from routing.store import Store
from tests.gateway.test_adapters_api import adapters, add
from tests.gateway.test_compose import Stack, running, until
from tests.gateway.test_lora import ROOT, World, host, load, profile, says, unload, valkey, world
from tests.replicas.engine.lora_kit import write_adapter
from tests.routing.conftest import Valkey

__all__ = ["valkey", "world"]

SOURCE = AdapterSourceConfig(url="file:///adapters", base_model="m", poll_s=0.1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "adapters"
    made.mkdir()
    return made


@pytest.fixture
async def stack(valkey: Valkey, world: World, folder: Path) -> AsyncIterator[Stack]:
    """A replica, and a source that is empty."""
    source = AdapterSourceConfig(url=f"file://{folder}", base_model="m", poll_s=0.1)
    config = msgspec.structs.replace(profile(world), adapter_sources=(source,))
    async with running(config, valkey) as stack:
        await host(stack)
        yield stack


def put(world: World, adapter: str, to: Path) -> None:
    shutil.copytree(world.adapters[adapter].path, to, dirs_exist_ok=True)


async def eventually(stack: Stack, holds: Callable[[dict[str, Any]], bool], seconds: float = 30.0) -> dict[str, Any]:
    """The adapters, once they are so."""
    found: dict[str, Any] = {}
    for _ in range(round(seconds / 0.05)):
        found = await adapters(stack)
        if holds(found):
            return found
        await asyncio.sleep(0.05)
    raise AssertionError(found)


async def status(stack: Stack) -> SourceStatus:
    store = Store(stack.valkey.url, "test")
    try:
        (found,) = (await SourceBoard(store).statuses()).values()
        return found
    finally:
        await store.close()


async def test_folders_become_adapters_new_weights_new_versions_and_gone_folders_go(
    stack: Stack, world: World, folder: Path
) -> None:
    put(world, "a", folder / "x")
    put(world, "b", folder / "y")
    (folder / "notes").mkdir()
    (folder / "notes" / "readme.txt").write_text("no adapter")
    put(world, "a", folder / ".uploading")
    found = await eventually(stack, lambda found: {"x", "y"} <= found.keys())
    assert set(found) == {"declared", "x", "y"}
    assert (found["x"]["version"], found["x"]["source"], found["x"]["path"]) == (
        "1", f"file://{folder}", f"file://{folder}/x",
    )  # fmt: skip
    assert found["x"]["num_bytes"] > 0 and found["declared"]["source"] is None
    assert (await says(stack, "x"), await says(stack, "y")) == (world.says("a"), world.says("b"))
    put(world, "c", folder / "x")
    await eventually(stack, lambda found: found["x"]["version"] == "2")
    assert await says(stack, "x") == world.says("c")
    shutil.rmtree(folder / "y")
    await eventually(stack, lambda found: "y" not in found)
    assert (await says(stack, "y"))["code"] == "model_not_found"
    await until_async(lambda: has_adapters(stack, 1))
    metrics = (await stack.client.get("/metrics")).text
    url = f"file://{folder}"
    for line in (
        f'warmgate_adapter_source_adapters{{source="{url}"}} 1.0',
        f'warmgate_adapter_source_up{{source="{url}"}} 1.0',
        f'warmgate_adapter_source_changes_total{{change="added",source="{url}"}} 3.0',
        f'warmgate_adapter_source_changes_total{{change="removed",source="{url}"}} 1.0',
    ):
        assert line in metrics


async def has_adapters(stack: Stack, number: int) -> bool:
    return (await status(stack)).num_adapters == number


async def test_a_broken_new_version_leaves_the_old_one_served_even_after_it_left_its_slot(
    stack: Stack, world: World, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(world, "a", folder / "x")
    await eventually(stack, lambda found: "x" in found)
    with caplog.at_level(logging.WARNING, "warmgate.adapters"):
        (folder / "x" / "adapter_model.safetensors").write_bytes(b"not weights")
        found = await eventually(stack, lambda found: found["x"]["last_failure"] is not None)
        assert found["x"]["version"] == "1" and f"file://{folder}/x" in found["x"]["last_failure"]
        await asyncio.sleep(0.5)
    assert len([r for r in caplog.records if "is not added" in r.getMessage()]) == 1, "tried once, told once"
    for name in ("b", "c"):  # both slots
        await load(stack, name, world.adapters[name])
        await says(stack, name)
    await until(lambda: "x@1" not in stack.composed.fleet.states("m")[0].adapters)
    assert await says(stack, "x") == world.says("a"), "from its copy"
    assert "x" in (await status(stack)).failed
    put(world, "b", folder / "x")
    await eventually(stack, lambda found: found["x"]["version"] != "1" and found["x"]["last_failure"] is None)
    assert await says(stack, "x") == world.says("b")


async def test_what_cannot_be_an_adapter_is_noted_and_harms_nobody(stack: Stack, world: World, folder: Path) -> None:
    put(world, "a", folder / "bad name")
    put(world, "a", folder / "m")
    put(world, "large", folder / "large")
    put(world, "a", folder / "elsewhere")
    config = json.loads((folder / "elsewhere" / "adapter_config.json").read_text())
    (folder / "elsewhere" / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": "org/other"})
    )
    put(world, "a", folder / "half")
    (folder / "half" / "adapter_model.safetensors").unlink()
    write_adapter(folder / "nan", world.model, rank=4, seed=1)
    spoil(folder / "nan" / "adapter_model.safetensors")
    put(world, "a", folder / "good")
    await eventually(stack, lambda found: "good" in found)
    for _ in range(100):
        failed = (await status(stack)).failed
        if len(failed) == 6:
            break
        await asyncio.sleep(0.05)
    assert set(failed) == {"bad name", "m", "large", "elsewhere", "half", "nan"}
    assert "no finite numbers" in failed["nan"]
    assert "letters, digits" in failed["bad name"] and "conflicts with a served base model" in failed["m"]
    assert "rank 64, the most is 16" in failed["large"] and "'org/other'" in failed["elsewhere"]
    assert "adapter_model.safetensors is missing" in failed["half"]
    assert (await adapters(stack))["half"]["state"] == "failed"
    shutil.rmtree(folder / "half")
    await eventually(stack, lambda found: "half" not in found)


def spoil(weights: Path) -> None:
    """NaN in the last of its values."""
    weights.write_bytes(weights.read_bytes()[:-4] + b"\x00\x00\xc0\x7f")


async def test_links_that_lead_out_of_a_source_are_refused(
    stack: Stack, world: World, folder: Path, tmp_path: Path
) -> None:
    put(world, "a", tmp_path / "outside")
    (folder / "whole").symlink_to(tmp_path / "outside")
    put(world, "a", folder / "file")
    (folder / "file" / "adapter_model.safetensors").unlink()
    (folder / "file" / "adapter_model.safetensors").symlink_to(tmp_path / "outside" / "adapter_model.safetensors")
    put(world, "b", folder / "store")
    (folder / "inside").symlink_to(folder / "store")
    found = await eventually(stack, lambda found: {"inside", "store", "whole", "file"} <= found.keys())
    assert (found["inside"]["state"] != "failed", found["store"]["state"] != "failed") == (True, True)
    for name in ("whole", "file"):
        assert found[name]["state"] == "failed" and "does not lie within its source" in found[name]["last_failure"]
        assert "outside" not in found[name]["last_failure"]


async def test_what_an_administrator_added_is_never_touched(stack: Stack, world: World, folder: Path) -> None:
    assert (await add(stack, "x", world.adapters["b"].path))[0] == 201
    put(world, "a", folder / "x")
    put(world, "a", folder / "y")
    await eventually(stack, lambda found: "y" in found)
    assert await says(stack, "x") == world.says("b")
    assert "taken" in (await status(stack)).failed["x"]
    shutil.rmtree(folder / "x")
    assert (await add(stack, "y", world.adapters["c"].path))[0] == 201, "taken over by hand"
    shutil.rmtree(folder / "y")
    await asyncio.sleep(0.5)
    assert (await says(stack, "x"), await says(stack, "y")) == (world.says("b"), world.says("c"))


async def test_what_an_administrator_removed_stays_away_until_its_files_change(
    stack: Stack, world: World, folder: Path
) -> None:
    put(world, "a", folder / "x")
    await eventually(stack, lambda found: "x" in found)
    assert (await unload(stack, "x"))[0] == 200
    await asyncio.sleep(0.6)
    assert "x" not in await adapters(stack)
    put(world, "b", folder / "x")
    await eventually(stack, lambda found: "x" in found)
    assert await says(stack, "x") == world.says("b")


async def test_a_source_that_vanishes_unloads_nobody_and_an_empty_one_is_believed(
    stack: Stack, world: World, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    put(world, "a", folder / "x")
    put(world, "b", folder / "y")
    await eventually(stack, lambda found: {"x", "y"} <= found.keys())
    with caplog.at_level(logging.WARNING, "warmgate.adapters"):
        move(folder, folder.with_name("away"))
        await until_async(lambda: unreachable(stack))
        put_mount_point(folder)
        await until_async(lambda: unmounted(stack))
        assert {"x", "y"} <= (await adapters(stack)).keys()
        assert await says(stack, "x") == world.says("a")
    assert len([r for r in caplog.records if "cannot be read" in r.getMessage()]) == 2, "once for each reason"
    keeper = stack.composed.sources.keepers[0]
    assert keeper.counts.looks["unreachable"] > 1 and not keeper.counts.reachable
    move(folder.with_name("away"), folder)
    await until_async(lambda: reachable(stack))
    for name in ("x", "y"):
        shutil.rmtree(folder / name)
    await eventually(stack, lambda found: set(found) == {"declared"})


def move(folder: Path, to: Path) -> None:
    """An empty folder in the way is replaced."""
    folder.rename(to)


def put_mount_point(folder: Path) -> None:
    """The empty folder that something was mounted on."""
    folder.mkdir()


async def unreachable(stack: Stack) -> bool:
    return bool((await status(stack)).error)


async def unmounted(stack: Stack) -> bool:
    return "is it not mounted" in (await status(stack)).error


async def reachable(stack: Stack) -> bool:
    return not (await status(stack)).error


async def until_async(holds: Callable[[], Any]) -> None:
    for _ in range(200):
        if await holds():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it did not come about")


async def test_without_redis_nothing_changes_and_nothing_fails(stack: Stack, world: World, folder: Path) -> None:
    put(world, "a", folder / "x")
    await eventually(stack, lambda found: "x" in found)
    stack.valkey.kill()
    shutil.rmtree(folder / "x")
    await asyncio.sleep(0.6)
    assert await says(stack, "x") == world.says("a")
    stack.valkey.start()
    await until_async(lambda: is_gone(stack, "x"))


async def is_gone(stack: Stack, name: str) -> bool:
    answer = await stack.client.get(f"/v1/adapters/{name}", headers=ROOT)
    return answer.status_code == 404


async def test_without_a_replica_adapters_wait_and_the_log_is_told_once(
    valkey: Valkey, world: World, folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(line_module, "NO_REPLICA_S", 0.2)
    source = AdapterSourceConfig(url=f"file://{folder}", base_model="m", poll_s=0.1)
    for i in range(12):
        put(world, "a", folder / f"x{i}")
    with caplog.at_level(logging.WARNING, "warmgate.adapters"):
        config = msgspec.structs.replace(profile(world), adapter_sources=(source,))
        async with running(config, valkey) as stack:
            await until(lambda: stack.composed.sources.keepers[0].counts.looks["ok"] > 4)
            assert set(await adapters(stack)) == {"declared"}
            assert len([r for r in caplog.records if "is left for now" in r.getMessage()]) == 1
            await host(stack)
            await eventually(stack, lambda found: len(found) == 13, 20.0)


async def test_a_profile_s_adapter_may_be_at_a_url_too(valkey: Valkey, world: World, folder: Path) -> None:
    put(world, "b", folder / "x")
    adapter = AdapterConfig(name="declared", base_model="m", path=f"file://{folder}/x", rank=8)
    config = msgspec.structs.replace(profile(world), adapters=(adapter,))
    async with running(config, valkey) as stack:
        await host(stack)
        assert await says(stack, "declared") == world.says("b")
        (copy,) = (stack.runtime.home / "adapters").iterdir()
        assert {path.name for path in copy.iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}


async def test_one_folder_that_cannot_be_read_keeps_nobody_else_out(
    stack: Stack, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = remote._copy

    def failing(path: Path, *rest: Any) -> None:
        if path.parent.name == "away":
            raise UnreachableError(f"{path} cannot be read: Input/output error")
        copy(path, *rest)

    monkeypatch.setattr(remote, "_copy", failing)
    put(world, "a", folder / "away")
    put(world, "b", folder / "x")
    await eventually(stack, lambda found: "x" in found)
    await until_async(lambda: has_failed(stack, "away"))
    assert "away" not in await adapters(stack)


async def has_failed(stack: Stack, name: str) -> bool:
    return name in (await status(stack)).failed


@pytest.mark.parametrize("error", [ReplicaLostError("it died"), InternalError("a bug"), DeadlineError("too late")])
async def test_a_folder_whose_trial_goes_wrong_keeps_nobody_else_out(
    stack: Stack, world: World, folder: Path, error: ApiError, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And it is not tried at every look: it may be what ends engines."""
    load_it, tried = AdapterAdmin.load, list[str]()

    async def stumbling(admin: AdapterAdmin, asked: NewAdapter, *rest: Any) -> Adapter:
        if asked.name == "a-bad":
            tried.append(asked.name)
            raise error
        return await load_it(admin, asked, *rest)

    monkeypatch.setattr(AdapterAdmin, "load", stumbling)
    for name in ("a-bad", "x", "y"):
        put(world, "a", folder / name)
    await eventually(stack, lambda found: {"x", "y"} <= found.keys())
    await asyncio.sleep(0.5)
    assert tried == ["a-bad"]


async def test_a_name_that_an_administrator_takes_during_a_trial_stays_theirs(
    stack: Stack, world: World, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    try_it = AdapterAdmin._try

    async def overtaken(admin: AdapterAdmin, adapter: Adapter, *rest: Any) -> None:
        await try_it(admin, adapter, *rest)
        if adapter.source:
            store = Store(stack.valkey.url, "test")
            await AdapterRegistry(store).add(
                Adapter(name="x", base_model="m", version="mine", path=str(world.adapters["b"].path))
            )
            await store.close()

    monkeypatch.setattr(AdapterAdmin, "_try", overtaken)
    put(world, "a", folder / "x")
    found = await eventually(stack, lambda found: found.get("x", {}).get("version") == "mine")
    await asyncio.sleep(0.5)
    found = await adapters(stack)
    assert (found["x"]["version"], found["x"]["source"]) == ("mine", None)
    assert (await says(stack, "x@1"))["code"] == "model_not_found", "what was tried for the source is gone"


async def test_one_ingress_looks_after_a_source_and_another_takes_over(
    stack: Stack, world: World, folder: Path
) -> None:
    second = await compose(stack.config, stack.runtime)
    await second.start()
    try:
        await until(lambda: stack.composed.sources.keepers[0].counts.looks["ok"] > 2)
        assert second.sources.keepers[0].counts.looks["ok"] == 0
        put(world, "a", folder / "x")
        await until_async(lambda: has_adapters(stack, 1))
        await stack.composed.sources.close()
        put(world, "b", folder / "y")
        await eventually(stack, lambda found: "y" in found)
        assert second.sources.keepers[0].counts.changes == {"added": 1, "failed": 0, "removed": 0}, "x was known"
    finally:
        await second.close()


# The plan alone.


def seen(now: dict[str, str], before: dict[str, str] | None, **known: FolderRecord) -> Seen:
    return Seen(now, before, known)


def has(*adapters: Adapter) -> Catalogue:
    return Catalogue(Entry(adapter=a, at_us=i) for i, a in enumerate(adapters))


def own(name: str) -> Adapter:
    return Adapter(name=name, base_model="m", source=SOURCE.url)


def test_only_what_two_looks_saw_alike_is_taken() -> None:
    assert plan(SOURCE, seen({"x": "1"}, None), EMPTY, 0.0) == Plan(num_waiting=1)
    assert plan(SOURCE, seen({"x": "2"}, {"x": "1"}), EMPTY, 0.0) == Plan(num_waiting=1)
    assert plan(SOURCE, seen({"x": "2"}, {"x": "2"}), EMPTY, 0.0) == Plan(load={"x": "2"})


def test_only_what_two_looks_missed_goes() -> None:
    assert plan(SOURCE, seen({}, None), has(own("x")), 0.0).remove == []
    assert plan(SOURCE, seen({}, {"x": "1"}), has(own("x")), 0.0).remove == []
    assert plan(SOURCE, seen({}, {}), has(own("x"), Adapter(name="y", base_model="m")), 0.0).remove == ["x"]


def test_a_failure_is_tried_again_when_something_changes_or_slowly() -> None:
    failed = FolderRecord(fingerprint="1", at=100.0, failure="why")
    same, later = {"x": "1"}, 100.0 + source_plan.RETRY_S
    assert plan(SOURCE, seen(same, same, x=failed), EMPTY, later - 1).load == {}
    assert plan(SOURCE, seen(same, same, x=failed), EMPTY, later).load == same
    assert plan(SOURCE, seen({"x": "2"}, {"x": "2"}, x=failed), EMPTY, 101.0).load == {"x": "2"}


def test_a_new_owner_in_the_profile_is_one_of_its_adapters_too() -> None:
    taken = FolderRecord(fingerprint="1", at=0.0, adapter_id="x@1")
    same = {"x": "1"}
    assert plan(SOURCE, seen(same, same, x=taken), has(own("x")), 0.0).load == {}
    changed = msgspec.structs.replace(SOURCE, owner="acme")
    assert plan(changed, seen(same, same, x=taken), has(own("x")), 0.0).load == same


def test_a_name_is_its_first_source_s_as_long_as_a_profile_has_that() -> None:
    same, other = {"x": "1"}, Adapter(name="x", base_model="m", source="file:///other")
    with_other = Seen(same, same, {}, frozenset({"file:///other"}))
    assert "is of file:///other" in plan(SOURCE, with_other, has(other), 0.0).refuse["x"]
    assert plan(SOURCE, seen(same, same), has(other), 0.0).load == same, "that source is no more: it was moved here"


def test_more_folders_than_allowed_are_refused_by_name_and_none_is_removed() -> None:
    few = msgspec.structs.replace(SOURCE, max_adapters=1)
    same = {"x": "1", "y": "1"}
    chosen = plan(few, seen(same, same), has(own("y")), 0.0)
    assert (chosen.load, set(chosen.refuse), chosen.remove) == ({"x": "1"}, {"y"}, [])


def test_names_that_are_no_text_are_told_all_the_same(folder: Path) -> None:
    from configs.adapters.place import Remote
    from configs.adapters.remote import look

    weird = os.fsencode(folder) + b"/\xff\xfe"
    os.mkdir(weird)
    Path(os.fsdecode(weird), "adapter_config.json").write_text("{}")
    (name,) = look(Remote(f"file://{folder}", "file", folder), 1.0).folders
    assert plan(SOURCE, seen({name: "1"}, {name: "1"}), EMPTY, 0.0).refuse.keys() == {name}
    json.dumps(name).encode()


def test_writing_adapters_anew_is_seen_though_size_and_name_stay(folder: Path, world: World) -> None:
    from configs.adapters.place import Remote
    from configs.adapters.remote import look

    place = Remote(f"file://{folder}", "file", folder)
    write_adapter(folder / "x", world.model, rank=4, seed=1)
    before = look(place, 1.0).folders
    write_adapter(folder / "x", world.model, rank=4, seed=2)
    assert look(place, 1.0).folders.keys() == before.keys() and look(place, 1.0).folders != before
