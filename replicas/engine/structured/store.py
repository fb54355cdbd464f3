"""Compiled grammars of one engine: tried in the guard's process, compiled in a thread of their own, kept for the next.

get ─► kept? ─► copy ─► Grammar                 a copy is microseconds
         └► guard ─► Compiled ─► keep           once, however many ask at the same time
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import llguidance

from configs.grammars.guard import GrammarGuard
from configs.grammars.source import GrammarError, GrammarSource
from configs.schema import EngineConfig
from replicas.contract import Constraint, Fault, RefusedError
from replicas.engine.structured.grammar import Grammar
from replicas.engine.structured.numbers import DigitTokens, NumberEnd
from replicas.engine.structured.walk import Compiled, Walk

logger = logging.getLogger(__name__)

MAX_KEPT = 128
MAX_COMPILING = 256
"""Grammars that wait for the compiler; more are refused, to be tried elsewhere."""


@dataclass(frozen=True, slots=True)
class StoreOptions:
    """`max_kept`: compiled grammars kept, least recently used first to go; 10 MiB each at the worst, 100 kB usually."""

    max_kept: int = MAX_KEPT
    max_compiling: int = MAX_COMPILING
    cpu_s: Callable[[], float] = time.thread_time


def read_tokenizer(tokenizer_json: str, vocab_size: int, eos_token_ids: Sequence[int]) -> llguidance.LLTokenizer | None:
    """A tokenizer's tokens as bytes, in a trie; None for a kind that the library does not know.

    Ids from the tokenizer's size up to `vocab_size` are never allowed.
    """
    if not eos_token_ids:
        return None  # no answer could end
    try:
        return llguidance.LLTokenizer(tokenizer_json, n_vocab=vocab_size, eos_token=list(eos_token_ids))
    except Exception as error:  # the library's own exceptions have no common type
        logger.warning("answers cannot be made to follow grammars: the tokenizer cannot be used: %s", error)
        return None


def make_grammars(
    config: EngineConfig, tokenizer_json: str | None, vocab_size: int, eos_token_ids: Sequence[int]
) -> GrammarStore | None:
    """What an engine follows grammars with; None where it cannot, or the profile says it shall not. Building the trie
    takes 4 µs a token."""
    if not config.structured or tokenizer_json is None:
        return None
    tokenizer = read_tokenizer(tokenizer_json, vocab_size, eos_token_ids)
    return None if tokenizer is None else GrammarStore(tokenizer, GrammarGuard())


class GrammarStore:
    """Used on one event loop, but for the grammars it gives, which are the engine thread's from then on."""

    def __init__(
        self, tokenizer: llguidance.LLTokenizer, guard: GrammarGuard, options: StoreOptions | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._guard = guard
        self._options = options or StoreOptions()
        self._kept: OrderedDict[GrammarSource, Compiled] = OrderedDict()
        self._compiling: dict[GrammarSource, asyncio.Future[Compiled]] = {}
        self._digits = DigitTokens.of(tokenizer.vocab_size, lambda token_id: tokenizer.decode_bytes([token_id]))
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="grammar")

    async def get(self, constraint: Constraint, produced: Sequence[int]) -> Grammar:
        """A grammar for one sequence, which has produced these tokens already. Raises RefusedError."""
        try:
            walk = Walk(await self._compiled(constraint.source))
        except GrammarError as error:
            code = "grammar_too_complex" if error.too_complex else "invalid_grammar"
            message = f"Invalid value for '{constraint.param}': {error.message}."
            raise RefusedError(Fault(code, message, param=constraint.param)) from error
        if produced:
            loop = asyncio.get_running_loop()
            num_taken = await loop.run_in_executor(self._executor, walk.take, produced)
            if num_taken < len(produced):
                message = f"the answer so far does not follow its grammar from token {num_taken} on"
                raise RefusedError(Fault("internal", message))
        return Grammar(walk, constraint.param, self._options.cpu_s, self._numbers(constraint, produced))

    def _numbers(self, constraint: Constraint, produced: Sequence[int]) -> NumberEnd | None:
        if self._digits is None or not constraint.source.has_json:
            return None
        numbers = NumberEnd(self._digits)
        for token_id in produced:
            numbers.advance(token_id)
        return numbers

    def close(self) -> None:
        """Ends guard and thread; what is being compiled is cancelled. Idempotent."""
        self._guard.close()
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _compiled(self, source: GrammarSource) -> Compiled:
        kept = self._kept.get(source)
        if kept is not None and not kept.full:
            self._kept.move_to_end(source)
            return kept
        under_way = self._compiling.get(source)
        if under_way is None:
            if len(self._compiling) >= self._options.max_compiling:
                message = f"{len(self._compiling)} grammars wait to be compiled"
                raise RefusedError(Fault("overloaded", message, retryable=True))
            under_way = asyncio.get_running_loop().run_in_executor(self._executor, self._compile, source)
            self._compiling[source] = under_way
            under_way.add_done_callback(lambda done: self._keep(source, done))
        return await asyncio.shield(under_way)  # others may wait for it too

    def _compile(self, source: GrammarSource) -> Compiled:
        """In the thread; the library lets go of the GIL."""
        return Compiled(self._tokenizer, self._guard.check(source))

    def _keep(self, source: GrammarSource, done: asyncio.Future[Compiled]) -> None:
        self._compiling.pop(source, None)
        if done.cancelled() or done.exception() is not None:
            return
        self._kept[source] = done.result()
        while len(self._kept) > self._options.max_kept:
            self._kept.popitem(last=False)
