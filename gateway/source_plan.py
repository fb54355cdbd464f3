"""What is to be done after a look at a source of adapters: a pure function of what is there, and of what is known.

    a folder ─► seen twice alike? ─► known with this fingerprint? ─► as it should be, or tried in vain lately: left
                     no: waits                  └─ no ─► loaded, as a new version where the name has one
    no folder, twice ─► its adapter goes

A name belongs to whoever had it first: what an administrator added, or another source, is never touched. What came
from a source that no profile has any more belongs to the next that has such a folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice

from configs.schema import AdapterSourceConfig
from routing.adapter_sources import FolderRecord
from routing.adapters import FORGOTTEN, Adapter, Catalogue

RETRY_S = 900.0
"""What could not be loaded is tried again after so long though nothing in it has changed: something else may have."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:/-]{0,127}")
"""`configs.section.ModelId`."""


@dataclass(frozen=True, slots=True)
class Seen:
    """What two looks saw, by folder: its fingerprint; `before` is None where this is the first. `known`: what became
    of it before. `others`: URLs of all other sources."""

    now: Mapping[str, str]
    before: Mapping[str, str] | None
    known: Mapping[str, FolderRecord]
    others: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Plan:
    """`load`: folders, with their fingerprints. `remove`: adapters that are there no more. `refuse`: folders that
    cannot be adapters, and why. `forget`: records of folders that are gone. `num_waiting`: folders that are changing.
    """

    load: dict[str, str] = field(default_factory=dict)
    remove: list[str] = field(default_factory=list)
    refuse: dict[str, str] = field(default_factory=dict)
    forget: list[str] = field(default_factory=list)
    num_waiting: int = 0


def plan(source: AdapterSourceConfig, seen: Seen, catalogue: Catalogue, now: float) -> Plan:
    """`now`: Unix seconds."""
    load: dict[str, str] = {}
    refuse: dict[str, str] = {}
    num_waiting = 0
    for name, fingerprint in islice(sorted(seen.now.items()), source.max_adapters):
        current = catalogue.named(name)
        why = _unfit(name, current, seen.others)
        if why:
            refuse[name] = why
        elif seen.before is None or seen.before.get(name) != fingerprint:
            num_waiting += 1
        elif _is_due(source, fingerprint, (current, seen.known.get(name)), now):
            load[name] = fingerprint
    for name in islice(sorted(seen.now), source.max_adapters, None):
        refuse[name] = f"there are {len(seen.now)} folders, and max_adapters is {source.max_adapters}"
    if seen.before is None:
        return Plan(load, [], refuse, [], num_waiting)
    there = seen.now.keys() | seen.before.keys()
    gone = {adapter.name for adapter in catalogue.current() if adapter.source == source.url} - there
    return Plan(load, sorted(gone), refuse, sorted(seen.known.keys() - there), num_waiting)


def is_taken(current: Adapter | None, others: frozenset[str]) -> bool:
    """Whether a name is an administrator's, or another source's. `others`: URLs of all other sources."""
    return current is not None and (not current.source or current.source in others)


def _unfit(name: str, current: Adapter | None, others: frozenset[str]) -> str:
    """Why a folder can be no adapter whatever is in it; empty when it can."""
    if not _NAME.fullmatch(name) or name == FORGOTTEN:
        return "its name is none for an adapter: letters, digits, . _ : / -, at most 128, the first a letter or digit"
    if current is not None and is_taken(current, others):
        return f"its name is taken: {current.adapter_id} {f'is of {current.source}' if current.source else 'was added'}"
    return ""


def _is_due(
    source: AdapterSourceConfig, fingerprint: str, known: tuple[Adapter | None, FolderRecord | None], now: float
) -> bool:
    """Whether a folder that has settled is to be loaded."""
    current, record = known
    if record is None or record.fingerprint != fingerprint:
        return True
    if record.failure:
        return now - record.at >= RETRY_S
    if current is None:  # somebody removed it: that holds until its files change
        return False
    wanted = (source.url, source.base_model, source.owner, source.pinned)
    return (current.source, current.base_model, current.owner, current.pinned) != wanted
