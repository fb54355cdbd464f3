"""How each adapter is doing: what the catalogue says, and what the replicas of its base model tell."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

from routing.adapters import Adapter, Catalogue, Failure
from routing.types import ReplicaState

AdapterState = Literal["registered", "loading", "ready", "failed"]
"""registered: any replica loads it when it is asked for. loading: one does now. ready: on `ready_replicas`. failed: it
was never served; `last_failure` says why."""


class AdapterView(msgspec.Struct, frozen=True, kw_only=True):
    """An adapter as `/v1/adapters` shows it. `last_failure`: why its newest version could not be added; the one before
    goes on being served."""

    id: str
    object: Literal["adapter"] = "adapter"
    version: str | None
    base_model: str | None
    path: str
    rank: int | None
    num_bytes: int
    owner: str | None
    pinned: bool
    source: str | None
    state: AdapterState
    ready_replicas: int
    loading_replicas: int
    last_failure: str | None = None


def views(
    catalogue: Catalogue, failures: Mapping[str, Failure], states: Callable[[str], Iterable[ReplicaState]]
) -> list[AdapterView]:
    """By name; of several versions the current one. `states`: of a model's replicas."""
    replicas = {model: tuple(states(model)) for model in {adapter.base_model for adapter in catalogue.current()}}
    found = {
        adapter.name: _view(adapter, replicas[adapter.base_model], failures.get(adapter.name))
        for adapter in catalogue.current()
    }
    for name, failure in failures.items():
        found.setdefault(name, _failed(failure))
    return [found[name] for name in sorted(found)]


def _view(adapter: Adapter, replicas: Iterable[ReplicaState], failure: Failure | None) -> AdapterView:
    num_ready = num_loading = 0
    for replica in replicas:
        is_loading = any(adapter.adapter_id == name for name, _ in replica.loading)
        num_loading += is_loading
        num_ready += adapter.adapter_id in replica.adapters and not is_loading
    return AdapterView(
        id=adapter.name,
        version=adapter.version,
        base_model=adapter.base_model,
        path=adapter.path,
        rank=adapter.rank,
        num_bytes=adapter.num_bytes,
        owner=adapter.owner,
        pinned=adapter.pinned,
        source=adapter.source or None,
        state="ready" if num_ready else "loading" if num_loading else "registered",
        ready_replicas=num_ready,
        loading_replicas=num_loading,
        last_failure=None if failure is None else failure.message,
    )


def _failed(failure: Failure) -> AdapterView:
    return AdapterView(
        id=failure.name, version=None, base_model=None, path=failure.path, rank=None, num_bytes=0, owner=None,
        pinned=False, source=None, state="failed", ready_replicas=0, loading_replicas=0, last_failure=failure.message,
    )  # fmt: skip
