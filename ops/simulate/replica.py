"""A replica that skips from event to event: chunked prefill, continuous batching, paged KV, one order for all.

What a step holds, as in `replicas.engine.scheduler`: every decoding sequence one token; the rest of the token budget to
prompts, part-computed and waiting ones merged by the order's key. Nothing changes while

    no decode ends · the first prompt takes the whole budget · nobody comes who would go before it

so such steps are one segment, and only its end is an event. A request that arrives cuts the segment at the end of the
step under way, when it could be part of the next one.

Different from the real scheduler: an answer's KV is reserved at admission (so nothing is preempted).
"""

from __future__ import annotations

from bisect import insort
from collections import deque
from dataclasses import dataclass, field
from heapq import heappop, heappush
from math import inf

from ops.simulate.adapters import SimAdapters
from ops.simulate.cache import KvLog, PagedCache, nothing
from ops.simulate.calibration import Calibration
from ops.simulate.frame import AdapterState, Frame, Steps
from ops.simulate.line import WaitingLine
from ops.simulate.pending import LearntRates
from ops.simulate.work import Progress, Work
from replicas.credits import Turns
from replicas.engine.order import OrderKey, OrderName


@dataclass(frozen=True, slots=True)
class ReplicaSpec:
    """One replica. `kv_tokens`: its KV cache. `max_adapters`: LoRA slots, of which `max_adapter_loads` load at once."""

    kv_tokens: int = 4_000_000
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    order: OrderName = "fcfs"
    max_adapters: int = 0
    max_adapter_loads: int = 2
    calibration: Calibration = field(default_factory=Calibration)


class _Segment:
    """`num_steps` equal steps from `begin` on. `items`: prompts and the tokens each computes in every step."""

    __slots__ = ("begin", "extensible", "items", "num_learnt", "num_steps", "step_s", "tokens")

    def __init__(self, begin: float, items: list[tuple[Work, int]], extensible: OrderKey | None) -> None:
        self.begin = begin
        self.items = items
        self.extensible = extensible
        self.tokens = 0
        self.num_steps = 1
        self.num_learnt = 0
        self.step_s = 0.0

    @property
    def end(self) -> float:
        return self.begin + self.num_steps * self.step_s


