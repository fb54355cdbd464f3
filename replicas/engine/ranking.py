"""Where each request stands in the order, from what is known of it now.

    arrives ─► how much is cached ─► due (`order.ORDERS`), not before other tenants' (`order.not_before`) ─► key
                    ▲ looked at again while it waits: what others compute may become its prefix, or be evicted

A key is settled once the request has blocks: those that run are never moved, so whoever is first stays so.
"""

from __future__ import annotations

from replicas.engine.block_pool import BlockPool
from replicas.engine.limits import SchedulerConfig
from replicas.engine.order import BY_SIZE, ORDERS, Pace, finish_tag, not_before, order_key
from replicas.engine.pending import PendingPrompts
from replicas.engine.sequence import Sequence
from routing.ageing import PromptScale


class Ranking:
    """Keys of one engine's requests, and what they have left to compute.

    `prefill_tokens_per_s` is told as it is learnt; 0 = not known yet.
    """

    def __init__(self, config: SchedulerConfig, pool: BlockPool) -> None:
        self.pending = PendingPrompts()
        self.prefill_tokens_per_s = 0.0
        self.by_size = config.order in BY_SIZE
        self._due = ORDERS[config.order]
        self._caching = config.prefix_caching
        self._pool = pool
        self._scale = PromptScale()
        self._num_entered = 0

    @property
    def pace(self) -> Pace:
        """What is learnt of how long prompts take."""
        return Pace(self.prefill_tokens_per_s, self._scale.tokens)

    def enter(self, seq: Sequence) -> None:
        """A request has arrived: it gets its place."""
        standing = seq.standing
        standing.number = self._num_entered
        self._num_entered += 1
        standing.num_expected = self._num_uncached(seq)
        self._scale.observe(standing.num_expected)
        if self.by_size:
            own_tag = finish_tag(seq.request, standing.num_expected)
            standing.not_before = not_before(own_tag, self.pending.rivals(seq))
        self._place(seq)
        self.pending.put(seq, standing.num_expected)

    def refresh(self, seq: Sequence) -> bool:
        """Looks again at what the cache holds of a waiting request; whether its key is another now."""
        num_expected = self._num_uncached(seq)
        standing = seq.standing
        if num_expected == standing.num_expected:
            return False
        standing.num_expected = num_expected
        self.pending.put(seq, num_expected)
        if not self.by_size or seq.num_preemptions:
            return False
        before = standing.key
        self._place(seq)
        return standing.key != before

    def waits_again(self, seq: Sequence) -> None:
        """It was preempted: all its tokens are to be computed again, but for those still cached."""
        seq.standing.num_expected = self._num_uncached(seq)
        self.pending.put(seq, seq.standing.num_expected)

    def progressed(self, seq: Sequence) -> None:
        """A running request has other tokens left than before; the last one counts as decoding."""
        num_left = seq.num_remaining
        self.pending.put(seq, num_left if num_left > 1 else 0)

    def leave(self, seq: Sequence) -> None:
        """It has ended."""
        self.pending.put(seq, 0)

    def _place(self, seq: Sequence) -> None:
        standing = seq.standing
        standing.due = max(self._due(seq.request, seq.arrival, standing.num_expected, self.pace), standing.not_before)
        standing.key = order_key(standing.due, seq.request.fair_tag, standing.number)

    def _num_uncached(self, seq: Sequence) -> int:
        """Tokens it would have to compute if it began now: at least the last one."""
        if not self._caching or seq.wants_prompt_logprobs:
            return seq.num_tokens
        seq.standing.reach = self._pool.reach(seq.namespace, seq.tokens, seq.standing.reach)
        return max(1, seq.num_tokens - seq.standing.reach.num_blocks * self._pool.block_size)
