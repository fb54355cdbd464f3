"""Stop strings in a text that arrives in pieces."""

from __future__ import annotations

import re


class StopMatcher:
    """Finds the stop string that is complete first, wherever the borders between pieces fall, and holds back exactly
    what could still become one: the longest suffix that begins a stop string (Knuth, Morris, Pratt 1977).

    Of two stop strings complete at the same character, the longer wins. O(stop strings) a character, and next to
    nothing for a piece without any stop string's first character.
    """

    __slots__ = ("_failures", "_first", "_held", "_states", "_stops")

    def __init__(self, stops: tuple[str, ...]) -> None:
        # Longest first, so that the first complete one found at a character is the longest.
        self._stops = sorted({stop for stop in stops if stop}, key=len, reverse=True)
        self._failures = [_failure(stop) for stop in self._stops]
        self._states = [0] * len(self._stops)
        self._first = re.compile("[" + re.escape("".join({stop[0] for stop in self._stops})) + "]")
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """Takes in a piece; returns what may be shown, and the stop string when one is complete (the text then ends
        where it begins, and what came after it is dropped)."""
        return self._scan(text, may_end=True)

    def skip(self, text: str) -> str:
        """Like `feed` where no answer may end yet (min_tokens): stop strings complete within `text` do not count."""
        return self._scan(text, may_end=False)[0]

    def flush(self) -> str:
        """What was held back, when no more text comes."""
        held, self._held = self._held, ""
        return held

    def _scan(self, text: str, *, may_end: bool) -> tuple[str, str | None]:
        first = 0
        if not self._held:
            found = self._first.search(text)
            if found is None:
                return text, None
            first = found.start()
        buffer = self._held + text
        states = self._states
        for end in range(len(self._held) + first, len(buffer)):
            char = buffer[end]
            for i, stop in enumerate(self._stops):
                failure, state = self._failures[i], states[i]
                while state and stop[state] != char:
                    state = failure[state - 1]
                if stop[state] == char:
                    state += 1
                if state == len(stop):
                    if may_end:
                        return buffer[: end + 1 - len(stop)], stop
                    state = failure[state - 1]
                states[i] = state
        shown = len(buffer) - max(states)
        self._held = buffer[shown:]
        return buffer[:shown], None


def _failure(stop: str) -> list[int]:
    """For each prefix of `stop`, the length of its longest proper suffix that is a prefix of `stop`."""
    failure = [0] * len(stop)
    state = 0
    for i in range(1, len(stop)):
        while state and stop[i] != stop[state]:
            state = failure[state - 1]
        if stop[i] == stop[state]:
            state += 1
        failure[i] = state
    return failure
