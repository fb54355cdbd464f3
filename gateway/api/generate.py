"""What chat and completions do alike: tenant, body, prompt, jobs, answer, books.

    authenticate ─► quota ─► decode ─► prepare (route) ─► jobs ─► stream | collect ─► one usage record

A request becomes several jobs for n > 1, best_of and lists of prompts. Until the first delta every error is a status;
then it is the stream's last event.
"""

from __future__ import annotations

import asyncio
from hashlib import sha256
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from configs.schema import ModelConfig
from gateway import sse
from gateway.api.answer import Call, Choice, Identity, Meter, Prompt
from gateway.api.chunks import Chunks
from gateway.api.exchange import ClientGoneError, Exchange, Header, as_api_error
from gateway.api.fields import Body, ignored_header
from gateway.api.flow import Batch, Flow, Writing, open_flow, relay
from gateway.api.sampling import Limits, SamplingFields, choice_seed
from gateway.errors import AdminRequiredError, BadRequestError, UnavailableError, UnsupportedError
from gateway.names import ModelNames, Named
from gateway.prompt import Prompter
from gateway.tenancy import narrowed_salt
from gateway.types import Gateway, Job, Tenant
from replicas.contract import Constraint, SamplingParams

F = TypeVar("F", bound=SamplingFields)
F_contra = TypeVar("F_contra", bound=SamplingFields, contravariant=True)


class Target:
    """What a request named, as its route needs it: `model` is the adapter's base model when it named an adapter."""

    def __init__(self, gateway: Gateway, tenant: Tenant, named: Named) -> None:
        self.tenant = tenant
        self.named = named
        self.model: ModelConfig = named.model
        self.prompter: Prompter = gateway.prompters[self.model.id]
        facts = gateway.dispatcher.facts(self.model.id)
        if facts is None:
            raise UnavailableError(f"The model {named.name!r} has no replica yet. Please try again.", retry_after_s=5.0)
        self.facts = facts
        self.random = gateway.random


class Route(Protocol[F_contra]):
    """What differs between chat and completions."""

    name: str
    id_prefix: str

    async def prepare(self, fields: F_contra, target: Target) -> Call:
        """Validates what only this route knows and makes the prompts. Raises ApiError."""
        ...

    def chunks(self, call: Call, identity: Identity, meter: Meter) -> Chunks: ...

    def whole(self, call: Call, identity: Identity, choices: list[Choice]) -> dict[str, Any]:
        """The body of an answer that is not streamed, without `usage`."""
        ...


