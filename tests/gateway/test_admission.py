"""The fair queue, its bounds and its tickets."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import count
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.schema import AdmissionConfig, ModelConfig
from gateway.admission import Admission
from gateway.errors import ApiError, DeadlineError, QueueFullError, UnavailableError
from gateway.fair_queue import FIRST_MEAN_OUTPUT, INPUT_WEIGHT, OUTPUT_WEIGHT, Charge, FairQueue
from gateway.line import NO_REPLICA_S
from gateway.slot import Surroundings
from gateway.ticket import Ticket
from gateway.types import Job, Tenant
from ops.metrics import Metrics
from replicas.contract import SamplingParams
from routing.types import RouteRequest

MODEL = ModelConfig(id="m", source="sim:bytes")
OTHER = ModelConfig(id="other", source="sim:bytes")
ROUTE = RouteRequest("r", "m", None, (), 64, 100, 64)
_ids = count()


def job(
    tenant: str = "a",
    num_tokens: int = 100,
    *,
    model: ModelConfig = MODEL,
    weight: float = 1.0,
    max_tokens: int = 64,
    **changes: object,
) -> Job:
    return Job(
        request_id=f"{tenant}{next(_ids)}",
        model=model,
        tenant=Tenant(tenant, b"", weight),
        prompt=bytes(4 * num_tokens),
        sampling=SamplingParams(max_tokens=max_tokens, seed=0),
        salt=b"",
        **changes,  # type: ignore[arg-type]
    )


@dataclass
class Places:
    """Places by model; what is placed takes one until it is given back."""

    free: dict[str, int] = field(default_factory=dict)
    ready: dict[str, int] = field(default_factory=dict)

    def num_free(self, model_id: str) -> int:
        return self.free.get(model_id, 0)

    def num_ready(self, model_id: str) -> int:
        return self.ready.get(model_id, 1)


class Desk:
    """An admission with a clock of its own."""

    def __init__(self, free: int = 0, **limits: object) -> None:
        self.now = 1000.0
        self.places = Places({"m": free, "other": free})
        self.metrics = Metrics()
        around = Surroundings(lambda: self.now, Random(1), self.metrics)
        self.admission = Admission(AdmissionConfig(**limits), self.places, around)  # type: ignore[arg-type]
        self.order: list[str] = []
        self.tasks: list[asyncio.Task[Ticket]] = []

    async def ask(self, asked: Job) -> asyncio.Task[Ticket]:
        """A task that waits for its ticket, and has begun to."""

        async def wait() -> Ticket:
            ticket = await self.admission.acquire(asked, ROUTE, asked.num_prompt_tokens)
            self.order.append(asked.tenant.tenant_id)
            return ticket

        task = asyncio.create_task(wait())
        self.tasks.append(task)
        await asyncio.sleep(0)
        self.admission.check()
        return task

    async def free_one(self, model_id: str = "m") -> None:
        """A place for one, which whoever gets it takes at once."""
        self.places.free[model_id] += 1
        self.admission.pump(model_id)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        for task in self.tasks:
            if task.done() and not task.cancelled() and task.exception() is None:
                task.result().placed()
        self.places.free[model_id] = 0
        self.admission.check()

    async def finish(self) -> None:
        for task in self.tasks:
            task.cancel()
        for outcome in await asyncio.gather(*self.tasks, return_exceptions=True):
            if isinstance(outcome, Ticket):
                outcome.close()
        self.admission.close()
        self.admission.check()
        assert self.admission.num_waiting == 0
        assert self.admission.num_unplaced == 0


async def test_a_free_place_is_given_at_once() -> None:
    desk = Desk(free=1)
    with await desk.admission.acquire(job(), ROUTE, 100) as ticket:
        assert ticket.waited_s == 0.0
        assert desk.admission.num_unplaced == 1
    await desk.finish()


async def test_a_job_waits_until_a_place_is_free_and_its_ticket_keeps_the_place() -> None:
    desk = Desk()
    first, second = await desk.ask(job()), await desk.ask(job())
    assert not first.done()
    desk.now += 2.0
    desk.places.free["m"] = 1
    desk.admission.pump("m")
    desk.admission.pump("m")  # the place is counted as taken although no replica has the job yet
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert first.done()
    assert not second.done()
    assert first.result().waited_s == 2.0
    first.result().close()  # never placed: the next one may have it
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert second.done()
    await desk.finish()


async def test_one_models_backlog_never_stands_before_another_model() -> None:
    desk = Desk()
    desk.places.free["other"] = 1
    stuck = await desk.ask(job())
    with await desk.admission.acquire(job(model=OTHER), ROUTE, 100):
        assert not stuck.done()
    await desk.finish()


async def test_a_full_queue_refuses_at_once_and_says_when_to_come_back() -> None:
    for limits in ({"max_queued": 2}, {"max_queued_tokens": 250}, {"max_queued_bytes": 250}):
        desk = Desk(**limits)
        for _ in range(2):
            await desk.ask(job(num_bytes=100))
        with pytest.raises(QueueFullError) as refused:
            await desk.admission.acquire(job(num_bytes=100), ROUTE, 100)
        assert refused.value.status == 429
        assert int(refused.value.headers()["retry-after"]) >= 1
        desk.admission.check()
        await desk.finish()


async def test_retry_after_is_the_backlog_over_the_rate_it_has_been_leaving_at() -> None:
    desk = Desk(max_queued=10)
    for _ in range(20):  # ten jobs, one a second
        await desk.ask(job())
        desk.now += 1.0
        await desk.free_one()
    for _ in range(10):
        await desk.ask(job())
    with pytest.raises(QueueFullError) as refused:
        await desk.admission.acquire(job(), ROUTE, 100)
    assert refused.value.retry_after_s == pytest.approx(10.0, rel=0.3)
    await desk.finish()


async def test_a_flood_of_one_tenant_does_not_keep_another_out() -> None:
    desk = Desk(max_queued=10)
    flood = [await desk.ask(job("flood")) for _ in range(10)]
    with pytest.raises(QueueFullError):
        await desk.admission.acquire(job("flood"), ROUTE, 100)
    others = [await desk.ask(job("quiet")) for _ in range(7)]
    await asyncio.sleep(0)
    assert [task.done() for task in flood] == [False] * 5 + [True] * 5, "the newest go, to an equal share"
    assert isinstance(flood[9].exception(), QueueFullError)
    assert [task.done() for task in others] == [False] * 5 + [True] * 2
    await desk.finish()


async def test_backlogged_tenants_alternate_whatever_the_order_of_arrival() -> None:
    desk = Desk()
    for tenant in "aaaaaabbb":
        await desk.ask(job(tenant))
    for _ in range(6):
        await desk.free_one()
    assert desk.order == ["a", "b", "a", "b", "a", "b"]
    await desk.finish()


async def test_a_tenant_with_twice_the_weight_gets_twice_as_much() -> None:
    desk = Desk()
    for _ in range(12):
        await desk.ask(job("a"))
        await desk.ask(job("b", weight=2.0))
    for _ in range(12):
        await desk.free_one()
    assert desk.order.count("b") == 8
    await desk.finish()


async def test_a_tenant_back_from_idleness_has_no_savings() -> None:
    desk = Desk()
    for _ in range(12):
        await desk.ask(job("a"))
    for _ in range(6):
        await desk.free_one()
    for _ in range(6):
        await desk.ask(job("b"))
    desk.order.clear()
    for _ in range(6):
        await desk.free_one()
    assert desk.order.count("b") == 3
    await desk.finish()


async def test_a_tenant_back_to_an_empty_queue_has_no_savings_either() -> None:
    desk = Desk()
    for _ in range(6):
        await desk.ask(job("a"))
        await desk.free_one()
    for tenant in "bbbbaaaa":
        await desk.ask(job(tenant))
    desk.order.clear()
    for _ in range(4):
        await desk.free_one()
    assert desk.order.count("b") == 2
    await desk.finish()


async def test_the_more_urgent_band_goes_first_and_tenants_share_within_it() -> None:
    desk = Desk()
    for tenant, priority in (("late", 5), ("late", 5), ("a", 0), ("a", 0), ("b", 0), ("urgent", -1)):
        await desk.ask(job(tenant, priority=priority))
    for _ in range(6):
        await desk.free_one()
    assert desk.order == ["urgent", "a", "b", "a", "late", "late"]
    await desk.finish()


async def test_a_tag_is_the_tenants_virtual_time_before_its_job() -> None:
    desk = Desk(free=10)
    first = await desk.admission.acquire(job(num_tokens=100), ROUTE, 40)
    second = await desk.admission.acquire(job(num_tokens=100), ROUTE, 40)
    assert (first.fair_tag, second.fair_tag) == (0.0, INPUT_WEIGHT * 40 + OUTPUT_WEIGHT * 64)
    first.served(10, 3)
    first.close()
    third = await desk.admission.acquire(job(num_tokens=100), ROUTE, 40)
    assert third.fair_tag == pytest.approx(second.fair_tag + 10 + OUTPUT_WEIGHT * 3)
    for ticket in (second, third):
        ticket.close()
    await desk.finish()


async def test_a_ticket_closed_without_service_costs_nothing() -> None:
    desk = Desk(free=1)
    for _ in range(3):
        with await desk.admission.acquire(job(), ROUTE, 100) as ticket:
            assert ticket.fair_tag == 0.0
    await desk.finish()


async def test_who_waits_too_long_is_told_so() -> None:
    desk = Desk(max_wait_s=30.0)
    patient = await desk.ask(job())
    hurried = await desk.ask(job(deadline=desk.now + 5.0))
    desk.now += 5.0
    desk.admission.expire()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert isinstance(hurried.exception(), DeadlineError)
    assert not patient.done()
    desk.now += 25.0
    desk.admission.expire()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    error = patient.exception()
    assert isinstance(error, QueueFullError)
    assert (error.status, error.code) == (429, "queue_timeout")
    assert error.retry_after_s is not None
    await desk.finish()


async def test_the_timer_ends_a_wait_by_itself() -> None:
    clock = asyncio.get_running_loop().time
    admission = Admission(AdmissionConfig(max_wait_s=0.05), Places({"m": 0}), Surroundings(clock, Random(1), Metrics()))
    began = clock()
    with pytest.raises(QueueFullError):
        await admission.acquire(job(), ROUTE, 100)
    with pytest.raises(DeadlineError):
        await admission.acquire(job(deadline=clock() + 0.01), ROUTE, 100)
    assert clock() - began < 10.0
    admission.check()
    assert admission.num_waiting == 0


async def test_without_any_replica_a_job_waits_a_short_while_and_no_longer() -> None:
    desk = Desk()
    desk.places.ready["m"] = 0
    first = await desk.ask(job())
    desk.now += NO_REPLICA_S - 1.0
    second = await desk.ask(job())
    desk.now += 1.0
    desk.admission.expire()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    error = first.exception()
    assert isinstance(error, UnavailableError)
    assert error.retry_after_s is not None
    assert not second.done()
    desk.places.ready["m"] = 1
    await desk.free_one()
    assert second.done()
    await desk.finish()


async def test_those_who_wait_when_the_last_replica_dies_wait_a_short_while_too() -> None:
    desk = Desk()
    waiting = await desk.ask(job())
    desk.now += 60.0
    desk.places.ready["m"] = 0
    desk.admission.pump("m")
    desk.now += NO_REPLICA_S - 0.1
    desk.admission.expire()
    await asyncio.sleep(0)
    assert not waiting.done()
    desk.now += 0.1
    desk.admission.expire()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert isinstance(waiting.exception(), UnavailableError)
    await desk.finish()


async def test_a_cancelled_wait_leaves_no_trace() -> None:
    desk = Desk()
    tasks = [await desk.ask(job(t)) for t in "aba"]
    tasks[0].cancel()
    await asyncio.gather(tasks[0], return_exceptions=True)
    desk.admission.check()
    assert desk.admission.num_waiting == 2
    await desk.free_one()
    await desk.free_one()
    assert tasks[1].done()
    assert tasks[2].done()
    await desk.finish()


async def test_a_ticket_given_in_the_moment_of_cancellation_is_not_lost() -> None:
    for cancel_first in (True, False):
        desk = Desk()
        doomed, heir = await desk.ask(job("a")), await desk.ask(job("b"))

        def grant(desk: Desk = desk) -> None:
            desk.places.free["m"] = 1
            desk.admission.pump("m")

        steps: list[Callable[[], object]] = [doomed.cancel, grant]
        for step in steps if cancel_first else reversed(steps):
            step()
        await asyncio.gather(doomed, return_exceptions=True)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert doomed.cancelled()
        assert heir.done(), f"{cancel_first=}"
        await desk.finish()


actions = st.lists(
    st.one_of(
        st.tuples(st.just("ask"), st.sampled_from("abc"), st.integers(1, 300)),
        st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("free"), st.integers(0, 3), st.just(0)),
        st.tuples(st.just("place"), st.integers(0, 30), st.just(0)),
        st.tuples(st.just("close"), st.integers(0, 30), st.integers(0, 50)),
        st.tuples(st.just("wait"), st.integers(1, 9), st.just(0)),
        st.tuples(st.just("tick"), st.integers(0, 2), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=150, deadline=None)
@given(actions)
def test_no_credit_leaks_whatever_is_cancelled_and_when(history: list[tuple[str, object, int]]) -> None:
    async def play() -> None:
        desk = Desk(max_queued=8, max_queued_tokens=1000, max_wait_s=20.0)
        for action, what, amount in history:
            tickets = [t.result() for t in desk.tasks if t.done() and not t.cancelled() and t.exception() is None]
            if action == "ask":
                desk.tasks.append(asyncio.create_task(desk.admission.acquire(job(str(what), amount), ROUTE, amount)))
            elif action == "cancel" and desk.tasks:
                desk.tasks[int(str(what)) % len(desk.tasks)].cancel()
            elif action == "free":
                desk.places.free["m"] = int(str(what))
                desk.admission.pump("m")
            elif action == "place" and tickets:
                tickets[int(str(what)) % len(tickets)].placed()
            elif action == "close" and tickets:
                chosen = tickets[int(str(what)) % len(tickets)]
                chosen.served(amount, amount)
                chosen.close()
            elif action == "wait":
                desk.now += float(str(what))
                desk.admission.expire()
            elif action == "tick":
                for _ in range(int(str(what))):
                    await asyncio.sleep(0)
            desk.admission.check()
        await desk.finish()

    asyncio.run(play())


@dataclass(frozen=True, eq=False)
class Waiting:
    job: Job
    num_uncached: int


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    num_slots=st.integers(1, 8),
    max_input=st.integers(1, 500),
    max_output=st.integers(1, 64),
    greedy=st.booleans(),
)
def test_two_backlogged_tenants_stay_within_the_vtc_bound(
    seed: int, num_slots: int, max_input: int, max_output: int, greedy: bool
) -> None:
    """Served tokens differ by at most 2 · max(w_p · L_in, w_q · M), M = output tokens the running batch can hold."""
    random = Random(seed)
    queue: FairQueue[Waiting] = FairQueue()
    served = {"a": 0.0, "b": 0.0}
    running: list[tuple[Waiting, Charge, int, int]] = []
    bound = 2 * max(INPUT_WEIGHT * max_input, OUTPUT_WEIGHT * num_slots * max_output)

    def push(tenant: str) -> None:
        num_input = max_input if greedy and tenant == "a" else random.randint(1, max_input)
        queue.push(Waiting(job(tenant, num_input, max_tokens=max_output), num_input))

    for tenant in "abab":
        push(tenant)
    for _ in range(300):
        while len(running) < num_slots:
            waiting, charge = queue.pop()
            tenant = waiting.job.tenant.tenant_id
            push(tenant)
            served[tenant] += INPUT_WEIGHT * waiting.num_uncached
            num_output = max_output if greedy and tenant == "a" else random.randint(1, max_output)
            running.append((waiting, charge, 0, num_output))
            assert abs(served["a"] - served["b"]) <= bound
        still = []
        for waiting, charge, num_done, num_output in running:
            served[waiting.job.tenant.tenant_id] += OUTPUT_WEIGHT
            if num_done + 1 == num_output:
                queue.settle(charge, waiting.num_uncached, num_output)
            else:
                still.append((waiting, charge, num_done + 1, num_output))
        running = still
        assert abs(served["a"] - served["b"]) <= bound
        queue.check()


def test_an_estimate_never_exceeds_what_the_job_may_produce() -> None:
    queue: FairQueue[Waiting] = FairQueue()
    assert queue.cost(Waiting(job(num_tokens=10), 10)) == INPUT_WEIGHT * 10 + OUTPUT_WEIGHT * min(FIRST_MEAN_OUTPUT, 64)


async def test_closing_refuses_everyone_who_waits() -> None:
    desk = Desk()
    tasks = [await desk.ask(job()) for _ in range(3)]
    desk.admission.close()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(o, ApiError) and o.status == 503 for o in outcomes)
    await desk.finish()


async def test_the_queues_depth_is_a_metric() -> None:
    desk = Desk()
    await desk.ask(job(num_tokens=30))
    text = desk.metrics.exposition().decode()
    assert 'warmgate_queue_depth{model="m"} 1.0' in text
    assert 'warmgate_queue_tokens{model="m"} 30.0' in text
    await desk.finish()
