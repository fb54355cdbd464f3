"""Reads the gateway's own usage log (`telemetry.usage_log`): what would yesterday have looked like?

The log has lengths, times, tenants and how many prompt tokens were cached, not the prompts. So prefixes are made up
such that as much can be shared as was: a request begins with as many blocks of an earlier prompt of its tenant, the
user's own if there is one, as it found cached. What no earlier prompt has comes from a prefix the tenant always had.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from gateway.ledger import UsageRecord
from ops.simulate.errors import TraceError
from ops.simulate.readers import json_lines
from ops.simulate.trace import Trace, TraceRequest, scramble

BLOCK_TOKENS = 64
NUM_REMEMBERED = 64
"""Prompts of a tenant that a later one may continue."""


def read_usage_log(path: Path) -> Trace:
    """The log's most used model; refused requests, of which nothing is known, are left out. Raises TraceError."""
    records: list[UsageRecord] = []
    for line, row in json_lines(path):
        try:
            records.append(msgspec.convert(row, UsageRecord))
        except msgspec.ValidationError as error:
            raise TraceError(path, line, f"no usage record: {error}") from error
    usable = [r for r in records if r.num_prompt_tokens > 0 and r.num_completion_tokens > 0]
    if not usable:
        raise TraceError(path, None, "there are no answered requests in it")
    model, num_of_model = Counter(r.model for r in usable).most_common(1)[0]
    kept = sorted((r for r in usable if r.model == model), key=lambda r: r.time)
    prefixes = _Prefixes()
    requests = tuple(
        TraceRequest(r.time, r.num_prompt_tokens, r.num_completion_tokens, prefixes.blocks(r), tenant=r.tenant)
        for r in kept
    )
    notes = [f"model {model}; prefixes made up from the cached tokens of each record"]
    if len(records) > num_of_model:
        notes.append(f"{len(records) - num_of_model} records of other models or without an answer left out")
    return Trace(path.name, BLOCK_TOKENS, requests, tuple(notes))


@dataclass(slots=True)
class _Prefixes:
    """Prompts made up so far, by tenant, the latest last: (user, blocks)."""

    recent: dict[str, deque[tuple[str | None, tuple[int, ...]]]] = field(default_factory=dict)
    tenants: dict[str, int] = field(default_factory=dict)
    num_made: int = 0

    def blocks(self, record: UsageRecord) -> tuple[int, ...]:
        """Block hashes for the record's prompt."""
        num_blocks = record.num_prompt_tokens // BLOCK_TOKENS
        shared = self._shared(record, min(record.num_cached_tokens // BLOCK_TOKENS, num_blocks))
        own = tuple(self._new() for _ in range(num_blocks - len(shared)))
        found = shared + own
        recent = self.recent.setdefault(record.tenant, deque(maxlen=NUM_REMEMBERED))
        recent.append((record.user, found))
        return found

    def _shared(self, record: UsageRecord, num_blocks: int) -> tuple[int, ...]:
        if num_blocks == 0:
            return ()
        long_enough = [(user, b) for user, b in self.recent.get(record.tenant, ()) if len(b) >= num_blocks]
        for user, blocks in reversed(long_enough):
            if user == record.user:
                return blocks[:num_blocks]
        if long_enough:
            return long_enough[-1][1][:num_blocks]
        root = scramble(self.tenants.setdefault(record.tenant, len(self.tenants)))
        return tuple(scramble(root ^ i) for i in range(num_blocks))

    def _new(self) -> int:
        self.num_made += 1
        return scramble(self.num_made | 1 << 62)
