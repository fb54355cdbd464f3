"""What would a trace have looked like with another policy, another fleet? The real policies and index, a virtual clock.

    from pathlib import Path
    from ops.simulate import FleetSpec, ReplicaSpec, capacity, load_trace, run

    trace = load_trace(Path("mooncake_conversation.jsonl"))
    fleet = FleetSpec(num_replicas=8, replica=ReplicaSpec(kv_tokens=4_000_000, order="shortest"))
    result = run(trace, "warm", fleet, load=0.8)       # a policy's name, or a PolicySpec of your own
    print(result.attainment, result.summary["ttft_p99_s"], result.summary["hit_ratio"])
    print(capacity(trace, "warm", fleet).load)         # the largest load with 95 % of first tokens in time

Load 1.0 would keep the fleet busy with prefill alone if nothing were ever cached (`ops.simulate.trace`).
"""

from ops.simulate.calibration import Calibration
from ops.simulate.capacity import Capacity, Search, capacity
from ops.simulate.driver import run
from ops.simulate.fleet import FleetSpec
from ops.simulate.formats import load_trace
from ops.simulate.replica import ReplicaSpec
from ops.simulate.result import Result
from ops.simulate.slo import Slo
from ops.simulate.trace import Trace, TraceRequest

__all__ = ["Calibration", "Capacity", "FleetSpec", "ReplicaSpec", "Result", "Search", "Slo", "Trace", "TraceRequest",
           "capacity", "load_trace", "run"]  # fmt: skip
