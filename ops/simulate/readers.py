"""Reads published traces: Mooncake (JSON lines), agentic coding sessions (JSON lines), Azure (CSV).

Formats: kvcache-ai/Mooncake `FAST25-release/traces`; callanjfox/kv-cache-tester; Azure/AzurePublicDataset (2023, 2024).
"""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

from ops.simulate.errors import TraceError
from ops.simulate.trace import Chain, Trace, TraceRequest, poisson_starts, unrounded

MOONCAKE_BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class SessionOptions:
    """How sessions are played. `block_tokens`: coarser than the trace's own blocks, to be simulated faster.

    `max_think_s` bounds the pauses: who leaves for an hour is somebody else when he comes back. `seed` draws when
    sessions begin (the trace does not say).
    """

    block_tokens: int = 256
    max_think_s: float = 120.0
    seed: int = 0


def json_lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """Line numbers and objects; raises TraceError. Files ending in .gz are unpacked."""
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    found = json.loads(line)
                except ValueError as error:
                    raise TraceError(path, number, f"not JSON: {error}") from error
                if not isinstance(found, dict):
                    raise TraceError(path, number, "not a JSON object")
                yield number, found
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise TraceError(path, None, str(error)) from error


def number_of(row: Mapping[str, Any], key: str, at: tuple[Path, int], at_least: float = 0.0) -> float:
    """`row[key]` as a number; raises TraceError naming the key."""
    try:
        value = float(row[key])
    except KeyError:
        raise TraceError(*at, f"no {key!r}") from None
    except (TypeError, ValueError):
        raise TraceError(*at, f"{key!r} is no number: {row[key]!r}") from None
    if not at_least <= value < float("inf"):
        raise TraceError(*at, f"{key!r} is {row[key]!r}, less than {at_least:g} or not finite")
    return value


