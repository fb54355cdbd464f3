"""The events of one stream, as bytes around the text.

    envelope                                              head[index]            text     tail
    data: {"id":…,"object":…,"created":…,…,"choices":[  {"index":0,"delta":{…    "Hi"   },"logprobs":null,…}]}\\n\\n

A delta of text alone costs one JSON string and one join. Logprobs, token ids and running usage take the long way.
Pieces whose text is held back (half a character, a possible stop string) make no event of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.api.answer import Call, Identity, Meter
from gateway.api.flow import Batch
from gateway.sse import DONE, encode, json_text, one_line
from replicas.contract import StepDelta


@dataclass(frozen=True, slots=True)
class Shape:
    """How a route writes a choice: bytes before and after the text, and the choice of the last chunk."""

    object_name: str
    before_text: bytes
    after_text: bytes
    no_text: bytes


class Chunks:
    """Writes the events of one answer; routes say what a choice opens with and how logprobs look."""

    def __init__(self, shape: Shape, call: Call, identity: Identity, meter: Meter) -> None:
        self.call = call
        self._meter = meter
        self._begun: set[int] = set()
        self._shape = shape
        self._token_ids = bool(call.fields.return_token_ids)
        self._running_usage = call.fields.continuous_usage
        self._include_usage = call.fields.include_usage
        self._plain = not (call.logprobs.output is not None or self._token_ids or self._running_usage)
        fields = {
            "id": identity.answer_id,
            "object": shape.object_name,
            "created": identity.created,
            "model": identity.model,
            "system_fingerprint": identity.fingerprint,
        }
        self._envelope = b"data: " + one_line(encode(fields))[:-1]
        num_choices = len(call.prompts) * call.num_generated
        self._indexes = [self._envelope + b',"choices":[{"index":%d,' % index for index in range(num_choices)]
        self._heads = [index + shape.before_text for index in self._indexes]
        self._no_usage = b',"usage":null' if self._include_usage else b""
        self._tail = shape.after_text + b',"logprobs":null,"finish_reason":null}]' + self._no_usage + b"}\n\n"

    def write(self, batch: Batch) -> bytes:
        """The events of a batch, b"" when all its text is held back."""
        pieces = []
        for index, delta in batch:
            if index not in self._begun:
                self._begun.add(index)
                pieces.append(self.opening(index, delta))
            pieces.append(self.delta(index, delta))
        return b"".join(pieces)

    def opening(self, index: int, delta: StepDelta) -> bytes:
        """What choice `index` begins with; `delta` is its first one."""
        raise NotImplementedError

    def logprobs(self, index: int, delta: StepDelta) -> object | None:
        """The logprobs of a delta as this route's clients read them; called in order for each choice."""
        raise NotImplementedError

    def finish_reason(self, index: int, delta: StepDelta) -> str | None:
        """What a terminal delta's choice says it ended for."""
        return delta.finish_reason

    def delta(self, index: int, delta: StepDelta) -> bytes:
        """The events of one delta: its text, if any, and after a terminal one the finish."""
        if self._plain:
            written = self._heads[index] + json_text(delta.text) + self._tail if delta.text else b""
        else:
            written = self._annotated(index, delta)
        return written + self._finish(index, delta) if delta.finish_reason is not None else written

    def choice(self, index: int, middle: bytes, extra: bytes = b"") -> bytes:
        """An event with one choice: `middle` stands after its index, `extra` after all choices."""
        return b"%s%s}]%s%s}\n\n" % (self._indexes[index], middle, extra, self._usage_so_far())

    def closing(self) -> bytes:
        """The usage chunk if asked for, and `[DONE]`."""
        if not self._include_usage:
            return DONE
        return b'%s,"choices":[],"usage":%s}\n\n%s' % (self._envelope, encode(self._meter.usage()), DONE)

    def _annotated(self, index: int, delta: StepDelta) -> bytes:
        logprobs, token_ids = b"null", b""
        if scored := self.logprobs(index, delta):
            logprobs = one_line(encode(scored))
        if self._token_ids and delta.token_ids:
            token_ids = b',"token_ids":' + encode(delta.token_ids)
        if not delta.text and logprobs == b"null" and not token_ids:
            return b""
        text = self._shape.before_text + json_text(delta.text) + self._shape.after_text
        return self.choice(index, b'%s,"logprobs":%s,"finish_reason":null%s' % (text, logprobs, token_ids))

    def _finish(self, index: int, delta: StepDelta) -> bytes:
        stop_reason = b"" if delta.stop_reason is None else b',"stop_reason":' + one_line(encode(delta.stop_reason))
        reason = encode(self.finish_reason(index, delta))
        return self.choice(
            index, b'%s,"logprobs":null,"finish_reason":%s%s' % (self._shape.no_text, reason, stop_reason)
        )

    def _usage_so_far(self) -> bytes:
        return b',"usage":' + encode(self._meter.usage()) if self._running_usage else self._no_usage
