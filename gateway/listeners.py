"""Who hears that a model's replicas have changed: callbacks, and tasks that wait for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


class Listeners:
    """For one fleet; used on one event loop."""

    def __init__(self) -> None:
        self._callbacks: list[Callable[[str], None]] = []
        self._sleepers: set[asyncio.Future[None]] = set()
        self._heard: set[str] = set()
        self._loop: asyncio.AbstractEventLoop | None = None

    def subscribe(self, callback: Callable[[str], None]) -> None:
        """Calls back with a model's id at each `tell`, and soon after `tell_soon`."""
        self._callbacks.append(callback)

    async def change(self) -> None:
        """Returns at the next `tell`."""
        sleeper = asyncio.get_running_loop().create_future()
        self._sleepers.add(sleeper)
        try:
            await sleeper
        finally:
            self._sleepers.discard(sleeper)

    def tell(self, model_id: str) -> None:
        """The model can take more than before, or has a replica more or less."""
        for callback in self._callbacks:
            callback(model_id)
        for sleeper in self._sleepers:
            if not sleeper.done():
                sleeper.set_result(None)

    def tell_soon(self, model_id: str) -> None:
        """A replica of the model has told its load: callbacks hear it, once for all that came in a turn of the loop."""
        if not self._heard:
            if self._loop is None:  # asked for once: it costs a system call (CPython 3.11 checks its pid)
                self._loop = asyncio.get_running_loop()
            self._loop.call_soon(self._tell_what_was_heard)
        self._heard.add(model_id)

    def _tell_what_was_heard(self) -> None:
        heard, self._heard = self._heard, set()
        for model_id in heard:
            for callback in self._callbacks:
                callback(model_id)
