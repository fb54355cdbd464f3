"""In which order waiting requests run. An order is one pure function: request and arrival → the time it is due.

Nothing starves: every order is the arrival time plus a bounded handicap (`MAX_HANDICAP_S` either way), and the head of
the queue is never overtaken by those behind it. So only requests that arrive within twice that bound can go ahead of
one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

from replicas.contract import GenerateRequest

OrderName: TypeAlias = Literal["fcfs", "priority", "deadline"]
Order: TypeAlias = Callable[[GenerateRequest, float], float]
OrderKey: TypeAlias = tuple[float, float, int]

PRIORITY_STEP_S = 10.0
"""Seconds of waiting that one priority band is worth: a band-1 request goes before band-0 ones 10 s younger."""

MAX_HANDICAP_S = 1000.0

TICK_S = 0.01
"""Requests due in the same tick count as simultaneous; between them the smaller fair tag goes first."""


def fcfs(request: GenerateRequest, arrival: float) -> float:
    """First come, first served."""
    return arrival


def priority(request: GenerateRequest, arrival: float) -> float:
    """Lower bands sooner; waiting makes up for a band."""
    handicap = request.priority * PRIORITY_STEP_S
    return arrival + max(-MAX_HANDICAP_S, min(handicap, MAX_HANDICAP_S))


def deadline(request: GenerateRequest, arrival: float) -> float:
    """Earliest deadline first; without one, as if it were `MAX_HANDICAP_S` away."""
    left_s = MAX_HANDICAP_S if request.deadline_s is None else request.deadline_s
    return arrival + max(-MAX_HANDICAP_S, min(left_s, MAX_HANDICAP_S))


ORDERS: dict[OrderName, Order] = {"fcfs": fcfs, "priority": priority, "deadline": deadline}


def order_key(due: float, fair_tag: float, number: int) -> OrderKey:
    """Sorts by due tick, then fair tag, then the number of arrival: total, so that somebody always goes first."""
    return (due // TICK_S, fair_tag, number)
