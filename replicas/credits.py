"""What a replica wants to be sent, told with its load: enough never to idle, and no more.

    one step's prompt tokens, and what it computes while an ingress hears of it and answers     wanted_tokens
    places for sequences, and as many more as end in that time                                  num_places

A request that waits at an ingress can still go anywhere; one that waits here cannot. So a replica asks for little: what
it wants pending, in tokens, since twenty short prompts are no more work than a long one. Every connected ingress hears
at once what another one has sent (`replicas.channel.news`), so they share what is wanted without dividing it. And so
that they do not all send in the moment in which a replica wants more, each is told its turn (`Turns`): who has sent
something longest ago goes first, the others a little later if it does not.

(Credit-based flow control: Kung, Blackwell and Chapman 1994; here in units of work.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import msgspec

from replicas.contract import EngineFacts, EngineStats

ENDS_WINDOW_S = 5.0
ACTIVE_S = 30.0
"""Several times as long as it takes an ingress among several to send each replica something: with 1 s, most that still
have requests waiting count as idle, and all rush into the same place (attainment 0.960 instead of 0.970)."""

K = TypeVar("K", bound=Hashable)


class EndRate:
    """How many requests end a second: an exponential window. `clock`: monotonic seconds."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._at = clock()
        self._amount = 0.0

    def ended(self) -> None:
        """One request has ended now."""
        self._amount = self._decayed() + 1.0
        self._at = self._clock()

    @property
    def per_s(self) -> float:
        return self._decayed() / ENDS_WINDOW_S

    def _decayed(self) -> float:
        return self._amount * math.exp((self._at - self._clock()) / ENDS_WINDOW_S)


def with_credit(stats: EngineStats, facts: EngineFacts, per_round_trip: tuple[float, float]) -> EngineStats:
    """The load, and what the replica wants beyond it, unless the engine says that itself.

    `per_round_trip`: (seconds of it, requests that end in it).
    """
    if stats.wanted_tokens:
        return stats
    seconds, num_ends = per_round_trip
    wanted = facts.max_num_batched_tokens + math.ceil(stats.prefill_tokens_per_s * seconds)
    num_waiting = stats.num_waiting - stats.num_waiting_adapter  # those wait for something else than a place
    room = max(0, facts.max_num_seqs - stats.num_running - stats.num_waiting_adapter)
    if num_waiting > stats.num_unseen and stats.num_waiting_tokens < facts.max_num_batched_tokens:
        room = 0  # a step could hold all their tokens: they wait for memory, or for somebody to end
    num_places = room + math.ceil(num_ends) + 1 - num_waiting
    return msgspec.structs.replace(stats, wanted_tokens=wanted, num_places=max(0, num_places))


class Turns(Generic[K]):
    """In which order senders may use what is wanted: who sent something longest ago goes first.

    Who has sent nothing for ACTIVE_S is waited for by nobody. `now`: monotonic seconds.
    """

    def __init__(self) -> None:
        self._order: dict[K, float] = {}

    def join(self, sender: K) -> None:
        """One more, who goes first. No-op for one that is known."""
        if sender not in self._order:
            self._order = {sender: -math.inf, **self._order}

    def leave(self, sender: K) -> None:
        """It sends nothing any more. Idempotent."""
        self._order.pop(sender, None)

    def sent(self, sender: K, now: float) -> None:
        """It has sent something: its next turn comes after everybody's."""
        self.leave(sender)
        self._order[sender] = now

    def of(self, sender: K, now: float) -> int:
        """How many go first. O(senders)."""
        active_since = now - ACTIVE_S
        turn = 0
        for other, sent_at in self._order.items():
            if other == sender:
                return turn
            turn += sent_at >= active_since
        return 0
