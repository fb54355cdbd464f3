"""Who waits before whom, as the cost reads it off a histogram of pending prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from heapq import heappop, heappush

import pytest

from replicas.engine.order import Pace, shortest
from replicas.engine.rates import PromptScale
from routing.waiting import LONG_SHARE, STRETCH, Sizes, bucket_of, merged, num_behind, tokens_before

RATE = 1000.0


def sizes_of(*prompts: int) -> Sizes:
    return merged((), prompts)


def test_a_prompt_is_counted_in_the_bucket_of_its_power_of_two() -> None:
    assert [bucket_of(n) for n in (1, 2, 3, 4, 7, 8, 4096)] == [0, 1, 1, 2, 2, 3, 12]
    assert merged(((1, 1),), [5, 6, 1]) == ((2, 2), (0, 0), (2, 11))
    assert merged(((1, 1),), []) == ((1, 1),)


@pytest.mark.parametrize(
    ("pending", "own", "order", "before", "behind"),
    [
        ((), 100, "shortest", 0, 0),
        ((), 100, "fcfs", 0, 0),
        ((100, 900, 9000), 500, "fcfs", 10000, 0),
        ((100, 900, 9000), 500, "deadline", 10000, 0),
        ((100, 900, 9000), 500, "an order of vLLM's", 10000, 0),
        # Far shorter than the only one pending, which cannot have waited long: it is overtaken.
        ((9000,), 100, "shortest", 0, 1),
        # Not shorter than anybody.
        ((100, 200, 300), 9000, "shortest", 600, 0),
        # Longer ones are alike from a share of the scale on: first come, first served.
        ((8000, 8000), 6000, "shortest", 16000, 0),
        # Shorter ones go first, the long one waits.
        ((100, 100, 9000), 500, "shortest", 200, 1),
    ],
)
def test_the_order_says_who_goes_before(
    pending: tuple[int, ...], own: int, order: str, before: float, behind: float
) -> None:
    assert tokens_before(sizes_of(*pending), own, order) == pytest.approx(before)
    assert num_behind(sizes_of(*pending), own, order) == pytest.approx(behind)


def test_in_a_long_queue_the_older_of_the_longer_prompts_go_first() -> None:
    pending = sizes_of(*[2000] * 20)
    too_young = STRETCH * (LONG_SHARE * 2000 - 500) / 40000
    assert tokens_before(pending, 500, "shortest") == pytest.approx(40000 * (1 - too_young))
    assert num_behind(pending, 500, "shortest") == pytest.approx(20 * too_young)


def test_more_pending_work_never_means_less_before_one_and_a_longer_prompt_never_less() -> None:
    rng = random.Random(2)
    for _ in range(300):
        pending = sizes_of(*(rng.randrange(1, 20000) for _ in range(rng.randrange(1, 30))))
        own = sorted(rng.randrange(1, 20000) for _ in range(5))
        before = [tokens_before(pending, n, "shortest") for n in own]
        behind = [num_behind(pending, n, "shortest") for n in own]
        assert before == sorted(before) and behind == sorted(behind, reverse=True)
        assert before[0] >= 0 and before[-1] <= sum(t for _, t in pending) + 1e-6
        assert behind[0] <= sum(n for n, _ in pending) + 1e-6


class Queued:
    priority = 0
    deadline_s = None


def replay(sizes: Iterable[int], utilisation: float, rng: random.Random) -> list[tuple[float, float, float, float]]:
    """One prefill server under the real order: at each arrival (tokens before, estimated; number behind, estimated)."""
    sizes = list(sizes)
    mean_s = sum(sizes) / len(sizes) / RATE
    arrivals: list[tuple[float, int]] = []
    at = 0.0
    for size in sizes:
        at += rng.expovariate(utilisation / mean_s)
        arrivals.append((at, size))
    scale = PromptScale()
    queue: list[tuple[float, int, list[int]]] = []
    found: list[tuple[float, float, float, float]] = []
    now, i = 0.0, 0
    while i < len(arrivals) or queue:
        now = now if queue else max(now, arrivals[i][0])
        while i < len(arrivals) and arrivals[i][0] <= now:
            at, size = arrivals[i]
            scale.observe(size)
            due = shortest(Queued(), at, size, Pace(RATE, scale.tokens))
            if queue:
                pending = sizes_of(*(left for _, _, (left,) in queue))
                before = sum(left for other, _, (left,) in queue if other <= due)
                behind = sum(other > due for other, _, _ in queue)
                found.append((before, tokens_before(pending, size, "shortest"),
                              behind, num_behind(pending, size, "shortest")))  # fmt: skip
            heappush(queue, (due, i, [size]))
            i += 1
        key, number, left = heappop(queue)
        chunk = min(64, left[0])
        now += chunk / RATE
        if left[0] > chunk:
            heappush(queue, (key, number, [left[0] - chunk]))
    return found


@pytest.mark.parametrize("utilisation", [0.6, 0.9])
@pytest.mark.parametrize("kind", ["exponential", "few long ones"])
def test_the_estimate_is_right_on_average_about_the_real_order(kind: str, utilisation: float) -> None:
    rng = random.Random(7)
    drawn: Callable[[], int] = {
        "exponential": lambda: 1 + int(rng.expovariate(1 / 400)),
        "few long ones": lambda: 2000 if rng.random() < 0.1 else 60,
    }[kind]
    found = replay([drawn() for _ in range(3000)], utilisation, rng)
    before, estimated, behind, estimated_behind = (sum(column) / len(found) for column in zip(*found, strict=True))
    assert estimated == pytest.approx(before, rel=0.2)
    assert estimated_behind == pytest.approx(behind, rel=0.3)
