"""What a replica asks for, and whose turn it is."""

from __future__ import annotations

import asyncio
from itertools import count

import pytest

from replicas.channel.news import News
from replicas.contract import EngineFacts, EngineStats
from replicas.credits import ACTIVE_S, ENDS_WINDOW_S, EndRate, Turns, with_credit
from tests.replicas.scripted import until

FACTS = EngineFacts(
    engine="sim", model="m", vocab_size=8, max_model_len=4096, block_size=16, num_blocks=100, max_num_seqs=8,
    max_num_batched_tokens=512,
)  # fmt: skip
NOTHING = (0.0, 0.0)


def test_it_wants_a_step_and_what_it_computes_in_a_round_trip() -> None:
    stats = with_credit(EngineStats(prefill_tokens_per_s=1000.0), FACTS, (0.02, 0.0))
    assert stats.wanted_tokens == 512 + 20


def test_places_are_those_left_one_more_and_what_ends_in_a_round_trip() -> None:
    assert with_credit(EngineStats(num_running=5), FACTS, NOTHING).num_places == 4
    assert with_credit(EngineStats(num_running=5, num_waiting=2, num_unseen=2), FACTS, NOTHING).num_places == 2
    assert with_credit(EngineStats(num_running=8), FACTS, (0.02, 2.4)).num_places == 4


def test_requests_that_wait_though_a_step_could_hold_them_leave_no_places() -> None:
    waiting = EngineStats(num_running=2, num_waiting=1, num_waiting_tokens=100)
    assert with_credit(waiting, FACTS, NOTHING).num_places == 0, "they wait for memory"
    long_one = EngineStats(num_running=2, num_waiting=1, num_waiting_tokens=5000)
    assert with_credit(long_one, FACTS, NOTHING).num_places == 6, "it waits for its turn in the step"


def test_requests_that_wait_for_their_adapters_take_places_too() -> None:
    stats = EngineStats(num_running=2, num_waiting=6, num_waiting_adapter=6)
    assert with_credit(stats, FACTS, NOTHING).num_places == 1
    many = EngineStats(num_waiting=100, num_waiting_adapter=100)
    assert with_credit(many, FACTS, NOTHING).num_places == 1


def test_an_engine_that_says_what_it_wants_is_believed() -> None:
    stats = EngineStats(wanted_tokens=7, num_places=3)
    assert with_credit(stats, FACTS, NOTHING) is stats


def test_the_rate_of_ends_is_theirs_and_fades() -> None:
    now = 0.0
    rate = EndRate(lambda: now)
    for _ in range(600):
        now += 0.1
        rate.ended()
    assert rate.per_s == pytest.approx(10.0, rel=0.05)
    now += 10 * ENDS_WINDOW_S
    assert rate.per_s < 0.01


def test_who_sent_something_longest_ago_goes_first() -> None:
    turns: Turns[str] = Turns()
    for name in "abc":
        turns.join(name)
        turns.join(name)
    for now, name in enumerate("abc"):
        turns.sent(name, now * 0.1)
    assert [turns.of(name, 0.3) for name in "abc"] == [0, 1, 2]
    turns.sent("a", 0.4)
    assert [turns.of(name, 0.4) for name in "abc"] == [2, 0, 1]
    turns.leave("b")
    turns.leave("b")
    assert [turns.of(name, 0.4) for name in "ac"] == [1, 0]
    assert turns.of("stranger", 0.4) == 0


def test_nobody_waits_for_the_turn_of_one_that_sends_nothing() -> None:
    turns: Turns[str] = Turns()
    for name in ("idle", "quiet", "busy"):
        turns.join(name)
    turns.sent("quiet", 0.0)
    turns.sent("busy", 0.5)
    assert turns.of("busy", 0.6) == 1
    assert turns.of("busy", ACTIVE_S + 0.1) == 0


async def test_news_is_told_once_soon_and_again_while_there_is_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("replicas.channel.news.OFTEN_S", 1.5)
    told = count()
    num = 0

    def tell() -> bool:
        nonlocal num
        num = next(told) + 1
        return num < 3

    news = News(tell)
    news.within(0.005)
    news.within(0.5)
    news.within(0.001)
    await until(lambda: num)
    await asyncio.sleep(0.02)
    assert num == 1, "all three are one"
    monkeypatch.setattr("replicas.channel.news.OFTEN_S", 0.02)
    await until(lambda: num == 3)
    await asyncio.sleep(0.1)
    assert num == 3, "and then there is nothing more to tell"
    news.within(0.001)
    news.close()
    news.within(0.001)
    news.close()
    await asyncio.sleep(0.02)
    assert num == 3
