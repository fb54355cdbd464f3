"""Text and stop strings for every engine: wraps one, and is one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import tokenizers

from replicas.contract import (
    AdapterSpec,
    Engine,
    EngineFacts,
    EngineStats,
    GenerateRequest,
    KvEvent,
    StepDelta,
    StepSink,
    unpack_tokens,
)
from replicas.incremental import Detokenizer, Vocabulary
from replicas.stops import StopMatcher


class TextEngine:
    """`replicas.contract.Engine` that fills `StepDelta.text` and ends requests at stop strings.

    Text of special tokens follows `skip_special_tokens`; the token that ends an answer (end of sequence, a stop token)
    has no text unless `include_stop_str_in_output`. A stop string ends the request with `stop` and itself as
    stop_reason; tokens up to the one that completed it are kept, the text ends where it begins. Tokens produced by
    an earlier attempt prime both; their text is not given again.
    """

    def __init__(self, engine: Engine, tokenizer: tokenizers.Tokenizer) -> None:
        self.engine = engine
        self._tokenizer = tokenizer
        self._vocabularies: dict[bool, Vocabulary] = {}
        self._streams: dict[str, _Stream] = {}
        self._sink: StepSink | None = None

    async def start(self, sink: StepSink) -> EngineFacts:
        self._sink = sink
        return await self.engine.start(self._deliver)

    def submit(self, request: GenerateRequest) -> None:
        if request.request_id in self._streams:
            self.engine.submit(request)  # refuses it; the open one keeps its stream
            return
        self._streams[request.request_id] = self._stream(request)
        try:
            self.engine.submit(request)
        except BaseException:
            del self._streams[request.request_id]
            raise

    def abort(self, request_id: str) -> None:
        self.engine.abort(request_id)

    async def load_adapter(self, adapter: AdapterSpec) -> None:
        await self.engine.load_adapter(adapter)

    async def unload_adapter(self, adapter_id: str) -> None:
        await self.engine.unload_adapter(adapter_id)

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def kv_events(self) -> list[KvEvent]:
        return self.engine.kv_events()

    async def drain(self) -> None:
        await self.engine.drain()

    async def close(self) -> None:
        await self.engine.close()

    def _stream(self, request: GenerateRequest) -> _Stream:
        sampling = request.sampling
        vocabulary = self._vocabularies.get(sampling.skip_special_tokens)
        if vocabulary is None:
            vocabulary = Vocabulary(self._tokenizer, skip_special_tokens=sampling.skip_special_tokens)
            self._vocabularies[sampling.skip_special_tokens] = vocabulary
        detokenizer = vocabulary.detokenizer(unpack_tokens(request.prompt[-_CONTEXT_BYTES:]))
        stream: _Stream = _StopStream(request, detokenizer) if any(sampling.stop) else _Stream(request, detokenizer)
        if request.produced:
            stream.prime(unpack_tokens(request.produced))
        return stream

    def _deliver(self, deltas: Sequence[StepDelta]) -> None:
        """The inner engine's sink: the hot path, once per token of every request."""
        streams = self._streams
        out = []
        for delta in deltas:
            stream = streams.get(delta.request_id)
            if stream is None:
                continue  # ended at a stop string; the inner engine had not heard yet
            if delta.finish_reason is None and stream.push is not None:
                delta.text = stream.push(delta.token_ids)
            else:
                self._advance(stream, delta)
            out.append(delta)
        if out:
            assert self._sink is not None
            self._sink(out)

    def _advance(self, stream: _Stream, delta: StepDelta) -> None:
        is_last = delta.finish_reason is not None
        stream.advance(delta)
        if delta.finish_reason is None:
            return
        del self._streams[delta.request_id]
        if not is_last:
            self.engine.abort(delta.request_id)


_CONTEXT_BYTES = 64


class _Stream:
    """One request without stop strings. `push`, where there is one, is all that a delta before the last needs."""

    __slots__ = ("_detokenizer", "_shows_stop", "push")

    def __init__(self, request: GenerateRequest, detokenizer: Detokenizer) -> None:
        self._detokenizer = detokenizer
        self._shows_stop = request.sampling.include_stop_str_in_output
        self.push: Callable[[Sequence[int]], str] | None = detokenizer.push

    def prime(self, produced: Sequence[int]) -> None:
        """Takes in tokens whose text an earlier attempt has given."""
        self._detokenizer.push(produced)

    def advance(self, delta: StepDelta) -> None:
        """Fills in the text of a delta, the last one included."""
        delta.text = self._detokenizer.push(self._shown(delta))
        if delta.finish_reason is not None:
            delta.text += self._detokenizer.flush()

    def _shown(self, delta: StepDelta) -> tuple[int, ...]:
        """The tokens that have text: not the one that ended the answer."""
        if delta.finish_reason == "stop" and not self._shows_stop:
            return delta.token_ids[:-1]
        return delta.token_ids


class _StopStream(_Stream):
    """One request with stop strings."""

    __slots__ = ("_matcher", "_min_tokens", "_num_output")

    def __init__(self, request: GenerateRequest, detokenizer: Detokenizer) -> None:
        super().__init__(request, detokenizer)
        self.push = None
        self._matcher = StopMatcher(request.sampling.stop)
        self._min_tokens = request.sampling.min_tokens
        self._num_output = 0

    def prime(self, produced: Sequence[int]) -> None:
        # One by one, as they came: what is held back now is what the earlier attempt held back.
        for token_id in produced:
            self._matcher.skip(self._detokenizer.push((token_id,)))
        self._num_output = len(produced)

    def advance(self, delta: StepDelta) -> None:
        shown: list[str] = []
        for count, token_id in enumerate(self._shown(delta), start=1):
            self._num_output += 1
            stop = self._feed(self._detokenizer.push((token_id,)), shown)
            if stop is not None:
                self._cut(delta, count, stop)
                break
        else:
            if delta.finish_reason is not None:
                shown.append(self._matcher.skip(self._detokenizer.flush()) + self._matcher.flush())
        delta.text = "".join(shown)

    def _feed(self, text: str, shown: list[str]) -> str | None:
        """Adds what may be shown; returns the stop string that `text` completed. Counts from min_tokens on."""
        if self._num_output <= self._min_tokens:
            shown.append(self._matcher.skip(text))
            return None
        visible, stop = self._matcher.feed(text)
        shown.append(visible)
        if stop is not None and self._shows_stop:
            shown.append(stop)
        return stop

    def _cut(self, delta: StepDelta, num_tokens: int, stop: str) -> None:
        """Ends the request after `num_tokens` of this delta."""
        delta.token_ids = delta.token_ids[:num_tokens]
        if delta.logprobs is not None:
            delta.logprobs = delta.logprobs[:num_tokens]
        delta.finish_reason = "stop"
        delta.stop_reason = stop
        delta.fault = None
