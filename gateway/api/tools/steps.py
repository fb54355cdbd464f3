"""What readers of tool calls share: text comes in parts, is understood step by step, and is text after all if no call
comes of it."""

from __future__ import annotations

from abc import ABC, abstractmethod

from gateway.api.pieces import Content, Piece


class SteppingReader(ABC):
    """A `gateway.api.pieces.Reader`. `_rest`: text that is not understood yet; `_raw`: what becomes text if no call
    comes of it; `_begun`: the client knows of the call, or calls, being read."""

    def __init__(self) -> None:
        self._num_calls = 0
        self._rest = ""
        self._raw = ""
        self._begun = False
        self._pieces: list[Piece] = []

    def feed(self, text: str) -> list[Piece]:
        self._rest += text
        while self._rest and self._step():
            pass
        return self._take()

    def finish(self) -> list[Piece]:
        """A call that breaks off after its name is told as far as it came; one that follows others and breaks off
        before it, not at all."""
        is_cut = bool(self._raw.strip() or not self._rest.strip())
        left, self._raw, self._rest = self._raw + self._rest, "", ""
        said_nothing = self._begun or (self._num_calls and is_cut)
        self._text("" if said_nothing else left)
        return self._take()

    @abstractmethod
    def _step(self) -> bool:
        """Understands some more; False when it needs more text."""

    def _take(self) -> list[Piece]:
        taken, self._pieces = self._pieces, []
        return taken

    def _text(self, text: str) -> None:
        if text:
            self._pieces.append(Content(text))

    def _pass_on(self) -> bool:
        self._text(self._rest)
        self._rest = ""
        return False
