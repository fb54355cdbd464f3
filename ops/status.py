"""`warmgate status`: the running instances of this machine, their replicas, and what those are doing."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from ops.instance import Instance, find_instances
from routing.registry import Load, Member, MemberWatch
from routing.store import Store, StoreError, StoreOptions

_COLUMNS = ("replica", "model", "pid", "running", "waiting", "tokens", "KV")


@dataclass(frozen=True, slots=True)
class Status:
    """One instance and what its registry says; `problem` when the registry could not be asked."""

    instance: Instance
    replicas: tuple[tuple[Member, Load | None], ...] = ()
    problem: str = ""

    @property
    def ready(self) -> bool:
        """Whether it answers, and has a replica of every model."""
        there = {member.model for member, _ in self.replicas}
        return self.instance.ready and not self.problem and there.issuperset(self.instance.models)

    def as_json(self) -> dict[str, object]:
        replicas = [
            {"replica_id": member.replica_id, "group": member.group, "model": member.model, "pid": member.pid}
            | ({} if load is None else {name: getattr(load, name) for name in Load.__struct_fields__})
            for member, load in self.replicas
        ]
        about = {"url": self.instance.url, "pid": self.instance.pid, "ready": self.ready}
        return {**about, "cluster": self.instance.cluster, "replicas": replicas, "problem": self.problem}


def statuses(temp_dir: Path | None = None) -> list[Status]:
    """Every live instance of this user, the oldest first."""
    return asyncio.run(_all(find_instances(temp_dir or Path(tempfile.gettempdir()))))


async def _all(instances: list[Instance]) -> list[Status]:
    return list(await asyncio.gather(*(_ask(instance) for instance in instances)))


async def _ask(instance: Instance) -> Status:
    if not instance.redis_url:
        return Status(instance, problem="it is still starting")
    store = Store(instance.redis_url, instance.cluster, StoreOptions(timeout_s=2.0))
    watch = MemberWatch(store)
    try:
        await watch.refresh()
        loads = await watch.loads()
    except StoreError as error:
        return Status(instance, problem=f"its registry does not answer: {error}")
    finally:
        await store.close()
    return Status(instance, tuple((m, loads.get(m.replica_id)) for m in watch.members.values()))


def show(found: list[Status], console: Console) -> None:
    """A table an instance; `tokens`: prompt tokens not computed yet, `KV`: the share of blocks in use. Below
    it, what ingresses can know of the prefix caches, and how old that is."""
    for status in found:
        instance = status.instance
        ready = "ready" if status.ready else "not ready"
        title = f"{instance.url}  {instance.cluster}  {ready}"
        table = Table(title=title, title_justify="left", box=None, padding=(0, 2, 0, 0))
        for column in _COLUMNS:  # ids whole, also on 80 columns: they are there to be copied
            table.add_column(column, no_wrap=True)
        for member, load in status.replicas:
            table.add_row(member.replica_id, member.model, str(member.pid), *_cells(load))
        console.print(table if not status.problem else f"{instance.url}: {status.problem}")
        if status.replicas:
            console.print(_registry(status), style="dim", highlight=False)


def _cells(load: Load | None) -> tuple[str, ...]:
    if load is None:
        return ("?",) * 4
    used = 100 * (1 - load.num_free_blocks / load.num_blocks) if load.num_blocks else 0.0
    return str(load.num_running), str(load.num_waiting), str(load.num_waiting_tokens), f"{used:.0f} %"


def _registry(status: Status) -> str:
    """The KV registry in one line."""
    words = [
        (load.kv_age_s, load.num_prefix_blocks) for _, load in status.replicas if load and load.kv_age_s is not None
    ]
    if not words:
        return "prefix registry: no replica publishes what it holds"
    oldest_s, num_blocks = max(age_s for age_s, _ in words), sum(num for _, num in words)
    replicas = f"{len(words)} of {len(status.replicas)} replicas"
    return f"prefix registry: {replicas}, {num_blocks} blocks, oldest word {oldest_s:.1f} s"
