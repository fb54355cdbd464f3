"""What came of a simulation: every request, and the figures that sum it up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ops.simulate.fleet import FleetSpec
from ops.simulate.replica import SimReplica
from ops.simulate.trace import Trace


class Outcome:
    """One request: seconds on the virtual clock, and where it went."""

    __slots__ = ("arrival_s", "end_s", "first_s", "num_cached", "replica", "sent_s")

    def __init__(self) -> None:
        self.arrival_s = 0.0
        self.sent_s = 0.0
        self.first_s = 0.0
        self.end_s = 0.0
        self.replica = -1
        self.num_cached = 0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrival_s


@dataclass(frozen=True, slots=True)
class Played:
    """A run that is over, as the driver leaves it. `outcomes` go with the requests of `trace`."""

    policy: str
    trace: Trace
    fleet: FleetSpec
    load: float
    outcomes: Sequence[Outcome]
    replicas: Sequence[SimReplica]


@dataclass(frozen=True, slots=True)
class Result:
    """One run, request by request in the order of the trace (those that fit a replica), and summed up.

    `summary` is what the JSON shows; its keys have units as suffix.
    """

    policy: str
    trace: str
    fleet: FleetSpec
    load: float
    arrivals_s: tuple[float, ...]
    ttfts_s: tuple[float, ...]
    ends_s: tuple[float, ...]
    in_time: tuple[bool, ...]
    replicas: tuple[int, ...]
    num_cached: tuple[int, ...]
    summary: dict[str, Any]

    @property
    def attainment(self) -> float:
        """The part of the requests whose first token came in time."""
        return sum(self.in_time) / len(self.in_time)

    @property
    def sustained(self) -> bool:
        """Whether that is enough."""
        return self.attainment >= self.fleet.slo.attainment

    @classmethod
    def of(cls, played: Played) -> Result:
        """Sums up a run."""
        outcomes, fleet = played.outcomes, played.fleet
        slo, calibration = fleet.slo, fleet.replica.calibration
        pairs = zip(outcomes, played.trace.requests, strict=True)
        return cls(
            policy=played.policy,
            trace=played.trace.name,
            fleet=fleet,
            load=played.load,
            arrivals_s=tuple([o.arrival_s for o in outcomes]),
            ttfts_s=tuple([o.ttft_s for o in outcomes]),
            ends_s=tuple([o.end_s for o in outcomes]),
            in_time=tuple([o.ttft_s <= slo.target_s(request, calibration) for o, request in pairs]),
            replicas=tuple([o.replica for o in outcomes]),
            num_cached=tuple([o.num_cached for o in outcomes]),
            summary={},
        )._summed_up(played)

    def _summed_up(self, played: Played) -> Result:
        self.summary.update(self._latencies(played), **_efforts(played))
        return self

    def _latencies(self, played: Played) -> dict[str, Any]:
        ttfts, requests = self.ttfts_s, played.trace.requests
        ordered = sorted(ttfts)
        longest = sorted(range(len(ttfts)), key=lambda i: requests[i].num_prompt)[-max(1, len(ttfts) // 10) :]
        pairs = zip(played.outcomes, requests, strict=True)
        gaps = [(o.end_s - o.first_s) / (r.num_output - 1) for o, r in pairs if r.num_output > 1]
        return {
            "attainment": self.attainment,
            "ttft_mean_s": sum(ttfts) / len(ttfts),
            "ttft_p50_s": quantile(ordered, 0.5),
            "ttft_p95_s": quantile(ordered, 0.95),
            "ttft_p99_s": quantile(ordered, 0.99),
            "ttft_p99_longest_tenth_s": quantile(sorted(ttfts[i] for i in longest), 0.99),
            "tpot_mean_s": sum(gaps) / len(gaps) if gaps else 0.0,
        }


def _efforts(played: Played) -> dict[str, Any]:
    outcomes, replicas, trace = played.outcomes, played.replicas, played.trace
    end_s = max(o.end_s for o in outcomes)
    num_requests = [0] * len(replicas)
    for outcome in outcomes:
        num_requests[outcome.replica] += 1
    num_loads = sum(replica.adapters.num_loads for replica in replicas)
    num_adapted = sum(1 for request in trace.requests if request.adapter is not None)
    return {
        "hit_ratio": sum(o.num_cached for o in outcomes) / trace.num_prompt_tokens,
        "requests_max_over_mean": _max_over_mean(num_requests),
        "prefill_max_over_mean": _max_over_mean([replica.prefill_tokens for replica in replicas]),
        "busy": sum(replica.busy_s for replica in replicas) / (end_s * len(replicas)),
        "num_requests": len(outcomes),
        "duration_s": end_s,
        "adapter_loads": num_loads,
        "swap_rate": num_loads / num_adapted if num_adapted else 0.0,
    }


def _max_over_mean(amounts: Sequence[int]) -> float:
    return max(amounts) * len(amounts) / max(1, sum(amounts))


def quantile(ordered: Sequence[float], q: float) -> float:
    """The q-quantile of sorted values, between neighbours in proportion; 0 of nothing."""
    if not ordered:
        return 0.0
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)
