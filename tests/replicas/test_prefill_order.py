"""Shortest prefill first: what it wins, that nobody starves for it, and that it takes nothing from other tenants."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import pytest

from replicas.engine.block_pool import BlockPool
from replicas.engine.core import EngineCore
from replicas.engine.order import OrderName, Pace, not_before, shortest
from replicas.engine.scheduler import Scheduler, SchedulerConfig
from replicas.engine.sequence import Plan, Sampled, StepResult
from routing.ageing import PromptScale
from routing.waiting import LONG_SHARE, STRETCH
from tests.replicas.engine_kit import Kit, VirtualClock, make_kit, make_request

RATE = 1000.0


def prompt(length: int, first: int = 0) -> list[int]:
    return [(first + i) % 250 for i in range(length)]


def ends(kit: Kit) -> list[str]:
    """Runs to the end; the requests in the order of their first tokens."""
    order: list[str] = []
    while kit.core.has_work:
        order += [delta.request_id for delta in kit.step() if delta.num_cached_tokens is not None]
    return order


def test_a_short_prompt_goes_ahead_of_a_long_one_between_its_chunks_and_frees_none_of_its_blocks() -> None:
    kit = make_kit(num_blocks=128, max_num_batched_tokens=16, step_base_s=0.01)
    kit.add(make_request("long", prompt(200), max_tokens=1))
    for _ in range(3):
        kit.step()
    kit.add(make_request("short", prompt(20, 99), max_tokens=1))
    kit.step()
    kit.step()
    assert kit.ended("short") and not kit.ended("long")
    starts = [item.start for plan in kit.runner.plans for item in plan.items if item.seq.request_id == "long"]
    kit.run()
    assert starts == sorted(starts), "it never began anew"
    assert kit.core.stats().num_preemptions == 0 and kit.deltas["long"][0].num_cached_tokens == 0


def test_among_those_that_wait_the_one_with_the_least_to_compute_goes_first() -> None:
    kit = make_kit(num_blocks=256, max_num_seqs=1)
    kit.add(make_request("warmer", prompt(100), max_tokens=1))
    kit.run()
    for name, tokens in (("cold", prompt(60, 7)), ("small", prompt(30, 50)), ("cached", [*prompt(100), 1, 2, 3])):
        kit.add(make_request(name, tokens, max_tokens=1))
    assert ends(kit) == ["cached", "small", "cold"]


def test_a_prompt_whose_prefix_somebody_computes_meanwhile_moves_ahead() -> None:
    kit = make_kit(num_blocks=256, max_num_seqs=1, step_base_s=0.001)
    kit.add(make_request("first", prompt(120), max_tokens=1))
    kit.step()
    kit.add(make_request("follower", [*prompt(120), 5], max_tokens=1))
    kit.add(make_request("other", prompt(80, 40), max_tokens=1))
    waiting = {n: kit.core.scheduler._open[n].order_key for n in ("follower", "other")}
    assert waiting["other"] < waiting["follower"]
    assert ends(kit) == ["first", "follower", "other"]


def test_a_prompt_whose_prefix_was_evicted_meanwhile_falls_back() -> None:
    kit = make_kit(num_blocks=256, max_num_seqs=1, prefill_tokens_per_s=500.0)
    kit.add(make_request("warmer", prompt(100), max_tokens=1))
    kit.run()
    kit.add(make_request("busy", prompt(16, 90), max_tokens=8))
    kit.step()
    kit.add(make_request("was cached", [*prompt(100), 1], max_tokens=1))
    kit.add(make_request("small", prompt(8, 50), max_tokens=1))
    assert kit.core.stats().waiting_sizes == ((1, 1), (0, 0), (0, 0), (1, 8))
    kit.core.scheduler.pool.clear()
    assert ends(kit) == ["small", "was cached"]


def test_a_deadline_takes_the_handicap_away_but_only_where_it_can_be_met() -> None:
    pace = Pace(RATE, 100_000.0)

    def due(deadline_s: float | None) -> float:
        return shortest(make_request("r", [1], deadline_s=deadline_s), 5.0, 1000, pace)

    assert due(None) == pytest.approx(5 + STRETCH)
    assert due(100.0) == due(None)
    assert due(3.0) == pytest.approx(5 + 2), "it takes one second and must begin two after its arrival"
    assert due(0.5) == due(None), "too late in any case"


def test_prompts_beyond_a_share_of_the_scale_are_first_come_first_served() -> None:
    pace = Pace(RATE, 3000.0)
    request = make_request("r", [1])
    longest = 10 + STRETCH * LONG_SHARE * 3000 / RATE
    for num_uncached in (round(LONG_SHARE * 3000), 60_000):
        assert shortest(request, 10.0, num_uncached, pace) == pytest.approx(longest)
    assert shortest(request, 10.0, 500, pace) < longest


def test_the_scale_is_the_prompt_in_which_a_random_token_finds_itself() -> None:
    scale = PromptScale()
    assert scale.tokens == 0.0
    for _ in range(500):
        scale.observe(100)
    assert scale.tokens == pytest.approx(100)
    for i in range(2000):
        scale.observe(900 if i % 10 == 0 else 100)
    assert scale.tokens == pytest.approx((0.1 * 900**2 + 0.9 * 100**2) / 180, rel=0.1)


def test_a_tenant_that_would_leave_another_behind_does_not_overtake_it() -> None:
    others = [(100.0, 7.0), (300.0, 9.0)]
    assert not_before(100.0, others) == float("-inf")
    assert not_before(200.0, others) == 7.0
    assert not_before(301.0, others) == 9.0


def test_whatever_the_tags_nobody_waits_for_who_came_later() -> None:
    """Tags of another ingress need not compare: here one tenant's are beyond all reason."""
    kit = make_kit(num_blocks=256, max_num_seqs=1, step_base_s=0.001, prefill_tokens_per_s=100.0)
    kit.add(make_request("u0", prompt(64), tenant="u", fair_tag=5.0, max_tokens=1))
    kit.step()
    kit.add(make_request("u1", prompt(64, 70), tenant="u", fair_tag=6.0, max_tokens=1))
    kit.add(make_request("v0", prompt(32, 140), tenant="v", fair_tag=1e12, max_tokens=1))
    kit.clock.sleep(10.0)
    kit.add(make_request("u2", prompt(4, 9), tenant="u", fair_tag=7.0, max_tokens=1))
    assert ends(kit) == ["u0", "u1", "v0", "u2"]


