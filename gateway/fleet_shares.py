"""Fair shares and quotas over all ingresses: what each counts, the others add to their own (`routing.shared_counts`).

    this ingress                         the others
    served a tenant ── "served" ───────► the tenant's counter there moves as well; so tags of all ingresses compare
    somebody waits ─── "lowest" ───────► who is further ahead in the same band leaves a place to them
    a request, tokens ── "requests", "tokens" ► the tenant's buckets there; open requests: "open"

Without Redis every ingress goes on by what it knows: tenants are fair, and held to their quotas, at each by itself.
"""

from __future__ import annotations

from collections.abc import Callable

from gateway.admission import Admission
from gateway.fair_queue import FairQueue
from gateway.line import Waiting
from gateway.tenancy import Tenants
from gateway.tenant_lines import NOWHERE_ELSE, Elsewhere
from routing.shared_counts import Key, SharedCounts

SERVED, LOWEST, LATEST = "served", "lowest", "latest"
REQUESTS, TOKENS, OPEN = "requests", "tokens", "open"

MAX_TOLD_BANDS = 64
"""Priorities of a model whose virtual time is told: the most urgent. Clients may use any number of them."""


class FleetShares:
    """Joins an ingress's lines and quotas to the shared counts. Nothing is shared before `counts` is started."""

    def __init__(self, counts: SharedCounts, admission: Admission, tenants: Tenants) -> None:
        self._counts = counts
        self._tenants = tenants
        self._queues: dict[str, FairQueue[Waiting]] = {}
        counts.on_added = self._on_added
        counts.on_heard = self._on_heard
        counts.gauges = self._gauges
        admission.on_line = self._share_line
        for quota in tenants.quotas():
            quota.share(self._teller(quota.tenant.tenant_id), self._elsewhere(quota.tenant.tenant_id))

    def _share_line(self, model_id: str, queue: FairQueue[Waiting]) -> None:
        """A model has its first job."""
        self._queues[model_id] = queue
        queue.on_service = lambda priority, tenant_id, amount: self._counts.add(
            (SERVED, model_id, str(priority), tenant_id), amount
        )
        queue.hear(self._bands_elsewhere().get(model_id, {}))

    def _teller(self, tenant_id: str) -> Callable[[str, float], None]:
        return lambda kind, amount: self._counts.add((kind, tenant_id), amount)

    def _elsewhere(self, tenant_id: str) -> Callable[[], int]:
        return lambda: round(sum(self._counts.others((OPEN, tenant_id))))

    def _gauges(self) -> dict[Key, float]:
        gauges: dict[Key, float] = {}
        for model_id, queue in self._queues.items():
            latest, lowest = queue.latest, queue.lowest
            for priority in sorted(latest)[:MAX_TOLD_BANDS]:
                gauges[LATEST, model_id, str(priority)] = latest[priority]
                if priority in lowest:
                    gauges[LOWEST, model_id, str(priority)] = lowest[priority]
        for quota in self._tenants.quotas():
            if quota.num_open and quota.tenant.max_concurrent is not None:
                gauges[OPEN, quota.tenant.tenant_id] = quota.num_open
        return gauges

    def _on_added(self, key: Key, amount: float) -> None:
        match key:
            case (kind, model_id, priority, tenant_id) if kind == SERVED:
                if (queue := self._queues.get(model_id)) is not None:
                    queue.served_elsewhere(tenant_id, amount, int(priority))
            case (kind, tenant_id) if kind in (REQUESTS, TOKENS):
                self._tenants.taken_elsewhere(tenant_id, kind, amount)

    def _on_heard(self) -> None:
        found = self._bands_elsewhere()
        for model_id, queue in self._queues.items():
            queue.hear(found.get(model_id, {}))

    def _bands_elsewhere(self) -> dict[str, dict[int, Elsewhere]]:
        """Virtual time at the others that are not silent, by model and priority."""
        found: dict[str, dict[int, Elsewhere]] = {}
        for key, value in self._counts.all_others():
            match key:
                case (kind, model_id, priority) if kind in (LOWEST, LATEST):
                    bands = found.setdefault(model_id, {})
                    known = bands.get(int(priority), NOWHERE_ELSE)
                    bands[int(priority)] = _with(known, kind, value)
        return found


def _with(known: Elsewhere, kind: str, value: float) -> Elsewhere:
    """What is known of a band, and what one more ingress tells."""
    if kind == LATEST:
        return Elsewhere(known.lowest, max(known.latest, value))
    return Elsewhere(value if known.lowest is None else min(known.lowest, value), known.latest)
