"""What new tokens mean for a sequence: the delta that delivers them, and how it ends."""

from __future__ import annotations

from collections.abc import Iterable

from replicas.contract import Fault, FinishReason, StepDelta
from replicas.engine.limits import SchedulerConfig
from replicas.engine.sequence import Sampled, Sequence


def take_in(seq: Sequence, sampled: Iterable[Sampled], config: SchedulerConfig, max_len: int) -> list[StepDelta]:
    """Adds new tokens to a sequence, up to the one that ends it, and says so.

    A second delta says that its grammar allows no more: the last token, unlike one that ends an answer, has a text
    then.
    """
    delta = StepDelta(seq.request_id, seq.request.attempt)
    if seq.num_tokens == seq.num_prior:
        delta.num_cached_tokens = seq.num_cached
        if seq.request.sampling.prompt_logprobs is not None and not seq.request.produced:
            delta.prompt_logprobs = (None, *seq.prompt_logprobs)
            seq.prompt_logprobs.clear()
    ended, over, taken = None, None, list[Sampled]()
    for token in sampled:
        if seq.take(token.token_id):
            taken.append(token)
            ended = finish(seq, config, max_len)
        over = closing(seq, ended)
        if ended is not None or over is not None:
            break
    delta.token_ids = tuple(token.token_id for token in taken)
    delta.logprobs = tuple(token.logprob for token in taken if token.logprob is not None) or None
    if over is not None:
        return [delta, over]
    if ended is not None:
        delta.finish_reason, delta.stop_reason = ended
    return [delta]


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


def closing(seq: Sequence, ended: tuple[FinishReason, int | None] | None) -> StepDelta | None:
    """The delta that ends a sequence whose grammar allows no more, or has failed; None when it goes on or ended as
    `finish` says. Complete in its last token, an answer is no shorter than it should be."""
    if seq.grammar is None or (ended is not None and ended[0] != "length"):
        return None
    if seq.grammar.fault is not None:
        return terminal(seq, "error", fault=seq.grammar.fault)
    return terminal(seq, "stop") if seq.grammar.complete else None


def terminal(
    seq: Sequence, reason: FinishReason, *, stop_reason: int | None = None, fault: Fault | None = None
) -> StepDelta:
    """A last delta without tokens."""
    return StepDelta(seq.request_id, seq.request.attempt, finish_reason=reason, stop_reason=stop_reason, fault=fault)
