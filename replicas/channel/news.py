"""When ingresses hear of a load that has changed though none of their own requests did."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

SOON_S = 0.005
"""After a request of another ingress: what comes in the meantime is told together."""

OFTEN_S = 0.05
"""While there is work: prompts are computed for seconds without a word for anybody."""


class News:
    """`tell` tells whoever has not heard yet; it returns whether there will be more to tell without being asked for."""

    def __init__(self, tell: Callable[[], bool]) -> None:
        self._tell = tell
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False

    def within(self, seconds: float) -> None:
        """There is something to tell, by then at the latest."""
        if self._closed:
            return
        at = asyncio.get_running_loop().time() + seconds
        if self._timer is not None:
            if self._timer.when() <= at:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(at, self._on_time)

    def close(self) -> None:
        """Nothing is told any more. Idempotent."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _on_time(self) -> None:
        self._timer = None
        if self._tell():
            self.within(OFTEN_S)
