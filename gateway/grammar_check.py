"""Whether a grammar can be compiled, known before a replica is bothered; remembered by digest."""

from __future__ import annotations

import asyncio
import hashlib
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import msgspec

from configs.grammars.guard import GrammarGuard
from configs.grammars.source import GrammarError
from gateway.errors import GrammarTooComplexError, InvalidGrammarError, UnavailableError
from replicas.contract import Constraint

MAX_REMEMBERED = 8192


@dataclass(slots=True)
class _Turn:
    """One tenant's checks go one after the other, so that those of others wait for one of them at most."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    num_users: int = 0


class GrammarCheck:
    """`check` runs in the guard's process, one at a time, tenants in turn. Use on one event loop."""

    def __init__(self, guard: GrammarGuard, max_remembered: int = MAX_REMEMBERED) -> None:
        self._guard = guard
        self._max_remembered = max_remembered
        self._refusals: OrderedDict[bytes, GrammarError | None] = OrderedDict()
        self._turns: dict[str, _Turn] = {}
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")  # others must not wait for its work
        self._lock = asyncio.Lock()

    async def __call__(self, constraint: Constraint, tenant_id: str) -> None:
        """Raises BadRequestError for a grammar that cannot be used."""
        digest = hashlib.blake2b(msgspec.msgpack.encode(constraint.source), digest_size=16).digest()
        if digest in self._refusals:
            self._refusals.move_to_end(digest)
            refusal = self._refusals[digest]
        else:
            refusal = await self._find_out(digest, constraint, tenant_id)
        if refusal is not None:
            error = GrammarTooComplexError if refusal.too_complex else InvalidGrammarError
            raise error(f"Invalid value for '{constraint.param}': {refusal.message}.", param=constraint.param)

    def close(self) -> None:
        """Ends the guard's process and the thread that asks it. Idempotent."""
        self._guard.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _find_out(self, digest: bytes, constraint: Constraint, tenant_id: str) -> GrammarError | None:
        turn = self._turns.setdefault(tenant_id, _Turn())
        turn.num_users += 1
        try:
            async with turn.lock, self._lock:
                if digest in self._refusals:  # somebody else asked meanwhile
                    return self._refusals[digest]
                refusal = await self._ask(constraint)
                self._remember(digest, refusal)
                return refusal
        finally:
            turn.num_users -= 1
            if not turn.num_users:
                del self._turns[tenant_id]

    async def _ask(self, constraint: Constraint) -> GrammarError | None:
        try:
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._executor, self._guard.check, constraint.source)
        except GrammarError as error:
            return GrammarError(error.message, too_complex=error.too_complex)  # without its traceback
        except OSError as error:
            raise UnavailableError("Grammars cannot be checked now. Please try again.", retry_after_s=1.0) from error
        return None

    def _remember(self, digest: bytes, refusal: GrammarError | None) -> None:
        self._refusals[digest] = refusal
        while len(self._refusals) > self._max_remembered:
            self._refusals.popitem(last=False)
