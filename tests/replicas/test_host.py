"""A whole replica in this process: sim engine, text, channel on a Unix socket, membership in a real Valkey."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest

from configs.errors import ConfigError
from configs.runtime import Runtime
from configs.schema import ChannelConfig, Config, EngineConfig, GroupConfig, ModelConfig, SimConfig, TenantConfig
from configs.tokenizer import ModelFiles, load_model_files
from replicas.channel import ChannelError, LinkOptions, ReplicaLink
from replicas.contract import (
    Engine,
    EngineDeadError,
    EngineError,
    Fault,
    GenerateRequest,
    SamplingParams,
    StepDelta,
    pack_tokens,
)
from replicas.host import HostOptions, ReplicaHost, build_engine, socket_name
from routing.registry import MemberWatch, RegistryOptions
from routing.store import Store
from tests.replicas.scripted import ScriptedEngine, until
from tests.routing.conftest import Valkey, valkey

__all__ = ["valkey"]  # the fixture

SECRET = b"0123456789abcdef"
GROUP = GroupConfig(
    name="sim",
    model="sim",
    engine=EngineConfig(kind="sim", sim=SimConfig(step_base_s=0.002, step_per_sequence_s=0.0)),
)
CONFIG = Config(
    models=(ModelConfig(id="sim", source="sim:bytes", aliases=("other-name",)),),
    groups=(GROUP,),
    tenants=(TenantConfig(id="local", anonymous=True),),
    cluster="hosts",
    channel=ChannelConfig(heartbeat_s=0.2, dead_after_s=2.0),  # a starved machine must not look dead
)


@pytest.fixture
def runtime(valkey: Valkey, tmp_path: Path) -> Runtime:
    run_dir = valkey.path.parent / "run"
    run_dir.mkdir(mode=0o700)
    return Runtime(run_dir=run_dir, home=tmp_path, redis_url=valkey.url, secret=SECRET, instance="hosts-1")


class Watching:
    """What an ingress would see."""

    def __init__(self, runtime: Runtime) -> None:
        self.store = Store(runtime.redis_url, CONFIG.cluster)
        self.watch = MemberWatch(self.store, RegistryOptions(poll_s=0.02))

    async def link(self, replica_id: str) -> ReplicaLink:
        await until(lambda: replica_id in self.watch.members)
        return await ReplicaLink.connect(self.watch.members[replica_id].endpoint, SECRET, "ingress", LinkOptions())


@pytest.fixture
async def ingress(runtime: Runtime) -> AsyncIterator[Watching]:
    watching = Watching(runtime)
    watching.watch.start()
    yield watching
    await watching.watch.close()
    await watching.store.close()


def ask(text: str, **sampling: object) -> GenerateRequest:
    params = {"max_tokens": 16, "seed": 1, "ignore_eos": True, **sampling}
    return GenerateRequest(
        request_id="chatcmpl-1",
        prompt=pack_tokens(list(text.encode())),
        sampling=SamplingParams(**params),  # type: ignore[arg-type]
        tenant="acme",
    )


def scripted_into(engines: list[ScriptedEngine]) -> Callable[[ModelFiles, EngineConfig, str], Engine]:
    def build(files: ModelFiles, config: EngineConfig, model_id: str) -> Engine:
        engines.append(ScriptedEngine())
        return engines[-1]

    return build


async def test_a_started_host_is_a_member_and_answers_with_text(runtime: Runtime, ingress: Watching) -> None:
    host = ReplicaHost(CONFIG, GROUP, runtime, "sim-1a2b")
    facts = await host.start()
    try:
        link = await ingress.link("sim-1a2b")
        member = ingress.watch.members["sim-1a2b"]
        assert (member.group, member.model, member.engine, member.pid) == ("sim", "sim", "sim", os.getpid())
        assert member.endpoint == host.endpoint == f"unix://{runtime.run_dir}/sim-1a2b.sock"
        assert link.facts == facts
        deltas = [delta async for delta in link.open(ask("hello"))]
        assert sum(len(d.token_ids) for d in deltas) == 16
        assert deltas[-1].finish_reason == "length"
        tokens = [t for d in deltas for t in d.token_ids]
        files = load_model_files("sim:bytes", runtime.home)
        assert "".join(d.text for d in deltas) == files.tokenizer.decode(tokens)
        await host.check_health()
        await link.close()
    finally:
        await host.close()


async def test_a_drained_host_leaves_the_membership_and_finishes_what_runs(runtime: Runtime, ingress: Watching) -> None:
    engines: list[ScriptedEngine] = []
    host = ReplicaHost(CONFIG, GROUP, runtime, "r", HostOptions(build=scripted_into(engines)))
    await host.start()
    link = await ingress.link("r")
    running = link.open(ask("running"))
    await until(lambda: engines[0].open)
    drain = asyncio.create_task(host.drain())
    await until(lambda: "r" not in ingress.watch.members and link.stats.draining)
    late = msgspec.structs.replace(ask("late"), request_id="chatcmpl-2")
    (refused,) = [delta async for delta in link.open(late)]
    assert refused.fault is not None
    assert (refused.fault.code, refused.fault.retryable) == ("draining", True)
    assert not drain.done()
    engines[0].step(lambda r: StepDelta(r.request_id, token_ids=(65,), finish_reason="length"))
    assert [d.finish_reason async for d in running] == ["length"]
    await asyncio.wait_for(drain, 10)
    await host.close()
    await link.close()
    assert "r.sock" not in os.listdir(runtime.run_dir)


async def test_a_drain_that_takes_too_long_can_be_given_up(runtime: Runtime, ingress: Watching) -> None:
    engines: list[ScriptedEngine] = []
    host = ReplicaHost(CONFIG, GROUP, runtime, "r", HostOptions(build=scripted_into(engines)))
    await host.start()
    link = await ingress.link("r")
    stream = link.open(ask("endless"))
    await until(lambda: engines[0].open)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await host.drain()
    await host.close()
    (last,) = [delta async for delta in stream]
    assert last.fault is not None
    assert last.fault.code == "engine_dead"
    assert engines[0].closed
    await link.close()


async def test_a_dead_engine_makes_the_host_unhealthy_and_no_member(runtime: Runtime, ingress: Watching) -> None:
    engines: list[ScriptedEngine] = []
    host = ReplicaHost(CONFIG, GROUP, runtime, "r", HostOptions(build=scripted_into(engines)))
    await host.start()
    link = await ingress.link("r")
    stream = link.open(ask("x"))
    await until(lambda: engines[0].open)
    await host.check_health()
    fault = Fault("engine_dead", "the step failed: boom", retryable=True)
    engines[0].step(lambda r: StepDelta(r.request_id, finish_reason="error", fault=fault))
    assert [d.fault async for d in stream] == [fault]
    with pytest.raises(EngineDeadError, match="boom"):
        await host.check_health()
    await until(lambda: not ingress.watch.members)
    await host.close()
    await link.close()


async def test_an_engine_that_dies_idle_is_found_by_the_health_check(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines: list[ScriptedEngine] = []
    host = ReplicaHost(CONFIG, GROUP, runtime, "r", HostOptions(build=scripted_into(engines)))
    await host.start()

    def dead() -> object:
        raise EngineDeadError("its thread ended")

    monkeypatch.setattr(engines[0], "stats", dead)
    with pytest.raises(EngineDeadError, match="its thread ended"):
        await host.check_health()
    await host.close()
    await host.close()
    with pytest.raises(EngineDeadError, match="not running"):
        await host.check_health()


async def test_usage_of_a_vanished_ingress_is_journaled_in_the_run_folder(runtime: Runtime, ingress: Watching) -> None:
    engines: list[ScriptedEngine] = []
    options = HostOptions(build=scripted_into(engines), wall_clock=lambda: 1700000000.0)
    host = ReplicaHost(CONFIG, GROUP, runtime, "r", options)
    await host.start()
    link = await ingress.link("r")
    link.open(ask("hello"))
    await until(lambda: engines[0].open)
    engines[0].step(lambda r: StepDelta(r.request_id, token_ids=(65, 66)))
    link._connection.transport.abort()
    journal = runtime.run_dir / "journal-r.jsonl"
    await until(journal.exists, 10.0)
    (line,) = journal.read_bytes().splitlines()
    record = msgspec.json.decode(line)
    assert (record["at"], record["request_id"], record["tenant"]) == (1700000000.0, "chatcmpl-1", "acme")
    assert (record["num_prompt_tokens"], record["num_output_tokens"]) == (5, 2)
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    await host.close()


async def test_a_host_starts_and_serves_while_redis_is_down(runtime: Runtime, valkey: Valkey) -> None:
    valkey.kill()
    host = ReplicaHost(CONFIG, GROUP, runtime, "r")
    await host.start()
    link = await ReplicaLink.connect(host.endpoint, SECRET, "ingress")
    assert [d async for d in link.open(ask("hello"))][-1].finish_reason == "length"
    await link.close()
    await host.drain()
    await host.close()


async def test_a_host_joins_once_redis_has_told_what_was_there_before_it(
    runtime: Runtime, ingress: Watching, valkey: Valkey
) -> None:
    before = ReplicaHost(CONFIG, GROUP, runtime, "r", HostOptions(wall_clock=lambda: 7.0))
    await before.start()
    await until(lambda: "r" in ingress.watch.members)
    valkey.signal(signal.SIGSTOP)
    await before.close()  # which Redis does not hear
    host = ReplicaHost(CONFIG, GROUP, runtime, "r", HostOptions(wall_clock=lambda: 5.0))
    await host.start()
    try:
        link = await ReplicaLink.connect(host.endpoint, SECRET, "ingress")
        assert link.start_id != ingress.watch.members["r"].start_id
        valkey.signal(signal.SIGCONT)
        await until(lambda: "r" in ingress.watch.members, 10.0)
        await until(lambda: ingress.watch.members["r"].start_id == link.start_id, 10.0)
        assert ingress.watch.members["r"].epoch == 7_000_001
        await link.close()
    finally:
        valkey.signal(signal.SIGCONT)
        await host.close()


async def test_a_host_that_has_not_joined_yet_follows_its_engine_and_leaves_without_a_word(
    runtime: Runtime, ingress: Watching, valkey: Valkey
) -> None:
    valkey.signal(signal.SIGSTOP)
    host = ReplicaHost(CONFIG, GROUP, runtime, "r")
    await host.start()
    link = await ReplicaLink.connect(host.endpoint, SECRET, "ingress")
    async for _ in link.open(ask("a prompt of several blocks, all of them new" * 10)):
        pass
    publisher = host._publisher
    assert publisher is not None
    await until(lambda: publisher.blocks.kv_seq > 0)
    await link.close()
    await host.drain()
    valkey.signal(signal.SIGCONT)
    await asyncio.sleep(1.5)  # the breaker closes, and a beat passes
    assert await ingress.store.execute("KEYS", "*") == []
    await host.close()
    assert not [task for task in asyncio.all_tasks() if "as r" in task.get_name()]


async def test_a_host_that_cannot_load_raises_and_leaves_nothing(runtime: Runtime) -> None:
    missing = msgspec.structs.replace(CONFIG, models=(ModelConfig(id="sim", source="/nowhere"),))
    with pytest.raises(ConfigError, match="/nowhere"):
        await ReplicaHost(missing, GROUP, runtime, "r").start()
    unknown = msgspec.structs.replace(CONFIG, models=(ModelConfig(id="another", source="sim:bytes"),))
    with pytest.raises(EngineError, match="serves model sim, which the profile lacks"):
        await ReplicaHost(unknown, GROUP, runtime, "r").start()
    weightless = msgspec.structs.replace(GROUP, engine=EngineConfig(kind="native"))
    with pytest.raises(EngineError, match="has no weights"):
        await ReplicaHost(CONFIG, weightless, runtime, "r").start()
    assert list(runtime.run_dir.iterdir()) == []
    assert len(asyncio.all_tasks()) == 1


async def test_two_hosts_cannot_share_a_socket(runtime: Runtime, ingress: Watching) -> None:
    first = ReplicaHost(CONFIG, GROUP, runtime, "same")
    await first.start()
    with pytest.raises(ChannelError, match="in use by a running server"):
        await ReplicaHost(CONFIG, GROUP, runtime, "same").start()
    link = await ingress.link("same")
    assert [d async for d in link.open(ask("still here"))][-1].finish_reason == "length"
    await link.close()
    await first.close()


def test_a_long_replica_id_gets_a_socket_name_that_fits() -> None:
    assert socket_name("smollm2-0a1b2c3d") == "smollm2-0a1b2c3d.sock"
    long = [socket_name("g" * 63 + f"-{i}") for i in range(2)]
    assert long[0] != long[1]
    assert all(len(name) <= 40 and name.endswith(".sock") for name in long)


def test_a_sim_replica_loads_neither_torch_nor_transformers(tmp_path: Path) -> None:
    program = (
        "import sys, pathlib\n"
        "from configs.schema import EngineConfig\n"
        "from configs.tokenizer import load_model_files\n"
        "from replicas.host import build_engine\n"
        "files = load_model_files('sim:bytes', pathlib.Path(sys.argv[1]))\n"
        "build_engine(files, EngineConfig(kind='sim'), 'sim')\n"
        "print([name for name in ('torch', 'transformers', 'ray', 'fastapi') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_engine_kind_of_the_schema_has_a_builder(tmp_path: Path) -> None:
    files = load_model_files("sim:bytes", tmp_path)
    for kind in ("native", "sim"):
        try:
            build_engine(files, EngineConfig(kind=kind), "m")  # type: ignore[arg-type]
        except EngineError as error:
            assert "no weights" in str(error)