class Generation(Generic[F]):
    """The handler of one generating route."""

    def __init__(self, gateway: Gateway, route: Route[F], request_type: type[F]) -> None:
        self._gateway = gateway
        self._route = route
        self.route_name = route.name
        self._body = Body(request_type)
        self._replica_headers = [b"x-warmgate-replica"]
        if gateway.config.http.worker_id_header:
            self._replica_headers.append(b"x-worker-id")
        self._names = ModelNames(gateway.config, gateway.catalogue)
        self._fingerprints = {model.id: fingerprint(model) for model in gateway.config.models}

    async def __call__(self, exchange: Exchange) -> None:
        """Answers, and writes exactly one usage record for every request of a known tenant."""
        tenant = self._gateway.tenants.authenticate(exchange.header(b"authorization"))
        meter = Meter(exchange, tenant, self._route.name)
        try:
            await self._answer(exchange, meter)
        except ClientGoneError:
            meter.cancelled()
        except asyncio.CancelledError:
            meter.cancelled()
            task = asyncio.current_task()
            if not exchange.client_gone or task is None or task.uncancel() > 0:
                raise
        except Exception as error:
            await self._fail(exchange, meter, error)
        finally:
            meter.close()

    async def _fail(self, exchange: Exchange, meter: Meter, error: Exception) -> None:
        refusal = as_api_error(error, exchange.request_id)
        meter.failed(refusal)
        if refusal.status in (429, 503, 504) and not exchange.started:
            self._gateway.metrics.refusals.labels(refusal.code or refusal.type).inc()
        try:
            if exchange.started:  # a stream: nothing else starts before it can no longer fail
                await exchange.end(sse.error_event(refusal))
            else:
                await exchange.refuse(refusal)
        except ClientGoneError:
            meter.cancelled()

    async def _answer(self, exchange: Exchange, meter: Meter) -> None:
        quota = self._gateway.tenants.quota(meter.tenant)
        try:
            meter.lease = quota.enter()
            fields, ignored = self._body.decode(await exchange.json_body())
            exchange.extra_headers += ignored_header(ignored)
            meter.fields = fields
            fields.check()
            _check_admin(fields, meter.tenant)
            named = meter.named = self._names.resolve(meter.tenant, fields.model)
            target = Target(self._gateway, meter.tenant, named)
            call = await self._route.prepare(fields, target)
            if call.constraint is not None:
                await self._check_constraint(call.constraint, target)
            jobs = self._jobs(exchange.request_id, call, target)
            meter.begin(call, len(jobs))
            if exchange.client_request_id is not None:
                log = self._gateway.explainer.log
                log.name(meter.tenant.tenant_id, exchange.client_request_id.decode(), exchange.request_id)
        finally:
            exchange.extra_headers += quota.headers()
        await self._run(exchange, meter, call, jobs)

    async def _check_constraint(self, constraint: Constraint, target: Target) -> None:
        if not target.facts.structured:
            raise UnsupportedError(
                f"'{constraint.param}': this model's engine cannot make its answers follow a grammar.",
                param=constraint.param,
            )
        await self._gateway.check_grammar(constraint, target.tenant.tenant_id)

    async def _run(self, exchange: Exchange, meter: Meter, call: Call, jobs: list[Job]) -> None:
        identity = Identity(
            answer_id=f"{self._route.id_prefix}-{exchange.request_id}",
            created=int(self._gateway.wall()),
            model=meter.model_name,
            fingerprint=self._fingerprints[call.model.id],
        )
        in_flight = self._gateway.metrics.requests_in_flight.labels(call.model.id)
        in_flight.inc()
        flow = open_flow(self._gateway.dispatcher, jobs)
        watch = exchange.watch_disconnect()
        try:
            if call.fields.stream:
                await self._stream(flow, meter, call, identity)
            else:
                await self._collect(flow, meter, call, identity)
        finally:
            watch.cancel()
            in_flight.dec()
            await flow.aclose()

    async def _stream(self, flow: Flow, meter: Meter, call: Call, identity: Identity) -> None:
        exchange = meter.exchange
        chunks = self._route.chunks(call, identity, meter)

        def events(batch: Batch) -> Writing | None:
            meter.take(batch)
            written = chunks.write(batch)
            return exchange.write(written) if written else None

        batch = await flow.begin()
        meter.take(batch)
        opening = chunks.write(batch)
        exchange.extra_headers += self._answered_by(flow, meter)
        await exchange.start(200, sse.HEADERS)
        if opening:
            await exchange.write(opening)
        await relay(flow, events)
        meter.check_complete()
        await exchange.end(chunks.closing())

    async def _collect(self, flow: Flow, meter: Meter, call: Call, identity: Identity) -> None:
        choices = [Choice(prompt) for prompt in call.prompts for _ in range(call.num_generated)]

        def take(batch: Batch) -> None:
            meter.take(batch)
            for index, delta in batch:
                choices[index].take(delta)

        take(await flow.begin())
        await relay(flow, take)
        meter.check_complete()
        body = self._route.whole(call, identity, _best(choices, call))
        body["usage"] = meter.usage()
        meter.exchange.extra_headers += self._answered_by(flow, meter)
        await meter.exchange.send(sse.encode(body))

    def _answered_by(self, flow: Flow, meter: Meter) -> list[Header]:
        """Who answers, and how much of the prompts they had cached, as far as they have said."""
        replica_ids = ",".join(flow.replica_ids()).encode()
        cached = (b"x-warmgate-cached-tokens", b"%d" % meter.num_cached_tokens)
        return [*((name, replica_ids) for name in self._replica_headers), cached]

    def _jobs(self, request_id: str, call: Call, target: Target) -> list[Job]:
        fields, gateway = call.fields, self._gateway
        bound = gateway.config.admission.max_queued
        if len(call.prompts) * call.num_generated > bound:
            raise BadRequestError(
                f"{len(call.prompts)} prompts with {call.num_generated} sequences each are more than the "
                f"{bound} one request may ask for.",
                param=call.prompt_param if len(call.prompts) > 1 else "n",
            )
        limits = Limits(target.facts, call.model.default_max_tokens, call.prompt_param)
        limits.check_logprobs(call.logprobs)
        salt = narrowed_salt(target.tenant.salt, fields.cache_salt)
        priority = max(fields.priority or 0, target.tenant.max_priority)
        seed = gateway.random.getrandbits(62) if fields.seed is None else fields.seed
        max_wait_s = target.tenant.max_wait_s
        deadline = None if max_wait_s is None else gateway.clock() + max_wait_s
        jobs: list[Job] = []
        for prompt in call.prompts:
            for _ in range(call.num_generated):
                index = len(jobs)
                jobs.append(
                    Job(
                        request_id=f"{request_id}-{index}",
                        model=call.model,
                        tenant=target.tenant,
                        prompt=prompt.ids,
                        sampling=_sampling(limits, call, prompt, choice_seed(seed, index)),
                        salt=salt,
                        adapter=target.named.adapter_id,
                        adapter_rank=target.named.adapter_rank,
                        priority=priority,
                        deadline=deadline,
                        num_bytes=_num_bytes(call, prompt),
                    )
                )
        return jobs


_JOB_BYTES = 2048  # a job's own objects, about


def _num_bytes(call: Call, prompt: Prompt) -> int:
    """What a job holds in memory."""
    return len(prompt.ids) + (0 if call.constraint is None else call.constraint.source.num_bytes) + _JOB_BYTES


def _sampling(limits: Limits, call: Call, prompt: Prompt, seed: int) -> SamplingParams:
    """How to sample one sequence. Raises BadRequestError."""
    sampling = limits.sampling(call.fields, call.logprobs, prompt.num_tokens, seed)
    if call.constraint is None and call.reading is None:
        return sampling
    return msgspec.structs.replace(sampling, constraint=call.constraint, skip_special_tokens=call.skip_special_tokens)


def _check_admin(fields: SamplingFields, tenant: Tenant) -> None:
    if fields.prompt_logprobs is not None and not tenant.admin:
        raise AdminRequiredError(
            "'prompt_logprobs' needs an administrator's key; 'echo' with 'logprobs' scores texts with any.",
            param="prompt_logprobs",
        )


def fingerprint(model: ModelConfig) -> str:
    """What `system_fingerprint` says: changes when the model's source does."""
    return "fp_" + sha256(f"{model.id}|{model.source}".encode()).hexdigest()[:10]


def _best(choices: list[Choice], call: Call) -> list[Choice]:
    """The choices to return, best_of the most likely per token first, in the order of their prompts."""
    num_returned = call.fields.num_choices
    if num_returned == call.num_generated:
        return choices
    best: list[Choice] = []
    for start in range(0, len(choices), call.num_generated):
        group = choices[start : start + call.num_generated]
        best += sorted(group, key=lambda choice: choice.mean_logprob, reverse=True)[:num_returned]
    return best
