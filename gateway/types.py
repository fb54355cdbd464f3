"""What travels inside the gateway, between its rooms: the tenant, one job for the dispatcher, the dispatcher itself."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from random import Random, SystemRandom
from time import monotonic, time
from typing import TYPE_CHECKING, Protocol

from configs.schema import Config, ModelConfig
from gateway.decisions import DecisionLog
from gateway.explain import Explainer
from replicas.contract import Constraint, EngineFacts, SamplingParams, StepDelta
from routing.adapters import EMPTY, Catalogue

if TYPE_CHECKING:
    from gateway.adapter_admin import AdapterAdmin
    from gateway.ledger import Ledger
    from gateway.prompt import Prompter
    from gateway.tenancy import Tenants
    from ops.metrics import Metrics


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks. `salt` separates prefix caches: HMAC(cluster secret, tenant id)."""

    tenant_id: str
    salt: bytes
    weight: float = 1.0
    max_priority: int = 0
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent: int | None = None
    max_wait_s: float | None = None
    models: frozenset[str] = frozenset()
    admin: bool = False

    def allows(self, model_id: str) -> bool:
        """Whether this tenant may use the model; an empty set means every model."""
        return not self.models or model_id in self.models


@dataclass(frozen=True, slots=True)
class Job:
    """One sequence to generate, fully validated: what admission queues, routing places, a replica runs.

    `priority`: lower is sooner. `deadline`: event-loop time by which the first token must have come. `salt`: the
    tenant's, narrowed by the client's `cache_salt`. `adapter`: `name@version`. `num_bytes`: what it holds in memory
    while queued.
    """

    request_id: str
    model: ModelConfig
    tenant: Tenant
    prompt: bytes
    sampling: SamplingParams
    salt: bytes
    adapter: str | None = None
    adapter_rank: int = 8
    priority: int = 0
    deadline: float | None = None
    num_bytes: int = 0

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.prompt) // 4


class Deltas(Protocol):
    """The deltas of one job, the terminal one last: the first is awaited, of the others `listen`'s callback tells.

    Errors are ApiErrors: before the first delta nothing was delivered and no replica still works on it; after it the
    answer broke off, which is told after the deltas that came before. `aclose` cancels the job and is idempotent.
    `replica_id` is where it runs, None before the first delta.
    """

    @property
    def replica_id(self) -> str | None: ...

    async def first(self) -> StepDelta:
        """Starts the job. To be called once, before anything else."""
        ...

    def ready(self) -> list[StepDelta]:
        """Those that have come since, without waiting for more; [] when there are none."""
        ...

    @property
    def over(self) -> bool:
        """Nothing more will come than the next `ready` gives or raises."""
        ...

    def listen(self, callback: Callable[[], None] | None) -> None:
        """Calls back on the event loop whenever `ready` may have something; in place of an earlier callback."""
        ...

    async def aclose(self) -> None: ...


class Dispatcher(Protocol):
    """Queue, route, send, retry. Implemented by `gateway.dispatch`."""

    def generate(self, job: Job) -> Deltas:
        """Nothing starts before its `first`."""
        ...

    def facts(self, model_id: str) -> EngineFacts | None:
        """What the replicas of a model can do (the least able of them); None while none has ever been seen."""
        ...

    def num_ready(self, model_id: str) -> int:
        """Replicas of a model that can take requests now."""
        ...


@dataclass(frozen=True, slots=True)
class Gateway:
    """What the HTTP face is made of. Built once by the composition root, passed to `gateway.app.build_app`.

    `prompters` by model id. `catalogue`: the adapters there are now. `clock` is monotonic seconds (durations, quotas),
    `wall` the time of day. `random` draws seeds and request ids; `ingress_id` is the prefix of every request id, so
    that an id names its ingress. `explainer` knows why requests went where they went. `check_grammar` raises an
    ApiError for a constraint that no replica could use; without it they say so themselves.
    """

    config: Config
    dispatcher: Dispatcher
    prompters: Mapping[str, Prompter]
    tenants: Tenants
    ledger: Ledger
    metrics: Metrics
    ingress_id: str = "wg"
    clock: Callable[[], float] = monotonic
    wall: Callable[[], float] = time
    random: Random = field(default_factory=SystemRandom)
    started_at: float = field(default_factory=time)
    catalogue: Callable[[], Catalogue] = lambda: EMPTY
    explainer: Explainer = field(default_factory=lambda: Explainer(DecisionLog("wg", time), _nobody))
    adapters: AdapterAdmin | None = None
    check_grammar: Callable[[Constraint, str], Awaitable[None]] = lambda constraint, tenant_id: _trust()


async def _nobody(ingress_id: str | None, question: bytes) -> bytes | None:
    """Whom an ingress asks that has no siblings."""
    return None


async def _trust() -> None:
    """A grammar that nobody looks at before the replica does."""