def read_mooncake(path: Path) -> Trace:
    """One request a line: `timestamp` (ms), `input_length`, `output_length`, `hash_ids` (one per 512-token block).

    Requests with the same time stamp are spread over the time to the next one (see `unrounded`).
    """
    chain = Chain()
    requests = []
    for line, row in json_lines(path):
        at = (path, line)
        num_prompt = int(number_of(row, "input_length", at, 1))
        ids = row.get("hash_ids")
        if not isinstance(ids, list) or not all(isinstance(i, int) for i in ids):
            raise TraceError(path, line, "'hash_ids' is no list of integers")
        if len(ids) > -(-num_prompt // MOONCAKE_BLOCK_TOKENS):
            raise TraceError(path, line, f"{len(ids)} hash_ids for {num_prompt} tokens")
        arrival_s = number_of(row, "timestamp", at) / 1000
        num_output = max(1, int(number_of(row, "output_length", at)))
        requests.append(TraceRequest(arrival_s, num_prompt, num_output, chain.of(ids)))
    requests.sort(key=_arrival)
    times = unrounded([r.arrival_s for r in requests], Random(0))
    is_coarse = any(before.arrival_s == after.arrival_s for before, after in pairwise(requests))
    requests = [replace(r, arrival_s=at_s) for r, at_s in zip(requests, times, strict=True)]
    notes = ("equal time stamps are spread over their tick",) if is_coarse else ()  # no number: of a head it were wrong
    return _trace(path, MOONCAKE_BLOCK_TOKENS, requests, notes)


def _arrival(request: TraceRequest) -> float:
    return request.arrival_s


def read_sessions(path: Path, options: SessionOptions | None = None) -> Trace:
    """One session a line; its requests carry `t` (s), `in`, `out`, `think_time` and `hash_rle` ([first id, run] …).

    Ids are local to the session. Sessions begin as a Poisson process; runs of sub-agents are left out.
    """
    options = options or SessionOptions()
    sessions: list[list[TraceRequest]] = []
    num_agents = 0
    for line, row in json_lines(path):
        rows = row.get("requests")
        if not isinstance(rows, list):
            raise TraceError(path, line, "no 'requests'")
        own_tokens = int(number_of(row, "block_size", (path, line), 1))
        if options.block_tokens % own_tokens:
            raise TraceError(path, line, f"blocks of {options.block_tokens} tokens cannot be made of {own_tokens}")
        asked = [r for r in rows if isinstance(r, dict) and r.get("type") != "subagent"]
        num_agents += len(rows) - len(asked)
        session = _session(asked, (path, line), (options, options.block_tokens // own_tokens, len(sessions) + 1))
        if session:
            sessions.append(session)
    starts = poisson_starts(len(sessions), Random(options.seed))
    requests = _interleaved(sessions, starts)
    notes = (
        f"{len(sessions)} sessions begin as a Poisson process, pauses of at most {options.max_think_s:g} s",
        f"{num_agents} runs of sub-agents left out",
    )
    return _trace(path, options.block_tokens, requests, notes)


def _session(
    rows: Sequence[Mapping[str, Any]], at: tuple[Path, int], how: tuple[SessionOptions, int, int]
) -> list[TraceRequest]:
    """A session's requests, `arrival_s` counted from its begin; `after` is set by `_interleaved`."""
    options, group, number = how
    blocks = _CoarseBlocks(group, number)
    session = []
    for i, row in enumerate(rows):
        t = number_of(row, "t", at)
        if row.get("think_time") is not None:
            think_s = number_of(row, "think_time", at)
        else:  # the gap the trace shows, its own answer's time taken off where known
            before = rows[i - 1] if i else row
            think_s = max(0.0, t - number_of(before, "t", at) - float(before.get("api_time") or 0.0))
        num_prompt = int(number_of(row, "in", at, 1))
        num_output = max(1, int(number_of(row, "out", at)))
        hashes = blocks.of(_runs(row, at))
        think_s = min(think_s, options.max_think_s) if i else 0.0
        session.append(TraceRequest(t, num_prompt, num_output, hashes, think_s=think_s))
    return session


def _runs(row: Mapping[str, Any], at: tuple[Path, int]) -> list[tuple[int, int]]:
    try:
        return [(int(first), int(run)) for first, run in row["hash_rle"]]
    except (KeyError, TypeError, ValueError):
        raise TraceError(*at, "'hash_rle' is no list of [first id, run length]") from None


class _CoarseBlocks:
    """The run-length coded ids of one session's prompts, `group` of them taken together; a rest is dropped."""

    def __init__(self, group: int, session: int) -> None:
        self._group = group
        self._chain = Chain(session)
        self._runs: list[tuple[int, int]] = []
        self._hashes: tuple[int, ...] = ()

    def of(self, runs: list[tuple[int, int]]) -> tuple[int, ...]:
        """One hash per group. What the prompt before had too, nearly all of it, is not hashed again."""
        group = self._group
        num_same = min(_num_common(self._runs, runs) // group, len(self._hashes))
        ids: list[int] = []
        skip = num_same * group
        for first, run in runs:
            ids += range(first + min(skip, run), first + run)
            skip -= min(skip, run)
        contents = [tuple(ids[i : i + group]) for i in range(0, len(ids) - group + 1, group)]
        self._runs, self._hashes = runs, self._chain.of(contents, self._hashes[:num_same])
        return self._hashes


def _num_common(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> int:
    """At least how many leading ids two run-length coded lists share (all, when both are cut into runs alike)."""
    num = 0
    for (first, run), (other_first, other_run) in zip(one, other, strict=False):
        if first != other_first:
            break
        num += min(run, other_run)
        if run != other_run:
            break
    return num


def _interleaved(sessions: list[list[TraceRequest]], starts: list[float]) -> list[TraceRequest]:
    """All sessions' requests by recorded time, each after the one before it in its session."""
    order = sorted(
        ((starts[s] + r.arrival_s, s, i) for s, session in enumerate(sessions) for i, r in enumerate(session)),
    )
    index: dict[tuple[int, int], int] = {(s, i): n for n, (_, s, i) in enumerate(order)}
    found = []
    for at_s, s, i in order:
        r = sessions[s][i]
        after = index[(s, i - 1)] if i else None
        arrival_s = starts[s] if i == 0 else at_s
        found.append(TraceRequest(arrival_s, r.num_prompt, r.num_output, r.blocks, after=after, think_s=r.think_s))
    return found


def read_azure(path: Path) -> Trace:
    """CSV with TIMESTAMP, ContextTokens, GeneratedTokens: arrivals and lengths only, so nothing is ever warm."""
    requests = []
    try:
        with path.open(newline="") as lines:
            rows = csv.DictReader(lines)
            for row in rows:
                at = (path, rows.line_num)
                arrival_s = _seconds(row.get("TIMESTAMP"), at)
                num_prompt = max(1, int(number_of(row, "ContextTokens", at)))
                num_output = max(1, int(number_of(row, "GeneratedTokens", at)))
                requests.append(TraceRequest(arrival_s, num_prompt, num_output))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise TraceError(path, None, str(error)) from error
    requests.sort(key=_arrival)
    return _trace(path, 64, requests, ("prompts share nothing: the trace has lengths only",))


def _seconds(text: str | None, at: tuple[Path, int]) -> float:
    """Seconds since the epoch; the trace has seven digits of a second, which `fromisoformat` does not take."""
    try:
        whole, _, digits = (text or "").partition(".")
        return datetime.fromisoformat(whole + "+00:00").timestamp() + float(f"0.{digits.split('+')[0] or 0}")
    except ValueError:
        raise TraceError(*at, f"'TIMESTAMP' is no time: {text!r}") from None


def _trace(path: Path, block_tokens: int, requests: list[TraceRequest], notes: tuple[str, ...] = ()) -> Trace:
    if not requests:
        raise TraceError(path, None, "there are no requests in it")
    return Trace(path.name, block_tokens, tuple(requests), notes)
