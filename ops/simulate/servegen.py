"""Reads a ServeGen client set (alibaba/ServeGen, `data/<category>/<model>` as tar.gz) and draws requests from it.

Each client has `chunk-N-trace.csv` (from second, requests/s, coefficient of variation, law, shape, scale: one row for
every ten minutes) and `chunk-N-dataset.json` (histograms of input and output lengths, by window of the day).
A client becomes a tenant. Prompts share nothing: lengths and arrivals are all there is.
"""

from __future__ import annotations

import ast
import csv
import io
import json
import re
import tarfile
from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import accumulate
from math import gamma
from pathlib import Path
from random import Random

from ops.simulate.errors import TraceError
from ops.simulate.trace import Trace, TraceRequest

BLOCK_TOKENS = 64
_MEMBER = re.compile(r"chunk-(\d+)-(trace\.csv|dataset\.json)$")


@dataclass(frozen=True, slots=True)
class ServeGenOptions:
    """Which part of the day: `duration_s` from `begin_s` on; None = where the most requests are."""

    begin_s: float | None = None
    duration_s: float = 600.0
    seed: int = 0


@dataclass(frozen=True, slots=True)
class _Rate:
    """A client between `begin_s` and the next row."""

    begin_s: float
    per_s: float
    law: str
    shape: float


@dataclass(frozen=True, slots=True)
class _Lengths:
    """A histogram to draw from."""

    values: tuple[int, ...]
    weights: tuple[float, ...]

    def draw(self, random: Random) -> int:
        return random.choices(self.values, cum_weights=self.weights)[0]


@dataclass(slots=True)
class _Client:
    rates: list[_Rate] = field(default_factory=list)
    inputs: list[tuple[float, _Lengths]] = field(default_factory=list)
    outputs: list[tuple[float, _Lengths]] = field(default_factory=list)


def read_servegen(path: Path, options: ServeGenOptions | None = None) -> Trace:
    """Requests of all clients in one stretch of the day; deterministic by seed. Raises TraceError."""
    options = options or ServeGenOptions()
    clients = _read_clients(path)
    window_s = options.duration_s
    begin_s = _busiest(clients) if options.begin_s is None else options.begin_s
    requests: list[TraceRequest] = []
    for number in sorted(clients):
        client = clients[number]
        random = Random(f"{options.seed}/{number}")
        for at_s in _arrivals(client, (begin_s, begin_s + window_s), random):
            num_prompt = max(1, _at(client.inputs, at_s).draw(random))
            num_output = max(1, _at(client.outputs, at_s).draw(random))
            requests.append(TraceRequest(at_s - begin_s, num_prompt, num_output, tenant=f"client-{number}"))
    if not requests:
        raise TraceError(path, None, f"nobody asks anything between {begin_s:g} s and {begin_s + window_s:g} s")
    requests.sort(key=lambda r: r.arrival_s)
    note = f"drawn from {len(clients)} clients, {window_s:g} s from second {begin_s:g} of the day"
    return Trace(path.name, BLOCK_TOKENS, tuple(requests), (note, "prompts share nothing: lengths only"))


def _read_clients(path: Path) -> dict[int, _Client]:
    clients: dict[int, _Client] = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                found = _MEMBER.search(member.name)
                content = archive.extractfile(member) if found and member.isfile() else None
                if found is None or content is None:
                    continue
                client = clients.setdefault(int(found[1]), _Client())
                where = f"{path}:{member.name}"
                text = content.read().decode()
                if found[2] == "trace.csv":
                    client.rates = _read_rates(text, where)
                else:
                    client.inputs, client.outputs = _read_lengths(text, where)
    except (OSError, tarfile.TarError, UnicodeDecodeError, EOFError) as error:
        raise TraceError(path, None, str(error)) from error
    whole = {number: c for number, c in clients.items() if c.rates and c.inputs and c.outputs}
    if not whole:
        raise TraceError(path, None, "no client with chunk-N-trace.csv and chunk-N-dataset.json in it")
    return whole


def _read_rates(text: str, where: str) -> list[_Rate]:
    rates = []
    for line, row in enumerate(csv.reader(io.StringIO(text)), 1):
        try:
            begin_s, per_s, _, law, shape, _ = row
            rates.append(_Rate(float(begin_s), float(per_s), law, float(shape)))
        except ValueError as error:
            raise TraceError(where, line, f"no row of (second, rate, cv, law, shape, scale): {error}") from error
        if per_s != "0" and float(per_s) > 0 and law not in ("Gamma", "Weibull"):
            raise TraceError(where, line, f"unknown law {law!r}")
    return rates


def _read_lengths(text: str, where: str) -> tuple[list[tuple[float, _Lengths]], list[tuple[float, _Lengths]]]:
    try:
        windows = json.loads(text)
        inputs = [(float(at), _histogram(window["input_tokens"])) for at, window in windows.items()]
        outputs = [(float(at), _histogram(window["output_tokens"])) for at, window in windows.items()]
    except (ValueError, KeyError, TypeError, AttributeError, SyntaxError) as error:
        raise TraceError(where, None, f"no histograms of lengths by window: {error!r}") from error
    return sorted(inputs, key=_begin), sorted(outputs, key=_begin)


def _histogram(text: str) -> _Lengths:
    """A Python literal in a string: {tokens: probability, …}."""
    found: Mapping[int, float] = ast.literal_eval(text)
    return _Lengths(tuple(int(value) for value in found), tuple(accumulate(float(p) for p in found.values())))


def _begin(entry: tuple[float, _Lengths]) -> float:
    return entry[0]


def _at(windows: list[tuple[float, _Lengths]], at_s: float) -> _Lengths:
    return windows[max(0, bisect_right(windows, at_s, key=_begin) - 1)][1]


def _busiest(clients: Mapping[int, _Client]) -> float:
    per_s: dict[float, float] = {}
    for client in clients.values():
        for rate in client.rates:
            per_s[rate.begin_s] = per_s.get(rate.begin_s, 0.0) + rate.per_s
    return max(per_s, key=lambda begin_s: (per_s[begin_s], -begin_s))


def _arrivals(client: _Client, window: tuple[float, float], random: Random) -> list[float]:
    """A renewal process in each stretch of equal rate: gaps of the row's law and shape, with the mean the rate asks."""
    begin_s, end_s = window
    found = []
    ends = [rate.begin_s for rate in client.rates[1:]] + [float("inf")]
    for rate, rate_end_s in zip(client.rates, ends, strict=True):
        low, high = max(rate.begin_s, begin_s), min(rate_end_s, end_s)
        if high <= low or rate.per_s <= 0:
            continue
        at_s = low + random.random() * _gap(rate, random)  # the last gap began before this stretch
        while at_s < high:
            found.append(at_s)
            at_s += _gap(rate, random)
    return found


def _gap(rate: _Rate, random: Random) -> float:
    if rate.law == "Gamma":
        return random.gammavariate(rate.shape, 1 / (rate.per_s * rate.shape))
    return random.weibullvariate(1 / (rate.per_s * gamma(1 + 1 / rate.shape)), rate.shape)