class SimReplica:
    """Driven from outside: `submit`, and `advance` at `next_at`; both return what happened.

    `log` hears of KV events.
    """

    def __init__(self, spec: ReplicaSpec, block_tokens: int, log: KvLog = nothing) -> None:
        self.spec = spec
        self.cache = PagedCache(spec.kv_tokens, block_tokens, log)
        load_s = spec.calibration.adapter_load_s
        self.adapters: SimAdapters[Work] = SimAdapters(spec.max_adapters, spec.max_adapter_loads, load_s)
        self.turns: Turns[object] = Turns()
        self.num_steps = 0
        self.busy_s = 0.0
        self.prefill_tokens = 0
        self._rates = LearntRates()
        self._waiting = WaitingLine(spec.order, self.cache, self._rates)
        self._catching: list[tuple[OrderKey, Work]] = []
        self._decoding: list[tuple[int, int, Work]] = []
        self._segment: _Segment | None = None
        self._blocked: OrderKey | None = None
        self._frames: deque[Frame] = deque()
        self._record(0.0, 0.0)

    @property
    def next_at(self) -> float:
        """When `advance` must be called next; infinity while there is nothing to do."""
        segment_end = inf if self._segment is None else self._segment.end
        return min(segment_end, self.adapters.next_at)

    @property
    def num_open(self) -> int:
        return self._waiting.pending.total + len(self._catching) + len(self._decoding)

    def submit(self, work: Work, now: float) -> Progress:
        """A request arrives. Its prompt and answer must fit into the cache."""
        self.catch_up(now)
        self._waiting.enter(work, now)
        progress = Progress(now)
        if self.adapters.ready(work, now):
            self._newcomers([work], progress)
        self._tell(now)
        return progress

    def prefetch(self, adapter: str, rank: int, now: float) -> None:
        """A request for the adapter will come."""
        self.adapters.prefetch(adapter, rank, now)
        self._tell(now)

    def advance(self) -> Progress:
        """Does what is due at `next_at`."""
        now = self.next_at
        progress = Progress(now)
        segment = self._segment
        if self.adapters.next_at <= now:
            self._newcomers(self.adapters.advance(now), progress)
        if segment is not None and segment.end <= now:
            self._finish(segment, progress)
            self._waiting.refresh_some(segment.num_steps)
            self._plan(now, progress)
        self._record(now, now)
        return progress

    def catch_up(self, now: float) -> None:
        """Takes in the steps that have ended by now: rates, and blocks of the prompt under way that others may use."""
        segment = self._segment
        if segment is None or segment.num_steps == 1:
            return
        num_steps = int((now - segment.begin) / segment.step_s)
        if num_steps > segment.num_learnt:
            self._learn(segment, num_steps)
            for work, tokens in segment.items:
                self._store(work, work.num_left - tokens * num_steps)

    def frame(self, at: float) -> Frame:
        """What the last step that had ended by then pushed."""
        frames = self._frames
        while len(frames) > 1 and frames[1].since <= at:
            frames.popleft()
        return frames[0]

    # Steps.

    def _newcomers(self, works: list[Work], progress: Progress) -> None:
        """These are ready to run: begins to step, or ends the segment with the step that is under way."""
        for work in works:
            self._waiting.ready(work)
        segment = self._segment
        if segment is None:
            if works:
                self._plan(progress.at, progress)
        elif segment.num_steps > 1 and any(self._matters(work.key, segment) for work in works):
            done = int((progress.at - segment.begin) / segment.step_s) + 1
            segment.num_steps = min(segment.num_steps, done)

    def _matters(self, key: OrderKey, segment: _Segment) -> bool:
        """Whether a newcomer with this key could be part of the segment's next step."""
        if self._blocked is not None and key > self._blocked:
            return False
        return segment.extensible is None or key < segment.extensible

    def _plan(self, now: float, progress: Progress) -> None:
        """Fills the next step, and finds how often it repeats."""
        spec = self.spec
        num_decodes = len(self._decoding)
        left = spec.max_num_batched_tokens - num_decodes
        items: list[tuple[Work, int]] = []
        self._blocked = None
        position = 0
        while left > 0:
            work = self._next(position, progress)
            if work is None:
                break
            num = min(work.num_left, left)
            items.append((work, num))
            left -= num
            position += 1
        if not items and not num_decodes:
            self._segment = None
            return
        whole = len(items) == 1 and left == 0 and items[0][0].num_left > items[0][1]
        segment = _Segment(now, items, items[0][0].key if whole else None)
        segment.tokens = sum(num for _, num in items)
        segment.step_s = spec.calibration.step_s(num_decodes + len(items), segment.tokens)
        if whole:
            segment.num_steps = (items[0][0].num_left - 1) // items[0][1]
        elif not items:
            segment.num_steps = self._decoding[0][0] - self.num_steps
        if num_decodes:
            segment.num_steps = min(segment.num_steps, self._decoding[0][0] - self.num_steps)
        self._segment = segment

    def _next(self, position: int, progress: Progress) -> Work | None:
        """The prompt that comes at this place of the step: part-computed, or admitted now; None when there is none."""
        catching = self._catching[position][1] if position < len(self._catching) else None
        if self._blocked is None:
            work = self._waiting.peek()
            if work is not None and (catching is None or work.key < catching.key):
                if self._admit(work):
                    insort(self._catching, (work.key, work))
                    progress.admitted.append(work)
                    return work
                self._blocked = work.key
        return catching

    def _admit(self, work: Work) -> bool:
        """Gives a waiting prompt its place and KV, if they are there."""
        if len(self._catching) + len(self._decoding) >= self.spec.max_num_seqs:
            return False
        request, cache = work.request, self.cache
        matched, size = work.reach, cache.block_tokens  # looked at again just now
        tail = max(0, request.num_prompt - len(request.blocks) * size)
        private = (len(request.blocks) - matched) * size + tail + request.num_output
        if not cache.take(request.blocks, matched, private):
            return False
        self._waiting.take(work)
        work.num_private = private
        work.num_stored = matched
        work.num_cached = min(matched * size, request.num_prompt - 1)
        work.num_left = request.num_prompt - work.num_cached
        return True

    def _finish(self, segment: _Segment, progress: Progress) -> None:
        """Everything the segment's steps computed."""
        num = segment.num_steps
        self.num_steps += num
        self.busy_s += num * segment.step_s
        self.prefill_tokens += num * segment.tokens
        self._learn(segment, num)
        while self._decoding and self._decoding[0][0] == self.num_steps:
            self._end(heappop(self._decoding)[2], progress)
        for work, tokens in segment.items:
            work.num_left -= tokens * num
            self._store(work, work.num_left)
            if work.num_left == 0:
                self._catching.remove((work.key, work))
                self._waiting.leave(work)
                progress.first.append(work)
                if work.request.num_output <= 1:
                    self._end(work, progress)
                else:
                    work.finish_step = self.num_steps + work.request.num_output - 1
                    heappush(self._decoding, (work.finish_step, work.number, work))

    def _learn(self, segment: _Segment, num_steps: int) -> None:
        """Rates, from the first so many steps of the segment."""
        if num_steps > segment.num_learnt:
            steps = (num_steps - segment.num_learnt, segment.step_s)
            self._rates.observe(steps, segment.tokens, len(self._decoding))
            segment.num_learnt = num_steps

    def _store(self, work: Work, num_left: int) -> None:
        """Offers what is computed of a prompt to others; a partial last block with the prompt's end."""
        blocks, size = work.request.blocks, self.cache.block_tokens
        num_full = len(blocks) if num_left == 0 else (work.request.num_prompt - num_left) // size
        if num_full > work.num_stored:
            self.cache.store(blocks, work.num_stored, num_full)
            work.num_private -= (num_full - work.num_stored) * size
            work.num_stored = num_full

    def _end(self, work: Work, progress: Progress) -> None:
        self.cache.release(work.request.blocks, work.num_private)
        self.adapters.release(work, progress.at)
        progress.ended.append(work)

    def _tell(self, now: float) -> None:
        """Something changed beside the steps: a replica tells every ingress at once what another one has sent."""
        self._record(now, now)

    def _record(self, now: float, since: float) -> None:
        """Keeps the state as it is told from `since` on."""
        segment, catching, adapters = self._segment, self._catching, self.adapters
        if segment is None:
            steps = Steps(num_before=self.num_steps)
        else:
            steps = Steps(segment.begin, segment.step_s, segment.num_steps, self.num_steps)
            if segment.extensible is not None:
                steps.head_left, steps.head_tokens = segment.items[0][0].num_left, segment.tokens
        pending = self._waiting.pending
        frame = Frame(
            since,
            steps,
            (pending.num.copy(), pending.tokens.copy()),
            [work.num_left for _, work in (catching[1:] if steps.head_left else catching)],
            len(catching) + len(self._decoding),
            self.cache.num_free_tokens,
            self.cache.capacity,
            (self._rates.prefill_tokens_per_s, self._rates.step_time_s),
        )
        if self.spec.max_adapters:
            frame.adapters = AdapterState(
                adapters.slots.resident,
                adapters.under_way(now),
                adapters.num_waiting,
                adapters.load_s,
                adapters.queue_s(now),
            )
        self._frames.append(frame)
