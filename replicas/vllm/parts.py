"""What a running vLLM is to our engine: its ends, rules and load; and a request of ours made into one of its own."""

from __future__ import annotations

from typing import Any

import msgspec
from vllm.exceptions import VLLMValidationError

from configs.grammars.source import GrammarError
from replicas.contract import EngineFacts, Fault, GenerateRequest, RefusedError
from replicas.vllm.adapters import VllmAdapters
from replicas.vllm.line import Line
from replicas.vllm.load import VllmLoad
from replicas.vllm.sampling import Rules, bad_grammar, params_of, prompt_of


class Parts(msgspec.Struct, frozen=True):
    """What there is once vLLM runs."""

    core: Any
    input_processor: Any
    supported: Any
    rules: Rules
    facts: EngineFacts
    load: VllmLoad
    line: Line
    adapters: VllmAdapters

    def inner(self, request: GenerateRequest, now_s: float) -> Any:
        """vLLM's own request, with an id of its own. Raises RefusedError."""
        priority, tie = self.line.place(request, now_s, self.load.prefill_tokens_per_s)
        try:
            found = self.input_processor.process_inputs(
                request.request_id,
                prompt_of(request),
                params_of(request, self.facts),
                self.supported,
                arrival_time=tie,
                lora_request=self.adapters.named(request.adapter),
                priority=priority,
            )
        except GrammarError as error:
            constraint = request.sampling.constraint
            raise RefusedError(bad_grammar(error, constraint.param if constraint else "response_format")) from error
        except (VLLMValidationError, ValueError) as error:
            raise RefusedError(_refused(error, request)) from error
        self.input_processor.assign_request_id(found)
        return found


def _refused(error: Exception, request: GenerateRequest) -> Fault:
    """What vLLM's own validation found; without the name of a parameter it was the grammar, where there is one."""
    param: str | None = getattr(error, "parameter", None)
    constraint = request.sampling.constraint
    if constraint is not None and param in (None, "structured_outputs"):
        return Fault("invalid_grammar", str(error).strip()[:500], param=constraint.param)
    return Fault("unsupported_parameter", str(error).strip()[:500], param=param)
