"""What `warmgate status` prints, on a narrow terminal."""

from __future__ import annotations

import msgspec
import pytest
from rich.console import Console

from ops.instance import Instance
from ops.status import Status, show
from routing.registry import Load, Member

INSTANCE = Instance(
    pid=1, started=0.0, instance="wg-8000", url="http://127.0.0.1:8000", models=("m",), run_dir="/run", logs="/logs",
    ready=True, cluster="wg", redis_url="redis://x",
)  # fmt: skip


def member(replica_id: str) -> Member:
    return Member(
        replica_id=replica_id, group="g", model="smollm2", endpoint="unix:///x", epoch=1, host_id="h", pid=123456,
        started_at=0.0,
    )  # fmt: skip


def shown(*loads: Load | None) -> str:
    replicas = tuple((member(f"smollm2-0a1b2c3{i}"), load) for i, load in enumerate(loads))
    console = Console(width=80)
    with console.capture() as capture:
        show([Status(INSTANCE, replicas)], console)
    return capture.get()


def test_the_registrys_age_is_that_of_the_replica_heard_of_longest_ago() -> None:
    text = shown(Load(num_prefix_blocks=31250, kv_age_s=0.04), Load(num_prefix_blocks=10, kv_age_s=7.26), None)
    assert "prefix registry: 2 of 3 replicas, 31260 blocks, oldest word 7.3 s" in text
    assert "smollm2-0a1b2c30" in text and "…" not in text


@pytest.mark.parametrize(
    ("models", "problem", "ready"), [(("smollm2",), "", True), (("smollm2", "other"), "", False), ((), "gone", False)]
)
def test_an_instance_is_ready_when_every_model_has_a_replica(
    models: tuple[str, ...], problem: str, ready: bool
) -> None:
    status = Status(msgspec.structs.replace(INSTANCE, models=models), ((member("a"), Load()),), problem)
    assert status.ready is ready and status.as_json()["ready"] is ready
    assert not Status(msgspec.structs.replace(INSTANCE, models=("smollm2",))).ready, "nobody is there"


def test_replicas_without_events_are_said_to_publish_nothing() -> None:
    assert "no replica publishes what it holds" in shown(Load())
    assert "registry" not in shown()