# Nobody starves: the real scheduler in virtual time


class Clockwork:
    """A model that takes its time and says nothing."""

    def __init__(self, clock: VirtualClock) -> None:
        self._clock = clock

    def execute(self, plan: Plan) -> StepResult:
        self._clock.sleep(plan.num_tokens / RATE)
        return StepResult(tuple((Sampled(97),) for item in plan.items if item.samples))


@dataclass(frozen=True)
class Waited:
    num_tokens: int
    ttft_s: float


def replay(order: OrderName, arrivals: Iterable[tuple[float, int]]) -> list[Waited]:
    """Prompts without anything in common, one token each, through one engine."""
    clock = VirtualClock(0.0)
    config = SchedulerConfig(
        max_model_len=65_536, max_num_seqs=512, max_num_batched_tokens=128, max_waiting=10_000, order=order
    )
    core = EngineCore(Scheduler(config, BlockPool(20_000, 16), clock), Clockwork(clock), clock)
    coming = list(arrivals)
    coming.reverse()
    sent: dict[str, tuple[float, int]] = {}
    done: list[Waited] = []
    while coming or core.has_work:
        if not core.has_work:
            clock.now = max(clock.now, coming[-1][0])
        while coming and coming[-1][0] <= clock.now:
            at, size = coming.pop()
            name = f"r{len(sent)}"
            sent[name] = (at, size)
            salt = len(sent).to_bytes(4, "big")
            core.add(make_request(name, [1] * size, max_tokens=1, salt=salt))
        for delta in core.step():
            at, size = sent[delta.request_id]
            done.append(Waited(size, clock.now - at))
    return done


def poisson(draw: Callable[[], int], utilisation: float, rng: random.Random, num: int) -> list[tuple[float, int]]:
    sizes = [draw() for _ in range(num)]
    mean_s = sum(sizes) / num / RATE
    at = 0.0
    arrivals = []
    for size in sizes:
        at += rng.expovariate(utilisation / mean_s)
        arrivals.append((at, size))
    return arrivals


def p99_of_longest_decile(done: list[Waited]) -> float:
    longest = sorted(done, key=lambda waited: waited.num_tokens)[-len(done) // 10 :]
    return sorted(waited.ttft_s for waited in longest)[int(0.99 * len(longest))]


def attained(done: list[Waited], at_least_s: float) -> float:
    """The share whose first token came within that time, or twice its own prefill."""
    return sum(w.ttft_s <= max(at_least_s, 2 * w.num_tokens / RATE) for w in done) / len(done)


@pytest.mark.parametrize(
    ("kind", "utilisation"), [("exponential", 0.8), ("few long ones", 0.7), ("log-normal", 0.6), ("log-normal", 0.8)]
)
def test_long_prompts_do_not_starve_and_far_more_come_in_time(kind: str, utilisation: float) -> None:
    """p99 TTFT of the longest decile at most 1.1 times that of first come, first served, at the same load."""
    rng = random.Random(11)
    draw: Callable[[], int] = {
        "exponential": lambda: 1 + int(rng.expovariate(1 / 300)),
        "few long ones": lambda: 2000 if rng.random() < 0.1 else 60,
        "log-normal": lambda: 1 + int(rng.lognormvariate(5.3, 0.9)),
    }[kind]
    arrivals = poisson(draw, utilisation, rng, 3000)
    first_come, by_size = replay("fcfs", arrivals), replay("shortest", arrivals)
    assert p99_of_longest_decile(by_size) <= 1.1 * p99_of_longest_decile(first_come)
    mean_s = sum(w.num_tokens for w in first_come) / len(first_come) / RATE
    missed = [1 - attained(done, mean_s) for done in (first_come, by_size)]
    assert missed[1] <= 0.85 * missed[0], f"{missed=}"
    assert sum(w.ttft_s for w in by_size) < sum(w.ttft_s for w in first_come)


def test_endless_short_prompts_do_not_hold_up_a_long_one_beyond_its_handicap() -> None:
    """The engine is offered more than it can do: the long prompt still begins within its bound."""
    short_ones = [(0.01 * i, 20) for i in range(2000)]  # 2,000 tokens a second
    done = replay("shortest", sorted([*short_ones, (2.0, 2000)]))
    (long_one,) = [waited for waited in done if waited.num_tokens == 2000]
    # What it finds waiting at its arrival takes 2 s; what may overtake it arrives within its handicap.
    handicap_s = STRETCH * 2000 / RATE
    assert long_one.ttft_s <= 2.0 + 2 * handicap_s + 2.0 + 0.5
