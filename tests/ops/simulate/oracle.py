"""One replica, step by step, in the slowest and most obvious way: what the event-skipping one must agree with.

Nothing is shared with it but the step cost, the order's function and the learnt rates (which get one step at a time).
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ops.simulate.pending import LearntRates
from ops.simulate.replica import ReplicaSpec
from ops.simulate.trace import TraceRequest
from ops.simulate.work import Work
from replicas.engine.order import ORDERS, order_key
from replicas.engine.scheduler import REFRESHED_PER_STEP


@dataclass
class Job:
    number: int
    request: TraceRequest
    arrival_s: float
    key: tuple[float, float, int] = (0.0, 0.0, 0)
    expected: int = -1
    computed: int = 0
    produced: int = 0
    table: list[int] = field(default_factory=list)
    room: int = 0
    first_s: float | None = None
    end_s: float | None = None
    num_cached: int = 0

    @property
    def prefilling(self) -> bool:
        return self.computed < self.request.num_prompt


class Oracle:
    """`cached`: block → when it was released last, None while somebody uses it."""

    def __init__(self, spec: ReplicaSpec, block_tokens: int) -> None:
        self.spec = spec
        self.size = block_tokens
        self.now = 0.0
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.cached: dict[int, int | None] = {}
        self.num_releases = 0
        self.rates = LearntRates()
        self.num_jobs = 0
        self.done: list[Job] = []

    def play(self, requests: list[TraceRequest]) -> list[Job]:
        """All requests, in order of arrival; returns them in that order when all have ended."""
        todo = list(requests)
        while todo or self.waiting or self.running:
            if not self.waiting and not self.running:  # whoever comes first begins a step at once
                self.now = todo[0].arrival_s
                self.arrive(todo.pop(0))
            decoding, chunks = self.plan()
            num_tokens = sum(num for _, num in chunks)
            step_s = self.spec.calibration.step_s(len(decoding) + len(chunks), num_tokens)
            while todo and todo[0].arrival_s < self.now + step_s:  # they see what the steps before have left
                self.arrive(todo.pop(0))
            self.rates.observe((1, step_s), num_tokens, len(decoding))
            self.now += step_s
            self.commit(decoding, chunks)
        return sorted(self.done, key=lambda job: job.number)

    def arrive(self, request: TraceRequest) -> None:
        job = Job(self.num_jobs, request, request.arrival_s)
        self.num_jobs += 1
        self.rates.arrived(self.uncached(job))
        self.waiting.append(job)
        self.rank(job)

    def uncached(self, job: Job) -> int:
        return job.request.num_prompt - min(self.match(job.request) * self.size, job.request.num_prompt - 1)

    def rank(self, job: Job) -> bool:
        """Gives a waiting job the key that what is cached now gives it; whether that is another."""
        if self.uncached(job) == job.expected:
            return False
        job.expected, before = self.uncached(job), job.key
        due = ORDERS[self.spec.order](Work(job.request, 0), job.arrival_s, job.expected, self.rates.pace)
        job.key = order_key(due, 0.0, job.number)
        return job.key != before

    def plan(self) -> tuple[list[Job], list[tuple[Job, int]]]:
        """Who decodes in the next step, and how much of which prompts is computed in it."""
        for job in self.waiting[:REFRESHED_PER_STEP]:
            self.rank(job)
        self.waiting = self.waiting[REFRESHED_PER_STEP:] + self.waiting[:REFRESHED_PER_STEP]
        decoding = [job for job in self.running if not job.prefilling]
        budget = self.spec.max_num_batched_tokens - len(decoding)
        chunks: list[tuple[Job, int]] = []
        may_admit = True
        while budget > 0:
            taken = [job for job, _ in chunks]
            ready = [job for job in self.running if job.prefilling and job not in taken]
            ready += self.waiting if may_admit else []
            if not ready:
                break
            job = min(ready, key=lambda job: job.key)
            if job in self.waiting and self.rank(job):
                continue
            if job in self.waiting and not self.admit(job):
                may_admit = False
                continue
            chunks.append((job, min(budget, job.request.num_prompt - job.computed)))
            budget -= chunks[-1][1]
        return decoding, chunks

    def commit(self, decoding: list[Job], chunks: list[tuple[Job, int]]) -> None:
        """What the step that ends now has computed."""
        ended = []
        for job in decoding:
            job.produced += 1
            if job.produced == job.request.num_output:
                ended.append(job)
        for job in sorted(ended, key=lambda job: job.number):
            self.end(job)
        for job, num in chunks:
            job.computed += num
            self.store(job)
            if not job.prefilling:
                job.first_s = self.now
                job.produced = 1
                if job.request.num_output == 1:
                    self.end(job)

    def match(self, request: TraceRequest) -> int:
        num = 0
        while num < len(request.blocks) and request.blocks[num] in self.cached:
            num += 1
        return num

    def used(self) -> int:
        """Tokens that cannot be evicted."""
        return sum(job.room for job in self.running) + self.size * sum(at is None for at in self.cached.values())

    def admit(self, job: Job) -> bool:
        if len(self.running) >= self.spec.max_num_seqs:
            return False
        blocks, matched = job.request.blocks, self.match(job.request)
        room = (len(blocks) - matched) * self.size + max(0, job.request.num_prompt - len(blocks) * self.size)
        room += job.request.num_output
        num_idle = sum(self.cached[block] is not None for block in blocks[:matched])
        if self.used() + num_idle * self.size + room > self.spec.kv_tokens:
            return False
        job.room, job.table = room, list(blocks[:matched])
        for block in job.table:
            self.cached[block] = None
        job.num_cached = job.computed = min(matched * self.size, job.request.num_prompt - 1)
        self.waiting.remove(job)
        self.running.append(job)
        while sum(job.room for job in self.running) + len(self.cached) * self.size > self.spec.kv_tokens:
            idle = {block: at for block, at in self.cached.items() if at is not None}
            del self.cached[min(idle, key=lambda block: idle[block])]
        return True

    def store(self, job: Job) -> None:
        """Blocks whose tokens are all computed; the last one may be partial."""
        num = len(job.request.blocks) if not job.prefilling else job.computed // self.size
        for block in job.request.blocks[len(job.table) : num]:
            job.table.append(block)
            job.room -= self.size
            self.cached[block] = None

    def end(self, job: Job) -> None:
        job.end_s = self.now
        self.running.remove(job)
        self.done.append(job)
        for block in reversed(job.table):
            if not any(block in other.table for other in self.running):
                self.num_releases += 1
                self.cached[block] = self.num_releases
