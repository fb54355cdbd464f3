"""Prompt lookup: what followed the last few tokens where they stood before will follow them again.

For answers that quote, edit or summarise their prompt, and for those that repeat themselves. No model, no memory but
the tokens'. (Prompt lookup decoding: Saxena 2023; hash chains as in LZ77 compressors.)

    … the cat sat on the mat … the cat ▌         the last n-gram stood there before, so guess: sat on the mat
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as Rows

import numpy as np
import numpy.typing as npt

from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, StepResult
from replicas.engine.speculative.drafter import Guess, Wish

_MAX_CANDIDATES = 8
"""Earlier places looked at, latest first."""

_PRIME = 0x100000001B3
_MASK = (1 << 64) - 1


class NgramDrafter:
    """Looks for the longest match of the last `min_ngram` to `max_ngram` tokens. `trust` is the match's length."""

    def __init__(self, min_ngram: int, max_ngram: int) -> None:
        if not 1 <= min_ngram <= max_ngram:
            raise ValueError(f"an n-gram has at least one token: {min_ngram=} {max_ngram=}")
        self._min, self._max = min_ngram, max_ngram
        self._indices: dict[str, _Index] = {}

    def draft(self, wishes: Rows[Wish]) -> Mapping[str, Guess]:
        """See `Drafter.draft`."""
        found: dict[str, Guess] = {}
        for wish in wishes:
            tokens, name = wish.seq.tokens, wish.seq.request_id
            index = self._indices.get(name)
            if index is None or index.num_tokens > len(tokens):  # what it holds is of another request
                index = self._indices[name] = _Index(tokens, self._min)
            index.extend(tokens)
            length, end = max(((self._match(tokens, end), end) for end in index.candidates(tokens)), default=(0, 0))
            if length >= self._min:
                found[name] = Guess(Drafts.chain(_repeated(tokens, end, wish.max_drafts)), length)
        return found

    def observe(self, plan: Plan, result: StepResult) -> None:
        """Nothing to learn: the tokens say it all."""

    @property
    def is_settled(self) -> bool:
        """Always."""
        return True

    def retain(self, running: frozenset[str]) -> None:
        """See `Drafter.retain`."""
        if not self._indices.keys() <= running:
            self._indices = {name: index for name, index in self._indices.items() if name in running}

    def _match(self, tokens: array[int], end: int) -> int:
        """How many tokens before `end` equal the last ones, `max_ngram` at most."""
        last = len(tokens)
        length = 0
        while length < min(self._max, end) and tokens[end - 1 - length] == tokens[last - 1 - length]:
            length += 1
        return length


def _repeated(tokens: array[int], end: int, count: int) -> tuple[int, ...]:
    """The `count` tokens that followed before `end`; what overlaps with the end goes on in circles."""
    period = len(tokens) - end
    return tuple(tokens[end + i % period] for i in range(count))


class _Index:
    """Where each n-gram of one length stood, in chains by hash."""

    def __init__(self, tokens: array[int], length: int) -> None:
        self._length = length
        self.num_tokens = len(tokens)
        hashes = _hashes(np.asarray(tokens, dtype=np.uint64), length)
        order = np.argsort(hashes, kind="stable")
        again = hashes[order[1:]] == hashes[order[:-1]]
        later, earlier = order[1:][again] + length, order[:-1][again] + length
        # hash → end of the n-gram's latest place; end → end of the place before
        self._latest = dict(zip(hashes.tolist(), range(length, length + len(hashes)), strict=True))
        self._before = dict(zip(later.tolist(), earlier.tolist(), strict=True))

    def extend(self, tokens: array[int]) -> None:
        """Takes in tokens added since the last call."""
        for end in range(max(self.num_tokens + 1, self._length), len(tokens) + 1):
            key = _hash(tokens, end, self._length)
            if key in self._latest:
                self._before[end] = self._latest[key]
            self._latest[key] = end
        self.num_tokens = len(tokens)

    def candidates(self, tokens: array[int]) -> Iterator[int]:
        """Ends of earlier places of what may be the last n-gram (its hash is), latest first."""
        # `extend` has made the last n-gram itself the latest of its chain.
        end = self._before.get(len(tokens))
        for _ in range(_MAX_CANDIDATES):
            if end is None:
                return
            yield end
            end = self._before.get(end)


def _hash(tokens: array[int], end: int, length: int) -> int:
    key = 0
    for token_id in tokens[end - length : end]:
        key = (key * _PRIME + token_id) & _MASK
    return key


def _hashes(tokens: npt.NDArray[np.uint64], length: int) -> npt.NDArray[np.uint64]:
    """`_hash` of every n-gram, by its first token. [num_tokens - length + 1]"""
    count = max(0, len(tokens) - length + 1)
    keys = np.zeros(count, dtype=np.uint64)
    for i in range(length):
        keys = keys * np.uint64(_PRIME) + tokens[i : i + count]
    return keys
