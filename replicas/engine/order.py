"""In which order waiting requests run. An order is one pure function of what is known at arrival → the time it is due.

Nothing starves: every order is the arrival time plus a bounded handicap (`MAX_HANDICAP_S` either way), and the head of
the queue is never overtaken by those behind it. So only requests that arrive within twice that bound can go ahead of
one. Keys are static, so that a simulator can order by the very same functions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import inf
from typing import Literal, Protocol, TypeAlias

from routing.waiting import LONG_SHARE, STRETCH


class Queued(Protocol):
    """What an order looks at in a request (`replicas.contract.GenerateRequest` and a simulator's own fit)."""

    @property
    def priority(self) -> int: ...

    @property
    def deadline_s(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Pace:
    """What an engine has learnt that turns a prompt's size into seconds.

    `scale_tokens`: E[x²]/E[x] of uncached prompt tokens x at arrival: the prompt in which a random token finds itself.
    0 = not known yet, for either.
    """

    prefill_tokens_per_s: float = 0.0
    scale_tokens: float = 0.0

    @property
    def tokens_per_s(self) -> float:
        """The rate to reckon with."""
        return self.prefill_tokens_per_s if self.prefill_tokens_per_s > 0 else PRIOR_PREFILL_TOKENS_PER_S


OrderName: TypeAlias = Literal["fcfs", "priority", "deadline", "shortest"]
Order: TypeAlias = Callable[[Queued, float, int, Pace], float]
"""(request, arrival in seconds, uncached prompt tokens, pace) → due, in seconds."""

OrderKey: TypeAlias = tuple[float, float, int]

PRIORITY_STEP_S = 10.0
"""Seconds of waiting that one priority band is worth: a band-1 request goes before band-0 ones 10 s younger."""

MAX_HANDICAP_S = 1000.0

PRIOR_PREFILL_TOKENS_PER_S = 2000.0
"""Assumed while an engine has computed no prompt yet."""

TICK_S = 0.01
"""Requests due in the same tick count as simultaneous; between them the smaller fair tag goes first."""


def fcfs(request: Queued, arrival: float, num_uncached: int, pace: Pace) -> float:
    """First come, first served."""
    return arrival


def priority(request: Queued, arrival: float, num_uncached: int, pace: Pace) -> float:
    """Lower bands sooner; waiting makes up for a band."""
    return arrival + _band_s(request)


def deadline(request: Queued, arrival: float, num_uncached: int, pace: Pace) -> float:
    """Earliest deadline first; without one, as if it were `MAX_HANDICAP_S` away."""
    left_s = MAX_HANDICAP_S if request.deadline_s is None else request.deadline_s
    return arrival + _bounded(left_s)


def shortest(request: Queued, arrival: float, num_uncached: int, pace: Pace) -> float:
    """Shortest uncached prompt first, with linear ageing: due `STRETCH` times its prefill after its arrival.

    What is longer than `LONG_SHARE` of the scale counts as just that long. A deadline that can still be met takes
    handicap away, down to none: due when it must begin at the latest. Bands shift as in `priority`.
    """
    own_s = num_uncached / pace.tokens_per_s
    counted = min(num_uncached, LONG_SHARE * pace.scale_tokens) if pace.scale_tokens > 0 else num_uncached
    handicap_s = STRETCH * counted / pace.tokens_per_s
    if request.deadline_s is not None and request.deadline_s >= own_s:
        handicap_s = min(handicap_s, request.deadline_s - own_s)
    return arrival + _bounded(handicap_s + _band_s(request))


ORDERS: dict[OrderName, Order] = {"fcfs": fcfs, "priority": priority, "deadline": deadline, "shortest": shortest}

BY_SIZE: frozenset[OrderName] = frozenset({"shortest"})
"""Orders in which what the cache holds of a waiting prompt moves it, and tenants are held apart (`not_before`)."""


def order_key(due: float, fair_tag: float, number: int) -> OrderKey:
    """Sorts by due tick, then fair tag, then the number of arrival: total, so that somebody always goes first."""
    return (due // TICK_S, fair_tag, number)


def not_before(finish_tag: float, others: Iterable[tuple[float, float]]) -> float:
    """When a prompt is due at the earliest, for the sake of other tenants' pending ones; minus infinity: any time.

    A finish tag is a fair tag plus the prompt's uncached tokens: what its tenant will have been served. `others`:
    (finish tag, due) of each. One of another tenant is not overtaken if it would leave that tenant behind. This only
    ever takes overtaking away: whatever the tags are, a prompt waits for none that comes after it.
    (Self-clocked fair queueing, Golestani 1994.)
    """
    return max((due for other, due in others if other < finish_tag), default=-inf)


def _band_s(request: Queued) -> float:
    return _bounded(request.priority * PRIORITY_STEP_S)


def _bounded(seconds: float) -> float:
    return max(-MAX_HANDICAP_S, min(seconds, MAX_HANDICAP_S))
