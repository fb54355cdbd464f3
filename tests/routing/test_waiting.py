"""Who waits before whom, as the cost reads it off a histogram of pending prompts."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from heapq import heappop, heappush
from itertools import pairwise

import pytest

from replicas.engine.order import Pace, shortest
from routing.ageing import PromptScale
from routing.waiting import LONG_SHARE, STRETCH, Pending, Sizes, bucket_of, merged, pending_of

RATE = 1000.0


def pending(*prompts: int) -> Pending:
    return pending_of(merged((), prompts))


def test_a_prompt_is_counted_in_the_bucket_of_its_power_of_two() -> None:
    assert [bucket_of(n) for n in (1, 2, 3, 4, 7, 8, 4096)] == [0, 1, 1, 2, 2, 3, 12]
    assert merged(((1, 1),), [5, 6, 1]) == ((2, 2), (0, 0), (2, 11))
    assert merged(((1, 1),), []) == ((1, 1),)


@pytest.mark.parametrize(
    ("sizes", "own", "before", "behind"),
    [
        ((), 100, 0, 0),
        # Far shorter than the only one pending, which cannot have waited long: it is overtaken.
        ((9000,), 100, 0, 1),
        # Not shorter than anybody.
        ((100, 200, 300), 9000, 600, 0),
        # Longer ones are alike from a share of the scale on: first come, first served.
        ((8000, 8000), 6000, 16000, 0),
        # Shorter ones go first, the long one waits.
        ((100, 100, 9000), 500, 200, 1),
    ],
)
def test_shorter_ones_and_those_alike_go_before(sizes: tuple[int, ...], own: int, before: float, behind: float) -> None:
    assert pending(*sizes).ahead_and_behind(own) == pytest.approx((before, behind))


def test_in_a_long_queue_the_older_of_the_longer_prompts_go_first() -> None:
    too_young = STRETCH * (LONG_SHARE * 2000 - 500) / 40000
    expected = 40000 * (1 - too_young), 20 * too_young
    assert pending(*[2000] * 20).ahead_and_behind(500) == pytest.approx(expected)


def one_by_one(sizes: Sizes, own: float) -> tuple[float, float]:
    """The rule of `Pending.ahead_and_behind`, bucket by bucket."""
    buckets = [(number, tokens) for number, tokens in sizes if number]
    total = sum(tokens for _, tokens in buckets)
    if not total:
        return 0.0, 0.0
    alike = LONG_SHARE * sum(tokens * tokens / number for number, tokens in buckets) / total
    ahead = behind = 0.0
    for number, tokens in buckets:
        longer_by = min(tokens / number, alike) - min(own, alike)
        too_young = min(1.0, max(0.0, longer_by * STRETCH / total))
        ahead += tokens * (1 - too_young)
        behind += number * too_young
    return ahead, behind


def test_two_bisections_find_what_a_look_at_every_bucket_finds() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        sizes = [int(2 ** rng.uniform(0, rng.uniform(1, 17))) for _ in range(rng.randrange(60))]
        own = int(2 ** rng.uniform(0, 17))
        found = pending(*sizes).ahead_and_behind(own)
        assert found == pytest.approx(one_by_one(merged((), sizes), own), rel=1e-9, abs=1e-6)


def test_more_pending_work_never_means_less_before_one_and_a_longer_prompt_never_less() -> None:
    rng = random.Random(2)
    for _ in range(300):
        sizes = [rng.randrange(1, 20000) for _ in range(rng.randrange(1, 30))]
        own = sorted(rng.randrange(1, 20000) for _ in range(5))
        before, behind = zip(*map(pending(*sizes).ahead_and_behind, own), strict=True)
        for less, more in pairwise(before):
            assert less <= more + 1e-6
        for more, less in pairwise(behind):
            assert less <= more + 1e-6
        assert before[0] >= -1e-6 and before[-1] <= sum(sizes) + 1e-6
        assert behind[-1] >= -1e-6 and behind[0] <= len(sizes) + 1e-6


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
                before = sum(left for other, _, (left,) in queue if other <= due)
                behind = sum(other > due for other, _, _ in queue)
                ahead, waiting = pending(*(left for _, _, (left,) in queue)).ahead_and_behind(size)
                found.append((before, ahead, behind, waiting))
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
