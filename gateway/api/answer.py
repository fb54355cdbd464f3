"""An answer while it comes in: its choices, what it used, and the one record of it that remains."""

from __future__ import annotations

from dataclasses import dataclass, field

from configs.schema import ModelConfig
from gateway.api.exchange import STATUS_CLIENT_GONE, Exchange
from gateway.api.flow import Batch
from gateway.api.sampling import Logprobs, SamplingFields
from gateway.api.speech import Reading
from gateway.errors import AdapterLoadingError, ApiError, InternalError, from_fault
from gateway.ledger import Outcome, UsageRecord
from gateway.names import Named
from gateway.prompt import Prompter
from gateway.tenancy import Lease
from gateway.types import Tenant
from replicas.contract import Constraint, StepDelta, TokenLogprob, unpack_tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """Packed ids, and the text that `echo` puts before the answer."""

    ids: bytes
    echo: str = ""

    @property
    def num_tokens(self) -> int:
        return len(self.ids) // 4

    def token_ids(self) -> list[int]:
        return unpack_tokens(self.ids).tolist()


@dataclass(frozen=True, slots=True)
class Call:
    """One validated request: what to generate and how to show it. `num_generated` sequences are made of each prompt,
    `fields.num_choices` of them returned. `constraint`: what they must follow. `reading`: for text that is more than
    text."""

    fields: SamplingFields
    model: ModelConfig
    prompter: Prompter
    prompts: tuple[Prompt, ...]
    logprobs: Logprobs
    num_generated: int
    prompt_param: str
    constraint: Constraint | None = None
    reading: Reading | None = None

    @property
    def skip_special_tokens(self) -> bool:
        if self.reading is not None and self.reading.shows_special:
            return False
        return self.fields.skip_special_tokens is not False


@dataclass(frozen=True, slots=True)
class Identity:
    """What every piece of one answer repeats."""

    answer_id: str
    created: int
    model: str
    fingerprint: str


@dataclass(slots=True)
class Choice:
    """One sequence as it was produced."""

    prompt: Prompt
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def text(self) -> str:
        return "".join(self.texts)

    @property
    def mean_logprob(self) -> float:
        """What best_of ranks by: log probability per token."""
        return sum(p.logprob for p in self.logprobs) / max(1, len(self.logprobs))

    def take(self, delta: StepDelta) -> None:
        self.texts.append(delta.text)
        self.token_ids += delta.token_ids
        self.logprobs += delta.logprobs or ()
        self.prompt_logprobs = delta.prompt_logprobs or self.prompt_logprobs
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason


class Meter:
    """Counts what one request uses, and closes its books exactly once whatever became of it."""

    def __init__(self, exchange: Exchange, tenant: Tenant, route: str) -> None:
        self.exchange = exchange
        self.tenant = tenant
        self.route = route
        self.lease: Lease | None = None
        self.fields: SamplingFields | None = None
        self.named: Named | None = None
        self.num_prompt_tokens = 0
        self.num_completion_tokens = 0
        self.adapter_wait_s = 0.0
        self.cached: list[int] = []
        self.num_open = 0
        self.num_sequences = 0
        self._num_per_prompt = 1
        self._first_at: float | None = None
        self._last_at = 0.0
        self._outcome: Outcome = "ok"
        self._status = 200
        self._code: str | None = None

    @property
    def model_name(self) -> str:
        """What the answer calls its model."""
        assert self.named is not None, "resolved before anything is generated"
        return self.named.shown

    def begin(self, call: Call, num_jobs: int) -> None:
        """Charges the prompts; raises RateLimitError."""
        self.num_prompt_tokens = sum(prompt.num_tokens for prompt in call.prompts)
        self.exchange.gateway.tenants.quota(self.tenant).take_prompt(self.num_prompt_tokens)
        self.cached = [0] * len(call.prompts)
        self._num_per_prompt = call.num_generated
        self.num_open = self.num_sequences = num_jobs

    def take(self, batch: Batch) -> None:
        """Counts a batch. Raises the ApiError that a terminal delta stands for when it is no honest end."""
        self._last_at = self.exchange.gateway.clock()
        if self._first_at is None:
            self._first_at = self._last_at
        for index, delta in batch:
            self.num_completion_tokens += len(delta.token_ids)
            if delta.adapter_wait_s > self.adapter_wait_s:
                self.adapter_wait_s = delta.adapter_wait_s
            if delta.num_cached_tokens and index % self._num_per_prompt == 0:
                self.cached[index // self._num_per_prompt] = delta.num_cached_tokens
            if delta.finish_reason is not None:
                self.num_open -= 1
                if delta.finish_reason not in ("stop", "length"):
                    raise _broken_off(delta)

    def check_complete(self) -> None:
        """Nothing more will come: every choice must have ended. Raises InternalError otherwise."""
        if self.num_open:
            raise InternalError(f"The answer broke off: {self.num_open} of its choices never ended.")

    @property
    def num_cached_tokens(self) -> int:
        return sum(self.cached)

    def usage(self) -> dict[str, object]:
        """OpenAI's usage object as of now."""
        return {
            "prompt_tokens": self.num_prompt_tokens,
            "completion_tokens": self.num_completion_tokens,
            "total_tokens": self.num_prompt_tokens + self.num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.num_cached_tokens},
        }

    def failed(self, error: ApiError) -> None:
        self._outcome = "refused" if self._first_at is None else "error"
        self._status, self._code = error.status, error.code
        if isinstance(error, AdapterLoadingError):
            self.adapter_wait_s = max(self.adapter_wait_s, error.waited_s)

    def cancelled(self) -> None:
        self._outcome, self._status = "cancelled", STATUS_CLIENT_GONE

    def close(self) -> None:
        """Frees the quota and writes the usage record."""
        if self.lease is not None:
            self.lease.close(self.num_completion_tokens)
        gateway, fields = self.exchange.gateway, self.fields
        arrived, client_id = self.exchange.arrived, self.exchange.client_request_id
        duration_s = gateway.clock() - arrived
        gateway.ledger.record(
            UsageRecord(
                time=gateway.wall() - duration_s,
                request_id=self.exchange.request_id,
                client_request_id=client_id.decode() if client_id else None,
                tenant=self.tenant.tenant_id,
                model="" if self.named is None else self.named.model.id,
                adapter=None if self.named is None else self.named.adapter_id,
                route=self.route,
                stream=bool(fields and fields.stream),
                outcome=self._outcome,
                status=self._status,
                code=self._code,
                user=fields.user if fields else None,
                num_choices=self.num_sequences,
                num_prompt_tokens=self.num_prompt_tokens,
                num_cached_tokens=self.num_cached_tokens,
                num_completion_tokens=self.num_completion_tokens,
                ttft_s=None if self._first_at is None else self._first_at - arrived,
                duration_s=duration_s,
                inter_token_s=self._inter_token_s(),
                adapter_wait_s=self.adapter_wait_s,
            )
        )

    def _inter_token_s(self) -> float | None:
        """Mean over all sequences of this request, which run side by side."""
        num_gaps = self.num_completion_tokens - self.num_sequences
        if self._first_at is None or num_gaps <= 0:
            return None
        return (self._last_at - self._first_at) * self.num_sequences / num_gaps


def _broken_off(delta: StepDelta) -> ApiError:
    if delta.fault is not None:
        return from_fault(delta.fault)
    return InternalError(f"The answer was ended by the server (finish_reason {delta.finish_reason!r}).")
