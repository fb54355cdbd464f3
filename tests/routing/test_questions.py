"""One ingress asks another through a real Valkey, whatever lies there."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from random import Random

import msgspec
import pytest

from routing.questions import MAX_QUESTIONS, QuestionOptions, Questions
from routing.store import Store, StoreError, StoreOptions
from tests.routing.conftest import Valkey

FAST = QuestionOptions(poll_s=0.02, look_s=0.01, patience_s=1.0)


def echo(text: bytes) -> bytes | None:
    if text == b"nonsense":
        raise ValueError("no question of mine")
    return None if text == b"secret" else b"re: " + text


class Hall:
    """Ingresses `a` and `b` on one Valkey."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.stores: list[Store] = []
        self.a = self.ingress("a", echo)
        self.b = self.ingress("b", lambda text: b"b knows" if text == b"secret" else echo(text))

    def ingress(self, name: str, answer: Callable[[bytes], bytes | None], cluster: str = "c") -> Questions:
        self.stores.append(Store(self.valkey.url, cluster, StoreOptions(timeout_s=1.0)))
        questions = Questions(self.stores[-1], name, Random(name), answer, FAST)
        questions.start()
        return questions

    @property
    def key(self) -> str:
        return self.stores[0].keys("questions")


@pytest.fixture
async def hall(valkey: Valkey) -> AsyncIterator[Hall]:
    made = Hall(valkey)
    try:
        yield made
    finally:
        for questions in (made.a, made.b):
            await questions.close()
            await questions.close()
        for store in made.stores:
            await store.close()


async def test_a_question_is_answered_by_the_ingress_it_is_put_to(hall: Hall) -> None:
    assert await hall.a.ask("b", b"why?") == b"re: why?"
    assert await hall.b.ask("a", b"where?") == b"re: where?"


async def test_a_question_to_everybody_is_answered_by_who_knows(hall: Hall) -> None:
    assert await hall.a.ask(None, b"secret") == b"b knows"


async def test_silence_is_an_answer_for_who_is_gone_or_does_not_understand(hall: Hall) -> None:
    assert await hall.a.ask("gone", b"why?") is None
    assert await hall.a.ask("b", b"nonsense") is None
    assert await hall.a.ask("b", b"x" * 5000) is None, "longer than any question"
    assert await hall.a.ask("b", b"and now?") == b"re: and now?"


async def test_a_question_is_answered_once(hall: Hall) -> None:
    heard: list[bytes] = []
    listener = hall.ingress("c", heard.append)
    await hall.a.ask("c", b"once")
    assert heard == [b"once"]
    await listener.close()


@pytest.mark.parametrize(
    "garbage",
    [
        ("SET", "junk"),
        ("HSET", "field", "junk"),
        ("RPUSH", "junk", "\x00\xff", ""),
        ("RPUSH", msgspec.msgpack.encode(["../../x", "b", b"a number that is none"])),
        ("RPUSH", msgspec.msgpack.encode({"number": 1})),
    ],
)
async def test_garbage_where_the_questions_are_is_no_matter(hall: Hall, garbage: tuple[str, ...]) -> None:
    verb, *words = garbage
    hall.valkey.raw(verb, hall.key, *words)
    await asyncio.sleep(0.05)
    assert await hall.a.ask("b", b"why?") == b"re: why?"


async def test_questions_are_bounded_and_expire_with_their_answers(hall: Hall) -> None:
    for questions in (hall.a, hall.b):
        await questions.close()
    asking = [asyncio.create_task(hall.a.ask("b", b"%d" % i)) for i in range(40)]
    lengths = set()
    while not any(task.done() for task in asking):  # with the first that gives up, the next is put
        lengths.add(int(hall.valkey.raw("LLEN", hall.key)[1:-2]))
        await asyncio.sleep(0.02)
    assert max(lengths) == 16, "the others wait until some are done"
    assert await asyncio.gather(*asking) == [None] * 40
    hall.valkey.raw("LPUSH", hall.key, *["junk"] * 2 * MAX_QUESTIONS)
    assert await hall.a.ask("b", b"one more") is None
    assert int(hall.valkey.raw("LLEN", hall.key)[1:-2]) == MAX_QUESTIONS
    assert 0 < int(hall.valkey.raw("PTTL", hall.key)[1:-2]) <= 5000


async def test_another_cluster_on_the_same_redis_hears_nothing(hall: Hall) -> None:
    other = hall.ingress("b", lambda text: b"not mine to say", cluster="d")
    assert await hall.a.ask("b", b"why?") == b"re: why?"
    await other.close()


async def test_a_frozen_redis_is_an_error_for_who_asks_and_forgotten_afterwards(hall: Hall) -> None:
    hall.valkey.signal(signal.SIGSTOP)
    try:
        with pytest.raises(StoreError):
            await hall.a.ask("b", b"why?")
    finally:
        hall.valkey.signal(signal.SIGCONT)
    await asyncio.sleep(0.1)
    assert await hall.a.ask("b", b"why?") == b"re: why?"
