"""A simulated replica behind the gateway's own `Slot`: the same accounting of what was sent and what was pushed."""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable

from gateway.slot import MIN_PUSHES, DeltaSource, Sent, Slot
from ops.simulate.frame import BLOCK_TOKENS
from ops.simulate.replica import SimReplica
from replicas.contract import EngineFacts, EngineStats, GenerateRequest, StepDelta
from replicas.credits import with_credit

MODEL = "simulated"
UNLIMITED = 1 << 30

ROUND_TRIP_S = 0.02
"""What a replica reckons with (`channel.round_trip_s`)."""


class _Unread:
    """An attempt's deltas: the driver hears of them from the replica itself."""

    over = False

    def __anext__(self) -> Awaitable[StepDelta]:
        raise NotImplementedError("a simulated answer is not read")

    def ready(self) -> list[StepDelta]:
        return []

    def listen(self, callback: Callable[[], None] | None) -> None:
        """Nothing is told."""

    def cancel(self) -> None:
        """Simulated clients never leave."""


_UNREAD = _Unread()


class SimLink:
    """`gateway.slot.Link` to a simulated replica: `stats` as told `delay_s` ago."""

    def __init__(self, replica_id: str, replica: SimReplica, delay_s: float, clock: Callable[[], float]) -> None:
        self.replica_id = replica_id
        self.start_id = ""
        self.facts = facts_of(replica)
        self.stats = EngineStats(
            num_free_blocks=self.facts.num_blocks, num_blocks=self.facts.num_blocks, prefill_tokens_per_s=0.0
        )
        self.alive = True
        self.num_opened = 0
        self.num_counted: int | None = 0
        self.turn = 0
        self._told = self.stats
        self._replica = replica
        self._delay_s = delay_s
        self._clock = clock
        self._opened: deque[float] = deque()
        replica.turns.join(self)

    def open(self, request: GenerateRequest) -> DeltaSource:
        self.num_opened += 1
        self._opened.append(self._clock())
        self._replica.turns.sent(self, self._clock())
        return _UNREAD

    def prefetch(self, adapter_id: str) -> None:
        """The view tells the replica itself: it knows the adapter's rank."""

    async def close(self) -> None:
        self.alive = False

    def look(self, now: float) -> int:
        """Takes in what has arrived by now; returns how many pushes that was."""
        at = now - self._delay_s
        told = self._replica.frame(at).stats(at)
        if told is self._told:
            return 0
        num_pushes = max(1, told.num_steps - self.stats.num_steps)
        self._told = told
        self.stats = with_credit(told, self.facts, (ROUND_TRIP_S, 0.0))
        while self._opened and self._opened[0] <= at:
            self._opened.popleft()
        self.num_counted = self.num_opened - len(self._opened)
        self.turn = self._replica.turns.of(self, now)
        return num_pushes


class SimSlot:
    """One replica as one ingress sees it."""

    def __init__(self, link: SimLink, max_ahead: int | None, clock: Callable[[], float]) -> None:
        self.link = link
        self.slot = Slot(link.replica_id, MODEL, UNLIMITED if max_ahead is None else max_ahead, clock)
        self.slot.connected(link)

    def look(self, now: float) -> None:
        """Takes in what was pushed since. More pushes than `Slot` waits for are as good as that many."""
        for _ in range(min(self.link.look(now), MIN_PUSHES + 1)):
            self.slot.pushed()

    def place(self, request: GenerateRequest, num_uncached: int) -> Sent:
        """Counts a request as sent there."""
        return self.slot.open(request, num_uncached)[1]


def facts_of(replica: SimReplica) -> EngineFacts:
    """What a simulated replica says about itself."""
    spec = replica.spec
    return EngineFacts(
        engine="simulated",
        model=MODEL,
        vocab_size=1,
        max_model_len=spec.kv_tokens,
        block_size=BLOCK_TOKENS,
        num_blocks=spec.kv_tokens // BLOCK_TOKENS,
        max_num_seqs=spec.max_num_seqs,
        max_num_batched_tokens=spec.max_num_batched_tokens,
        prefill_order=spec.order,
        max_adapters=spec.max_adapters,
        events=True,
    )
