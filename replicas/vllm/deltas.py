"""What vLLM's engine core says of one request in one step → `StepDelta`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from replicas.contract import Fault, FinishReason, GenerateRequest, StepDelta, TokenLogprob

if TYPE_CHECKING:
    from vllm.v1.engine import EngineCoreOutput
    from vllm.v1.outputs import LogprobsLists, LogprobsTensors

_FINISH: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "abort": "abort",
    "error": "error",
    "repetition": "stop",
}


@dataclass(slots=True)
class OpenRequest:
    """A request that vLLM has. `hidden_stops`: ends of sequence that the client did not ask for by id."""

    request: GenerateRequest
    hidden_stops: frozenset[int]
    num_output: int = 0
    has_begun: bool = field(default=False)

    def delta(self, output: EngineCoreOutput) -> StepDelta:
        """The next delta; the first one tells what the cache held and what prompt tokens are worth."""
        sampling = self.request.sampling
        token_ids = tuple(output.new_token_ids)
        delta = StepDelta(self.request.request_id, self.request.attempt, token_ids)
        self.num_output += len(token_ids)
        if not self.has_begun:
            self.has_begun = True
            delta.num_cached_tokens = self._num_cached(output)
        if sampling.logprobs is not None and output.new_logprobs is not None:
            delta.logprobs = _chosen(output.new_logprobs, sampling.logprobs)
        if sampling.prompt_logprobs is not None and output.new_prompt_logprobs_tensors is not None:
            delta.prompt_logprobs = (None, *_of_prompt(output.new_prompt_logprobs_tensors, sampling.prompt_logprobs))
        if output.finish_reason is not None:
            self._end(delta, output)
        return delta

    def _num_cached(self, output: EngineCoreOutput) -> int:
        stats = output.prefill_stats
        return 0 if stats is None else min(stats.num_cached_tokens, self.request.num_prompt_tokens)

    def _end(self, delta: StepDelta, output: EngineCoreOutput) -> None:
        delta.finish_reason = _FINISH.get(str(output.finish_reason), "stop")
        if delta.finish_reason == "error":
            delta.fault = self._fault(output)
        elif output.stop_reason not in self.hidden_stops:
            delta.stop_reason = output.stop_reason

    def _fault(self, output: EngineCoreOutput) -> Fault:
        """What went wrong: 0.33 says it, 0.32 does not. A grammar is what can, before the first token and after."""
        said: str | None = getattr(getattr(output, "error", None), "message", None)
        constraint = self.request.sampling.constraint
        if constraint is None:
            return Fault("internal", said or "vLLM ended the request with an error", retryable=True)
        if self.num_output:
            words = said or "the grammar could not be followed to its end"
            return Fault("grammar_too_complex", words, param=constraint.param)
        return Fault("invalid_grammar", said or "vLLM could not compile the grammar", param=constraint.param)


def _chosen(found: LogprobsLists, num_top: int) -> tuple[TokenLogprob, ...]:
    """Column 0 is the token drawn, the most likely follow; others of the batch may have asked for more of them."""
    ids, values = found.logprob_token_ids[:, : num_top + 1], found.logprobs[:, : num_top + 1]
    return tuple(_row(row, logprobs) for row, logprobs in zip(ids.tolist(), values.tolist(), strict=True))


def _of_prompt(found: LogprobsTensors, num_top: int) -> tuple[TokenLogprob, ...]:
    ids, values = found.logprob_token_ids[:, : num_top + 1], found.logprobs[:, : num_top + 1]
    return tuple(_row(row, logprobs) for row, logprobs in zip(ids.tolist(), values.tolist(), strict=True))


def _row(ids: list[int], logprobs: list[float]) -> TokenLogprob:
    return TokenLogprob(ids[0], logprobs[0], tuple(zip(ids[1:], logprobs[1:], strict=True)))
