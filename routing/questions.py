"""Questions from one ingress to another, for what only one of them knows. Nothing on the request path waits for them.

    wg:{cluster}:questions        list of the last questions, expires when nobody asks
    wg:{cluster}:answer:<number>  one answer, expires after a few seconds

Every ingress reads the list a few times a second and answers what is put to it. Who asks looks for the answer for a
while, and then takes silence for one.
"""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Annotated

import msgspec
from msgspec import Meta

from routing.store import BadValueError, Command, Store, StoreError, StoreReplyError

log = logging.getLogger(__name__)

MAX_QUESTIONS = 256
MAX_QUESTION_BYTES = 4096
MAX_ANSWER_BYTES = 4 * 1024 * 1024
MAX_SEEN = 4 * MAX_QUESTIONS


class _Question(msgspec.Struct, frozen=True, array_like=True):
    """`to`: an ingress, or None for whoever knows."""

    number: Annotated[str, Meta(pattern=r"^[0-9a-f]{32}$")]
    to: str | None
    text: bytes


_decoder = msgspec.msgpack.Decoder(_Question)


@dataclass(frozen=True, slots=True, kw_only=True)
class QuestionOptions:
    """Seconds. An ingress reads questions every `poll_s`; who asked looks every `look_s`, for `patience_s`."""

    poll_s: float = 0.25
    look_s: float = 0.05
    patience_s: float = 1.5
    expiry_s: float = 5.0
    max_open: int = 16


class Questions:
    """One ingress's ear and voice. `answer` makes an answer of a question, or None to leave it to others; it may raise
    ValueError for what is no question. `random` numbers the questions."""

    def __init__(
        self, store: Store, own_id: str, random: Random, answer: Callable[[bytes], bytes | None],
        options: QuestionOptions | None = None,
    ) -> None:  # fmt: skip
        self._store = store
        self._own_id = own_id
        self._random = random
        self._answer = answer
        self._options = options or QuestionOptions()
        self._key = store.keys("questions")
        self._seen: OrderedDict[str, None] = OrderedDict()
        self._open = asyncio.Semaphore(self._options.max_open)
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begins to answer; returns at once. Call it once."""
        assert self._task is None, "the questions are read already"
        self._task = asyncio.create_task(self._keep(), name="answer questions")

    async def close(self) -> None:
        """Answers no more. Idempotent."""
        if self._task is not None:
            task, self._task = self._task, None
            task.cancel()
            await asyncio.wait([task])

    async def ask(self, to: str | None, text: bytes) -> bytes | None:
        """The answer of ingress `to`, or of whoever knows; None after `patience_s` of silence. Raises StoreError."""
        async with self._open:
            number = f"{self._random.getrandbits(128):032x}"
            await self._put(msgspec.msgpack.encode(_Question(number, to, text)))
            key = self._store.keys("answer", number)
            give_up = asyncio.get_running_loop().time() + self._options.patience_s
            while asyncio.get_running_loop().time() < give_up:
                await asyncio.sleep(self._options.look_s)
                raw = await self._store.execute("GET", key)
                if raw is not None:
                    return bytes(raw)
            return None

    async def serve(self) -> None:
        """Reads the questions once and answers those put to this ingress. Raises StoreError."""
        for raw in await self._store.execute("LRANGE", self._key, 0, MAX_QUESTIONS - 1):
            question = self._fresh(raw)
            if question is None:
                continue
            found = self._answered(question)
            if found is not None:
                key = self._store.keys("answer", question.number)
                await self._store.execute("SET", key, found, "PX", self._expiry_ms)

    @property
    def _expiry_ms(self) -> int:
        return round(self._options.expiry_s * 1000)

    async def _put(self, raw: bytes) -> None:
        push: list[Command] = [
            ("LPUSH", self._key, raw),
            ("LTRIM", self._key, 0, MAX_QUESTIONS - 1),
            ("PEXPIRE", self._key, self._expiry_ms),
        ]
        replies = await self._store.pipeline(push)
        if isinstance(replies[0], StoreReplyError):  # somebody put a value of another type there
            replies = await self._store.pipeline([("DEL", self._key), *push])
            if isinstance(replies[1], StoreReplyError):
                raise replies[1]

    async def _keep(self) -> None:
        while True:
            try:
                await self.serve()
            except StoreError as error:
                log.debug("could not read questions: %s", error)
            await self._store.beat(self._options.poll_s)

    def _fresh(self, raw: bytes) -> _Question | None:
        """A question that was not looked at before, and is put to this ingress."""
        if len(raw) > MAX_QUESTION_BYTES:
            return None
        try:
            question: _Question = self._store.decode(self._key, raw, _decoder)
        except BadValueError:
            return None
        if question.number in self._seen:
            return None
        self._seen[question.number] = None
        if len(self._seen) > MAX_SEEN:
            self._seen.popitem(last=False)
        return question if question.to in (None, self._own_id) else None

    def _answered(self, question: _Question) -> bytes | None:
        try:
            found = self._answer(question.text)
        except ValueError as error:
            log.warning("a question that is none: %s", error)
            return None
        if found is not None and len(found) > MAX_ANSWER_BYTES:
            log.warning("an answer of %d bytes is too long to give", len(found))
            return None
        return found
