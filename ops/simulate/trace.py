"""A workload: who asks what and when, told apart from how fast it is played.

    load(trace) = prompt tokens ÷ (replicas × prefill tokens/s × seconds it takes to arrive)

So load 1.0 would keep a fleet without any prefix cache busy with prefill alone. Playing a trace at a load stretches or
shrinks the time between arrivals. Pauses within a session stay as they are: more load is more users, not faster ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from random import Random

MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class TraceRequest:
    """One request. `arrival_s` is trace time; `blocks` are chained hashes, one per block of the trace's `block_tokens`
    (equal hash = equal prompt up to and including that block; the last block may be partial).

    With `after`, the index of an earlier request, it comes `think_s` seconds after that one's answer has ended, and
    `arrival_s` is only what the trace recorded.
    """

    arrival_s: float
    num_prompt: int
    num_output: int
    blocks: tuple[int, ...] = ()
    tenant: str = ""
    adapter: str | None = None
    adapter_rank: int = 8
    after: int | None = None
    think_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Trace:
    """Requests in order of recorded arrival. `notes` say what the reader left out or made up."""

    name: str
    block_tokens: int
    requests: tuple[TraceRequest, ...]
    notes: tuple[str, ...] = ()
    _num_prompt: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_num_prompt", sum(r.num_prompt for r in self.requests))

    @property
    def num_prompt_tokens(self) -> int:
        return self._num_prompt

    @property
    def num_output_tokens(self) -> int:
        return sum(r.num_output for r in self.requests)

    @property
    def duration_s(self) -> float:
        """Trace seconds over which requests that follow no other arrive."""
        starts = [r.arrival_s for r in self.requests if r.after is None]
        return max(starts) - min(starts) if starts else 0.0

    def arrivals(self, load: float, fleet_tokens_per_s: float) -> list[float]:
        """Seconds at which each request comes when played at `load`; of those that follow another, meaningless."""
        first = min((r.arrival_s for r in self.requests if r.after is None), default=0.0)
        duration_s = self.duration_s
        wanted_s = self.num_prompt_tokens / (fleet_tokens_per_s * load)
        factor = wanted_s / duration_s if duration_s > 0 else 1.0
        return [(r.arrival_s - first) * factor for r in self.requests]

    def only_fitting(self, max_tokens: int) -> Trace:
        """Without requests of more than `max_tokens` prompt and output tokens: no replica could ever run them.

        Those that followed one follow what it followed, and think as long in all.
        """
        fits = [r.num_prompt + r.num_output <= max_tokens for r in self.requests]
        if all(fits):
            return self
        new_index: dict[int, int] = {}
        kept: list[TraceRequest] = []
        for index, request in enumerate(self.requests):
            if not fits[index]:
                continue
            new_index[index] = len(kept)
            after, think_s = request.after, request.think_s
            while after is not None and not fits[after]:
                think_s += self.requests[after].think_s
                after = self.requests[after].after
            kept.append(replace(request, after=None if after is None else new_index[after], think_s=think_s))
        note = f"{len(self.requests) - len(kept)} requests of more than {max_tokens} tokens left out"
        return Trace(self.name, self.block_tokens, tuple(kept), (*self.notes, note))

    def head(self, num_requests: int) -> Trace:
        """The first requests, by recorded arrival."""
        return replace(self, requests=self.requests[:num_requests])


def scramble(value: int) -> int:
    """A 64-bit hash of an integer: the finaliser of splitmix64 (Steele, Lea, Flood 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & MASK
    return value ^ (value >> 31)


class Chain:
    """Gives chained block hashes: equal (block before, content) gives the equal hash, and the same int object."""

    def __init__(self, root: int = 0) -> None:
        self._root = scramble(root)
        self._known: dict[tuple[int, object], int] = {}

    def of(self, contents: Sequence[object], before: tuple[int, ...] = ()) -> tuple[int, ...]:
        """The hashes of a prompt's blocks: `before`, and of those that follow with these contents."""
        known = self._known
        last = before[-1] if before else self._root
        hashes = list(before)
        for content in contents:
            key = (last, content)
            found = known.get(key)
            if found is None:
                found = known[key] = scramble(last ^ (len(known) << 1))
            hashes.append(found)
            last = found
        return tuple(hashes)


def unrounded(times_s: Sequence[float], random: Random) -> list[float]:
    """Non-decreasing times in which equal ones are spread over the gap to the next: a coarse clock stamped them.

    Mooncake's conversations have a tick of 3 s: as they stand, ten requests come at once, however low the load.
    """
    spread: list[float] = []
    begin = 0
    tick_s = 0.0
    while begin < len(times_s):
        end = begin
        while end < len(times_s) and times_s[end] == times_s[begin]:
            end += 1
        if end < len(times_s):
            tick_s = times_s[end] - times_s[begin]
        if end - begin == 1:
            spread.append(times_s[begin])
        else:
            spread += sorted(times_s[begin] + random.random() * tick_s for _ in range(end - begin))
        begin = end
    return spread


def poisson_starts(count: int, random: Random) -> list[float]:
    """`count` times of a Poisson process with one start a second on average."""
    now = 0.0
    starts = []
    for _ in range(count):
        now += random.expovariate(1.0)
        starts.append(now)
    return starts
