"""How a sequence ends, and the delta that says so."""

from __future__ import annotations

from replicas.contract import Fault, FinishReason, StepDelta
from replicas.engine.limits import SchedulerConfig
from replicas.engine.sequence import Sequence


def finish(seq: Sequence, config: SchedulerConfig, max_len: int) -> tuple[FinishReason, int | None] | None:
    """Whether the last output token ends the sequence: (finish_reason, stop_reason), None when it goes on.

    The end-of-sequence token and stop tokens count from `min_tokens` outputs on, as in vLLM; they stay in the output.
    `stop_reason` is the id of a stop token, None for end of sequence.
    """
    sampling = seq.request.sampling
    if seq.num_output > 0 and seq.num_output >= sampling.min_tokens:
        last = seq.tokens[-1]
        if last in config.eos_token_ids and not sampling.ignore_eos:
            return "stop", None
        if last in sampling.stop_token_ids:
            return "stop", last
    if seq.num_output >= sampling.max_tokens or seq.num_tokens >= max_len:
        return "length", None
    return None


def terminal(
    seq: Sequence, reason: FinishReason, *, stop_reason: int | None = None, fault: Fault | None = None
) -> StepDelta:
    """A last delta without tokens."""
    return StepDelta(seq.request_id, seq.request.attempt, finish_reason=reason, stop_reason=stop_reason, fault=fault)
