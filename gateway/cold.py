"""Requests whose deadline passes while their adapter is being loaded: told so, and when it will be there."""

from __future__ import annotations

from collections.abc import Iterable

from gateway.errors import AdapterLoadingError
from gateway.types import Job
from routing.types import ReplicaState


def too_late(job: Job, replicas: Iterable[ReplicaState], waited_s: float) -> AdapterLoadingError | None:
    """The error of a job whose deadline has passed; None where it was not its adapter that it waited for.

    `replicas`: those where it may be loaded; `waited_s`: how long it waited there for that. Where no load was ever
    measured, it may take as long again.
    """
    if job.adapter is None:
        return None
    left: list[float] = []
    for replica in replicas:
        if job.adapter in replica.adapters and not any(name == job.adapter for name, _ in replica.loading):
            return None
        left += [left_s or waited_s for name, left_s in replica.loading if name == job.adapter]
    if not left:
        return None
    error = AdapterLoadingError(
        f"The deadline passed while adapter {job.adapter} was being loaded; it will be there in about "
        f"{min(left):.1f} s.",
        param="model",
        retry_after_s=min(left),
    )
    error.waited_s = waited_s
    return error
