"""Replaying over OpenAI's wire: streamed completions, one connection a request under way."""

from __future__ import annotations

import asyncio
import math

import msgspec

from ops.bench.harness import BenchError
from ops.bench.load import Call, Connection, arrival_of
from ops.bench.load_spec import AnswerError, read_answer
from ops.bench.replay import Outcome
from ops.bench.trace_slice import ReplayRequest

TIMEOUT_S = 300.0


NAMING = (b"x-warmgate-replica", b"x-worker-id")
"""Headers in which a front-end says who answered."""


class _Connection(Connection):
    """Notes who answered last."""

    replica = ""

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() in NAMING:
            self.replica = value.decode()


class HttpAsker:
    """Asks a server on loopback. `faults` are the first few answers that were none; more than one in twenty end it."""

    def __init__(self, port: int, model: str, num_requests: int) -> None:
        self.faults: list[str] = []
        self._port = port
        self._model = model
        self._max_faults = max(1, num_requests // 20)
        self._idle: list[_Connection] = []

    async def ask(self, index: int, request: ReplayRequest, intended: float) -> Outcome:
        """See `ops.bench.replay.Ask`. Raises BenchError when too many went wrong."""
        call = Call(intended)
        connection = await self._connection()
        try:
            await asyncio.wait_for(connection.send(call, self._wire(request)), TIMEOUT_S)
            self._idle.append(connection)
            return msgspec.structs.replace(self._outcome(call, request), replica=connection.replica)
        except (AnswerError, ConnectionError, TimeoutError, msgspec.MsgspecError) as error:
            connection.close()
            self.faults.append(f"request {index}: {error or type(error).__name__}")
            if len(self.faults) > self._max_faults:
                raise BenchError(f"{len(self.faults)} answers went wrong: {self.faults[:3]}") from error
            return Outcome(math.inf, len(request.prompt), 0)

    def close(self) -> None:
        for connection in self._idle:
            connection.close()

    def _outcome(self, call: Call, request: ReplayRequest) -> Outcome:
        body = b"".join(piece for _, piece in call.pieces)
        if call.status != 200:
            raise AnswerError(f"status {call.status}: {body[:200]!r}")
        answer = read_answer(body, request.max_tokens)
        ttft_s = arrival_of(call.pieces, answer.first_end) - call.intended_s
        return Outcome(ttft_s, answer.num_prompt, answer.num_cached)

    def _wire(self, request: ReplayRequest) -> bytes:
        body = msgspec.json.encode(
            {
                "model": self._model,
                "prompt": request.prompt,
                "max_tokens": request.max_tokens,
                "stream": True,
                "temperature": 0,
                "ignore_eos": True,
                "stream_options": {"include_usage": True},
            }
        )
        head = (
            f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1:{self._port}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body

    async def _connection(self) -> _Connection:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
        _, made = await asyncio.get_running_loop().create_connection(_Connection, "127.0.0.1", self._port)
        return made
