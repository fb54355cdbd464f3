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

from routing.ageing import handicap_s


class Queued(Protocol):
    """What an order looks at in a request (`replicas.contract.GenerateRequest` and a simulator's own fit)."""

    @property
    def priority(self) -> int: ...

    @property
    def deadline_s(self) -> float | None: ...


class Tagged(Protocol):
    """What the fair queue says of a request: its tenant's virtual time when it left there, and its tenant's weight."""

    @property
    def fair_tag(self) -> float: ...

    @property
    def fair_weight(self) -> float: ...


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

    def tokens_in(self, seconds: float) -> float:
        """How many tokens that are."""
        return seconds * self.tokens_per_s


OrderName: TypeAlias = Literal["fcfs", "priority", "deadline", "shortest", "fair"]
Order: TypeAlias = Callable[[Queued, float, int, Pace], float]
"""(request, arrival in seconds, uncached prompt tokens, pace) → due, in seconds."""

OrderKey: TypeAlias = tuple[float, float, int]

PRIORITY_STEP_S = 10.0
"""Seconds of waiting that one priority band is worth: a band-1 request goes before band-0 ones 10 s younger."""

MAX_HANDICAP_S = 1000.0

FAIR_WINDOW_S = 60.0
"""Fair tags never hold a request back behind those of a later window, should tags of two ingresses not compare."""

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
    """Shortest uncached prompt first, with linear ageing (`routing.ageing.handicap_s`).

    A deadline that can still be met takes handicap away, down to none: due when it must begin at the latest. Bands
    shift as in `priority`.
    """
    own_s = num_uncached / pace.tokens_per_s
    late_s = handicap_s(num_uncached, pace.scale_tokens, pace.tokens_per_s)
    if request.deadline_s is not None and request.deadline_s >= own_s:
        late_s = min(late_s, request.deadline_s - own_s)
    return arrival + _bounded(late_s + _band_s(request))


def fair(request: Queued, arrival: float, num_uncached: int, pace: Pace) -> float:
    """The least fair tag first (`order_key` looks at it next) among those that arrive in the same `FAIR_WINDOW_S`.

    Tags are virtual time, so a backlogged tenant's grow as it is served, and each gets its share whatever it sends.
    """
    return arrival // FAIR_WINDOW_S * FAIR_WINDOW_S


ORDERS: dict[OrderName, Order] = {
    "fcfs": fcfs,
    "priority": priority,
    "deadline": deadline,
    "shortest": shortest,
    "fair": fair,
}

BY_SIZE: frozenset[OrderName] = frozenset({"shortest"})
"""Orders in which what the cache holds of a waiting prompt moves it, and tenants are held apart (`not_before`)."""


def order_key(due: float, fair_tag: float, number: int) -> OrderKey:
    """Sorts by due tick, then fair tag, then the number of arrival: total, so that somebody always goes first."""
    return (due // TICK_S, fair_tag, number)


def finish_tag(request: Tagged, num_uncached: int) -> float:
    """The virtual time at which its tenant will have been served this prompt too: weighted tokens over its weight."""
    return request.fair_tag + num_uncached / request.fair_weight


def not_before(own_tag: float, others: Iterable[tuple[float, float]]) -> float:
    """When a prompt is due at the earliest, for the sake of other tenants' pending ones; minus infinity: any time.

    `own_tag`: its finish tag; `others`: (finish tag, due) of each. One of another tenant is not overtaken if that would
    leave its tenant behind. This only ever takes overtaking away: whatever the tags are, a prompt waits for none that
    comes after it. (Self-clocked fair queueing, Golestani 1994.)
    """
    return max((due for other, due in others if other < own_tag), default=-inf)


def _band_s(request: Queued) -> float:
    return _bounded(request.priority * PRIORITY_STEP_S)


def _bounded(seconds: float) -> float:
    return max(-MAX_HANDICAP_S, min(seconds, MAX_HANDICAP_S))
