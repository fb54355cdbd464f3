"""A timer that may be set to an earlier time."""

from __future__ import annotations

import asyncio
from math import inf

from gateway.alarm import MIN_DELAY_S, Alarm


async def test_it_rings_once_at_the_earliest_time_it_was_set_to() -> None:
    clock = asyncio.get_running_loop().time
    rang: list[float] = []
    alarm = Alarm(lambda: rang.append(clock()), clock)
    began = clock()
    for delay in (0.5, 0.02, 0.3, inf):
        alarm.set(began + delay)
    await asyncio.sleep(0.1)
    assert len(rang) == 1 and rang[0] - began >= 0.02


async def test_a_time_that_is_over_rings_soon_and_never_inside_the_call() -> None:
    rang: list[int] = []
    alarm = Alarm(lambda: rang.append(1), asyncio.get_running_loop().time)
    alarm.set(0.0)
    assert not rang
    await asyncio.sleep(10 * MIN_DELAY_S)
    assert rang == [1]


async def test_stopped_it_does_not_ring_and_can_be_set_again() -> None:
    clock = asyncio.get_running_loop().time
    rang: list[int] = []
    alarm = Alarm(lambda: rang.append(1), clock)
    alarm.set(clock() + 0.01)
    alarm.stop()
    alarm.stop()
    await asyncio.sleep(0.03)
    assert not rang
    alarm.set(clock() + 0.01)
    await asyncio.sleep(0.05)
    assert rang == [1]
