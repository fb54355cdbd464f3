"""The events of a streamed chat: role first, then text, or the pieces that the text is made of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gateway.api.answer import Call, Identity, Meter
from gateway.api.chunks import Chunks, Shape
from gateway.api.pieces import CallArguments, CallBegun, Content, Piece, Thought
from gateway.api.speech import Reading
from gateway.sse import encode, json_text, one_line
from gateway.tokens import TokenText
from replicas.contract import StepDelta, TokenLogprob

SHAPE = Shape(
    object_name="chat.completion.chunk",
    before_text=b'"delta":{"content":',
    after_text=b"}",
    no_text=b'"delta":{}',
)
_ROLE = b'"delta":{"role":"assistant","content":"","refusal":null},"logprobs":null,"finish_reason":null'
NO_LOGPROB = -9999.0  # OpenAI's floor; JSON has no infinity


class ChatChunks(Chunks):
    """Every choice begins with its role."""

    def __init__(self, call: Call, identity: Identity, meter: Meter) -> None:
        wanted = call.logprobs.output
        self._scores = None if wanted is None else ChatLogprobs(call.prompter.token_text, wanted)
        super().__init__(SHAPE, call, identity, meter)

    def logprobs(self, index: int, delta: StepDelta) -> object | None:
        return self._scores.output(delta.logprobs) if self._scores and delta.logprobs else None

    def opening(self, index: int, delta: StepDelta) -> bytes:
        if self.call.fields.return_token_ids:
            return self.choice(index, _ROLE, b',"prompt_token_ids":' + encode(self.call.prompts[0].token_ids()))
        return self.choice(index, _ROLE)


class ChatLogprobs:
    """OpenAI's `logprobs.content`: every token with exactly `num_top` alternatives."""

    def __init__(self, token_text: TokenText, num_top: int) -> None:
        self._token_text = token_text
        self._num_top = num_top

    def output(self, scored: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = []
        for position in scored:
            entry = self._token(position.token_id, position.logprob)
            entry["top_logprobs"] = [self._token(*top) for top in position.top[: self._num_top]]
            content.append(entry)
        return {"content": content, "refusal": None}

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        return {
            "token": self._token_text.label(token_id),
            "logprob": max(logprob, NO_LOGPROB),
            "bytes": list(self._token_text.as_bytes(token_id)),
        }


class ReadChunks(ChatChunks):
    """Each piece of the text is an event of its own; logprobs and token ids go with the first of a delta."""

    def __init__(self, call: Call, reading: Reading, identity: Identity, meter: Meter) -> None:
        self._reading = reading
        num_choices = len(call.prompts) * call.num_generated
        self._readers = [reading.reader() for _ in range(num_choices)]
        self._num_calls = [0] * num_choices
        super().__init__(call, identity, meter)

    def delta(self, index: int, delta: StepDelta) -> bytes:
        reader = self._readers[index]
        pieces = reader.feed(delta.text) if delta.text else []
        if delta.finish_reason is not None:
            pieces = [*pieces, *reader.finish()]
        self._num_calls[index] += sum(isinstance(piece, CallBegun) for piece in pieces)
        bodies = [body for piece in pieces if (body := self._body(piece))]
        written = self._events(index, delta, bodies)
        return written + self._finish(index, delta) if delta.finish_reason is not None else written

    def finish_reason(self, index: int, delta: StepDelta) -> str | None:
        return self._reading.finish_reason(delta.finish_reason, self._num_calls[index])

    def _events(self, index: int, delta: StepDelta, bodies: list[bytes]) -> bytes:
        scored = self.logprobs(index, delta)
        token_ids = b',"token_ids":' + encode(delta.token_ids) if self._token_ids and delta.token_ids else b""
        if (scored or token_ids) and not bodies:
            bodies = [b"{}"]
        written = []
        for body in bodies:
            logprobs = b"null" if scored is None else one_line(encode(scored))
            middle = b'"delta":%s,"logprobs":%s,"finish_reason":null%s' % (body, logprobs, token_ids)
            written.append(self.choice(index, middle))
            scored, token_ids = None, b""
        return b"".join(written)

    def _body(self, piece: Piece) -> bytes:
        """The `delta` of an event; b"" for what is not shown."""
        if isinstance(piece, Content):
            return b'{"content":%s}' % json_text(piece.text)
        if isinstance(piece, Thought):
            text = json_text(piece.text)
            return b'{"reasoning":%s,"reasoning_content":%s}' % (text, text) if self._reading.show_thoughts else b""
        if isinstance(piece, CallArguments):
            return b'{"tool_calls":[{"index":%d,"function":{"arguments":%s}}]}' % (piece.index, json_text(piece.text))
        return b'{"tool_calls":[{"index":%d,"id":%s,"type":"function","function":{"name":%s,"arguments":""}}]}' % (
            piece.index,
            encode(piece.call_id),
            json_text(piece.name),
        )
