"""What the queue may hold, whose jobs go when it is full, and when a refused one should come back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from configs.schema import AdmissionConfig
from gateway.types import Job

RATE_WINDOW_S = 30.0
MIN_RETRY_S = 1.0
MAX_RETRY_S = 60.0
"""OpenAI's clients give up on a Retry-After beyond two minutes."""


@dataclass(slots=True)
class Held:
    """Jobs in a queue, and what they hold."""

    num_jobs: int = 0
    num_tokens: int = 0
    num_bytes: int = 0

    def add(self, job: Job, sign: int = 1) -> None:
        self.num_jobs += sign
        self.num_tokens += sign * job.num_prompt_tokens
        self.num_bytes += sign * job.num_bytes


@dataclass(slots=True)
class Tenancy:
    """What one tenant holds; `weight` as it last was."""

    weight: float
    held: Held = field(default_factory=Held)


class Bounds:
    """Counts what waits, in all and by tenant, against the profile's limits.

    When the queue is full, room is made at the expense of the tenant that takes most of it for its weight (longest
    queue drop: Demers, Keshav, Shenker 1989), so that one tenant's flood never refuses another's first request.
    """

    def __init__(self, config: AdmissionConfig) -> None:
        self._config = config
        self._all = Held()
        self._tenants: dict[str, Tenancy] = {}

    @property
    def num_jobs(self) -> int:
        return self._all.num_jobs

    def add(self, job: Job) -> None:
        self._all.add(job)
        self._tenants.setdefault(job.tenant.tenant_id, Tenancy(job.tenant.weight)).held.add(job)

    def remove(self, job: Job) -> None:
        self._all.add(job, -1)
        tenancy = self._tenants[job.tenant.tenant_id]
        tenancy.held.add(job, -1)
        if not tenancy.held.num_jobs:
            del self._tenants[job.tenant.tenant_id]

    def overflow(self, job: Job) -> str | None:
        """Which limit one more job would break, in words; None when it fits."""
        held, limits = self._all, self._config
        if held.num_jobs >= limits.max_queued:
            return f"{held.num_jobs} requests are waiting (at most {limits.max_queued})"
        if held.num_tokens + job.num_prompt_tokens > limits.max_queued_tokens:
            return f"{held.num_tokens} prompt tokens are waiting (at most {limits.max_queued_tokens})"
        if held.num_bytes + job.num_bytes > limits.max_queued_bytes:
            return f"{held.num_bytes} bytes are waiting (at most {limits.max_queued_bytes})"
        return None

    def hog(self, job: Job) -> str | None:
        """The tenant that holds most for its weight, if more than the job's own would with this job."""
        mine = self._tenants.get(job.tenant.tenant_id)
        wanted = Held() if mine is None else Held(mine.held.num_jobs, mine.held.num_tokens, mine.held.num_bytes)
        wanted.add(job)
        tenant_id = max(self._tenants, key=lambda t: (self._share(self._tenants[t]), t), default=None)
        if tenant_id is None or tenant_id == job.tenant.tenant_id:
            return None
        is_more = self._share(self._tenants[tenant_id]) > self._share(Tenancy(job.tenant.weight, wanted))
        return tenant_id if is_more else None

    def check(self, jobs: Iterable[Job]) -> None:
        """Asserts that the counts are those of `jobs`; for tests."""
        expected = Bounds(self._config)
        for job in jobs:
            expected.add(job)
        assert self._all == expected._all, f"{self._all=} {expected._all=}"
        assert self._tenants == expected._tenants

    def _share(self, tenancy: Tenancy) -> float:
        held, limits = tenancy.held, self._config
        largest = max(
            held.num_jobs / limits.max_queued,
            held.num_tokens / limits.max_queued_tokens,
            held.num_bytes / limits.max_queued_bytes,
        )
        return largest / tenancy.weight


class DrainRate:
    """How fast a queue goes down, in cost units a second: an exponential window over what left it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._since = clock()
        self._at = self._since
        self._amount = 0.0

    def add(self, cost: float) -> None:
        """Something of that cost left the queue now."""
        self._amount = self._decayed(self._clock()) + cost
        self._at = self._clock()

    def seconds_for(self, cost: float) -> float:
        """How long that much takes to leave, kept within what a client will honour."""
        now = self._clock()
        amount = self._decayed(now)
        if amount <= 0:
            return MIN_RETRY_S
        window_s = RATE_WINDOW_S * -math.expm1(-(now - self._since) / RATE_WINDOW_S)
        return min(max(cost * window_s / amount, MIN_RETRY_S), MAX_RETRY_S)

    def _decayed(self, now: float) -> float:
        return self._amount * math.exp((self._at - now) / RATE_WINDOW_S)
