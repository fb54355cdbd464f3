"""Deltas of one stream that wait for a slow reader, merged into one."""

from __future__ import annotations

import msgspec

from replicas.contract import StepDelta, TokenLogprob


class Backlog:
    """Merges deltas in order; `take` gives what a fast reader would have got, in one piece.

    Bounded by the request itself: max_tokens tokens with their text and logprobs.
    """

    __slots__ = ("_last", "_logprobs", "_num_cached", "_prompt_logprobs", "_texts", "_token_ids")

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt_logprobs: list[TokenLogprob | None] = []
        self._num_cached: int | None = None
        self._last: StepDelta | None = None

    def __bool__(self) -> bool:
        return self._last is not None

    def add(self, delta: StepDelta) -> None:
        self._token_ids += delta.token_ids
        self._texts.append(delta.text)
        if delta.logprobs is not None:
            self._logprobs += delta.logprobs
        if delta.prompt_logprobs is not None:
            self._prompt_logprobs += delta.prompt_logprobs
        if self._num_cached is None:
            self._num_cached = delta.num_cached_tokens
        self._last = delta

    def take(self) -> StepDelta:
        """The merged delta; the backlog is empty afterwards. Identity and how it ended come from the last delta."""
        assert self._last is not None, "take from an empty backlog"
        merged = msgspec.structs.replace(
            self._last,
            token_ids=tuple(self._token_ids),
            text="".join(self._texts),
            logprobs=tuple(self._logprobs) or None,
            prompt_logprobs=tuple(self._prompt_logprobs) or None,
            num_cached_tokens=self._num_cached,
        )
        self._token_ids, self._texts, self._logprobs, self._prompt_logprobs = [], [], [], []
        self._num_cached = self._last = None
        return merged
