"""Which tokens the next step computes, and what its result means for every request.

    add ─► waiting ──admit──► running ──finish──► terminal delta
              ▲                  │
              └────preempt───────┘   (recompute later; noise is keyed by position, so the tokens are the same)

A plan is filled in this order, until the token budget or the places are used up:
  1. decodes: running sequences with one token to compute. First, so that a long prompt never stalls them.
  2. catching up: running sequences with more to compute, and waiting ones, merged by the order's key. Beside decodes
     they get as many tokens as take `max_prefill_stall_s` (`stall_limit`).
  3. drafts: guesses behind the decodes, in budget kept for them and blocks nobody else wants.

Blocks. A request is admitted when the blocks of all its known tokens are free beside what the running ones were
promised, and are taken chunk by chunk as they are filled. Decodes grow beyond that; when no block is left, the running
sequence that is last in the order gives up its blocks and waits again at its old place. The first in the order is
never preempted for another, and alone it fits (else it was refused), so it always ends: no deadlock, no livelock.
So a prompt that is due sooner goes ahead of one that is half computed, which keeps its blocks and goes on afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from replicas.contract import Fault, GenerateRequest, RefusedError, StepDelta
from replicas.engine.block_pool import BlockPool
from replicas.engine.drafts import Drafts
from replicas.engine.limits import SchedulerConfig, context_length
from replicas.engine.order import OrderKey
from replicas.engine.outcome import closing, finish, take_in, terminal
from replicas.engine.placing import Outline, Placing, blocks_for
from replicas.engine.queues import RunningSet, WaitingQueue
from replicas.engine.ranking import Ranking
from replicas.engine.sequence import Plan, PlanItem, Sampled, Sequence, StepResult
from replicas.engine.stall_limit import StallLimit
from replicas.engine.structured.grammar import Grammar

__all__ = ["Scheduler", "SchedulerConfig"]

NO_GUESSES: Mapping[str, Drafts] = MappingProxyType({})

REFRESHED_PER_STEP = 4
"""How many waiting requests a step looks up in the prefix cache again, in turn."""


class Scheduler:
    """Owns the requests of one engine. Synchronous; `clock` gives monotonic seconds."""

    def __init__(self, config: SchedulerConfig, pool: BlockPool, clock: Callable[[], float]) -> None:
        self.config = config
        self.pool = pool
        self.max_len = min(config.max_model_len, pool.num_blocks * pool.block_size)
        # More than the budget could not all decode in one step.
        self.max_running = min(config.max_num_seqs, config.max_num_batched_tokens)
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_output_tokens = 0
        self.ranking = Ranking(config, pool)
        self.stall_limit = StallLimit(config.max_prefill_stall_s, config.max_num_batched_tokens)
        self._clock = clock
        self._placing = Placing(pool, config.prefix_caching)
        self._open: dict[str, Sequence] = {}
        self._waiting = WaitingQueue()
        self._running = RunningSet()
        self._undelivered: list[StepDelta] = []

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_waiting_tokens(self) -> int:
        """Tokens to compute before all open requests decode, but for those that the cache holds."""
        return self.ranking.pending.num_tokens

    @property
    def waiting_sizes(self) -> tuple[tuple[int, int], ...]:
        """See `EngineStats.waiting_sizes`."""
        return self.ranking.pending.sizes

    @property
    def num_cached_tokens(self) -> int:
        """Prompt tokens that came from the cache, of all requests so far."""
        return self._placing.num_cached_tokens

    @property
    def running(self) -> tuple[Sequence, ...]:
        return tuple(self._running)

    @property
    def decoding(self) -> list[Sequence]:
        """Running sequences of which the next step draws a token: those that drafts can be for."""
        return [seq for seq in self._running if seq.num_remaining == 1 and not seq.wants_prompt_logprobs]

    @property
    def has_work(self) -> bool:
        return bool(self._open or self._undelivered)

    def num_open_with(self, adapter_id: str) -> int:
        """Open requests of one adapter."""
        return sum(1 for seq in self._open.values() if seq.request.adapter == adapter_id)

    def add(self, request: GenerateRequest, grammar: Grammar | None = None) -> None:
        """Queues a request, with the grammar it asks for. Raises RefusedError when it can never run here, the queue is
        full, or its id is open."""
        if (grammar is None) != (request.sampling.constraint is None):
            raise RefusedError(Fault("internal", f"request {request.request_id} lacks its grammar: {grammar=}"))
        num_prior = (len(request.prompt) + len(request.produced)) // 4
        if request.num_prompt_tokens >= self.max_len or num_prior > self.max_len:
            raise RefusedError(context_length(num_prior, self.max_len))
        if request.request_id in self._open:
            raise RefusedError(Fault("internal", f"request id {request.request_id} is open already"))
        if len(self._waiting) >= self.config.max_waiting:
            message = f"the engine's queue is full: {len(self._waiting)} requests wait"
            raise RefusedError(Fault("overloaded", message, retryable=True))
        seq = Sequence.from_request(request, self._clock(), grammar)
        self.num_prompt_tokens += seq.num_prompt
        ended = finish(seq, self.config, self.max_len)
        over = closing(seq, ended)
        if over is None and ended is not None:
            over = terminal(seq, ended[0], stop_reason=ended[1])
        if over is not None:  # an earlier attempt had come to the end already
            self._undelivered.append(over)
            return
        self._open[seq.request_id] = seq
        self.ranking.enter(seq)
        self._waiting.push(seq)

    def abort(self, request_id: str) -> None:
        """Frees a request's blocks at once; its terminal delta comes with the next commit. No-op when not open."""
        seq = self._open.get(request_id)
        if seq is not None:
            self._end(seq)
            self._undelivered.append(terminal(seq, "abort"))

    def fail(self, fault: Fault) -> list[StepDelta]:
        """Ends every open request with `fault`; returns their terminal deltas and those still undelivered."""
        deltas, self._undelivered = self._undelivered, []
        for seq in list(self._open.values()):
            self._end(seq)
            deltas.append(terminal(seq, "error", fault=fault))
        self._placing.release_copies()
        return deltas

    def plan(self, drafts: Mapping[str, Drafts] = NO_GUESSES) -> Plan:
        """The next step. Its tokens are computed and committed before the next call. `drafts`: by request id, for
        sequences that decode; as many are planned as fit."""
        self._placing.release_copies()
        self._expire()
        for seq in self._waiting.in_turn(REFRESHED_PER_STEP):
            self._refresh(seq)
        outline = Outline(self.config.max_num_batched_tokens)
        for seq in [seq for seq in self._running if seq.num_remaining == 1]:
            if seq in self._running:  # else an earlier decode took its blocks
                self._compute(outline, seq)
        outline.keep(sum(map(len, drafts.values())))
        if outline.items:
            limit = self.stall_limit.tokens(len(outline.items), self.ranking.pace.tokens_in)
            outline.budget = min(outline.budget, limit)
        catching_up = [seq for seq in self._running if seq.num_remaining > 1]
        outline.promised = sum(self._num_blocks(seq.num_tokens) - len(seq.block_ids) for seq in catching_up)
        for seq in catching_up:
            self._admit_before(outline, seq.order_key)
            if outline.budget == 0:
                break
            if seq in self._running:
                self._compute(outline, seq)
        self._admit_before(outline, (float("inf"), 0.0, 0))
        self._placing.extend(outline, drafts, self.max_len)
        assert outline.items or not self._open, "requests are open, and none can run"
        return Plan(tuple(outline.items.values()), tuple(outline.copies.values()))

    def commit(self, plan: Plan, result: StepResult) -> list[StepDelta]:
        """Takes in what a plan computed: tokens, cache entries, ends. Requests aborted meanwhile are skipped."""
        self._placing.release_copies()
        deltas, self._undelivered = self._undelivered, []
        sampled = iter(result.sampled)
        for item in plan.items:
            tokens = next(sampled) if item.samples else ()
            seq = item.seq
            if self._open.get(seq.request_id) is not seq:
                continue
            seq.num_computed = item.start + item.num_known
            if seq.wants_prompt_logprobs:
                seq.prompt_logprobs.extend(result.prompt_logprobs.get(seq.request_id, ()))
            if item.samples:
                deltas += self._append(item, tokens)
            else:
                self._register(seq)
                self.ranking.progressed(seq)
        return deltas

    def check(self) -> None:
        """Asserts every invariant of the requests, their blocks and the pool."""
        self._waiting.check()
        assert len(self._open) == len(self._waiting) + len(self._running)
        self._running.check()
        assert len(self._running) <= self.max_running
        for seq in self._open.values():
            waits, runs = seq in self._waiting, seq in self._running
            assert waits != runs, f"{seq.request_id}: {waits=} {runs=}"
            assert not waits or (not seq.block_ids and seq.num_computed == 0 and seq.num_registered == 0)
            assert seq.num_computed < seq.num_tokens <= self.max_len
            assert seq.num_computed <= len(seq.block_ids) * self.pool.block_size
            assert len(seq.block_ids) <= self._num_blocks(seq.num_tokens)
            assert seq.num_registered * self.pool.block_size <= seq.num_computed or not self.config.prefix_caching
        left = {seq.request_id: seq.num_remaining for seq in self._running if seq.num_remaining > 1}
        self.ranking.pending.check(left | {seq.request_id: seq.standing.num_expected for seq in self._waiting})
        self.pool.check([*(seq.block_ids for seq in self._running), self._placing.copy_sources])

    # How a plan is filled.

    def _compute(self, outline: Outline, seq: Sequence) -> None:
        """Plans a running sequence's next tokens; for blocks it preempts from the end of the order, even itself."""
        num_tokens = min(seq.num_remaining, outline.budget)
        needed = self._num_blocks(seq.num_computed + num_tokens) - len(seq.block_ids)
        while needed > self.pool.num_free:
            victim = self._running.last
            self._preempt(outline, victim)
            if victim is seq:
                return
        if needed > 0:
            seq.block_ids.extend(self.pool.allocate(needed))
            outline.promised -= needed
        samples = seq.num_computed + num_tokens == seq.num_tokens
        outline.items[seq.request_id] = PlanItem(seq, seq.num_computed, num_tokens, samples)
        outline.budget -= num_tokens

    def _admit_before(self, outline: Outline, limit: OrderKey) -> None:
        """Admits waiting sequences that come before `limit`, until one does not fit: it is not overtaken."""
        while outline.budget > 0 and len(self._running) < self.max_running:
            seq = self._waiting.peek()
            if seq is None or seq.order_key > limit or not self._has_adapter_slot(seq):
                return
            if self._refresh(seq):  # it may not be the next any more, or before the limit
                continue
            if not self._placing.place(outline, seq, len(self._running)):
                return
            self._waiting.pop()
            self._running.add(seq)
            self.ranking.progressed(seq)
            self._compute(outline, seq)

    def _refresh(self, seq: Sequence) -> bool:
        """Moves a waiting sequence to where it belongs by what the cache holds of it now; whether it moved."""
        moved = self.ranking.refresh(seq)
        if moved:
            self._waiting.move(seq)
        return moved

    def _has_adapter_slot(self, seq: Sequence) -> bool:
        """A step can hold `max_adapters` adapters; an engine without any ignores them (they are refused earlier)."""
        adapter = seq.request.adapter
        if adapter is None or self.config.max_adapters == 0:
            return True
        used = {running.request.adapter for running in self._running} - {None}
        return adapter in used or len(used) < self.config.max_adapters

    def _preempt(self, outline: Outline, seq: Sequence) -> None:
        """Takes back a running sequence's blocks, and its part of the outline; it waits at its old place."""
        item = outline.items.pop(seq.request_id, None)
        if item is not None:
            outline.budget += item.num_tokens
        assert seq.request_id not in outline.copies, "only those before it in the order were admitted in this plan"
        if seq.num_remaining > 1:
            outline.promised -= self._num_blocks(seq.num_tokens) - len(seq.block_ids)
        self._vacate(seq)
        if seq.wants_prompt_logprobs:
            seq.prompt_logprobs.clear()  # they come again
        seq.num_preemptions += 1
        self.num_preemptions += 1
        self.ranking.waits_again(seq)
        self._waiting.push(seq)

    def _expire(self) -> None:
        for seq in self._waiting.expired(self._clock()):
            self._end(seq)
            message = f"the deadline of {seq.request.deadline_s} s passed while the request waited for the engine"
            self._undelivered.append(terminal(seq, "error", fault=Fault("deadline_exceeded", message)))

    # What a result means.

    def _register(self, seq: Sequence) -> None:
        """Offers blocks to the prefix cache once every token in them is computed."""
        num_full = seq.num_computed // self.pool.block_size
        if self.config.prefix_caching and num_full > seq.num_registered:
            self.pool.store(seq.namespace, seq.tokens, seq.block_ids, range(seq.num_registered, num_full))
            seq.num_registered = num_full

    def _append(self, item: PlanItem, sampled: tuple[Sampled, ...]) -> list[StepDelta]:
        """Takes in an item's new tokens, up to the one that ends the sequence."""
        seq, before = item.seq, item.seq.num_tokens
        deltas = take_in(seq, sampled, self.config, self.max_len)
        seq.num_computed += max(0, seq.num_tokens - before - 1)
        self.num_output_tokens += seq.num_tokens - before
        if item.drafts:
            self._placing.shrink(seq)
        self._register(seq)
        if deltas[-1].finish_reason is not None:
            self._end(seq)
        else:
            self.ranking.progressed(seq)
        return deltas

    # Where sequences and blocks are.

    def _end(self, seq: Sequence) -> None:
        """Takes a sequence out from wherever it is."""
        del self._open[seq.request_id]
        self.ranking.leave(seq)
        if seq in self._waiting:
            self._waiting.remove(seq)
        else:
            self._vacate(seq)

    def _vacate(self, seq: Sequence) -> None:
        self._running.remove(seq)
        self.pool.free(seq.block_ids)
        seq.block_ids = []
        seq.num_computed = 0
        seq.num_registered = 0

    def _num_blocks(self, num_tokens: int) -> int:
        return blocks_for(num_tokens, self.pool.block_size)
