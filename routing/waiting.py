"""Who waits before whom at a replica, read off the sizes of its pending prompts: pure functions for the cost.

A replica tells its pending prompts as a histogram: bucket i holds the (number, tokens) of those with 2^i to 2^(i+1) - 1
uncached prompt tokens left, waiting or partly computed. The order that the replica really uses decides who of them goes
before a newcomer:

    any order but `shortest`   all of them (bands and deadlines are not in the sizes; foreign servers: first come)
    `shortest`                 those that are not longer, and of the longer ones those that have aged enough
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

STRETCH = 6.0
"""How long a prompt lets shorter ones overtake it, in units of its own prefill time, where the order is `shortest`.

This and `LONG_SHARE` were found by measurement, docs/decisions/0006-prefill-order.md.
"""

LONG_SHARE = 0.4
"""Prompts longer than this share of the replica's prompt scale are alike to `shortest`: first come, first served.

The scale is E[x²]/E[x] of prompt sizes x: the prompt in which a random token finds itself. Queues are about so long
where they form at all; so a long prompt's wait grows by a bounded part.
"""

Sizes: TypeAlias = tuple[tuple[int, int], ...]
"""(number, tokens) by power-of-two bucket; trailing empty buckets left out."""


def tokens_before(sizes: Sizes, own_tokens: int, order: str) -> float:
    """Pending prompt tokens that a replica computes before the first of a newcomer with `own_tokens` uncached ones."""
    return ahead_and_behind(sizes, own_tokens, order)[0]


def num_behind(sizes: Sizes, own_tokens: int, order: str) -> float:
    """How many of the pending prompts would wait for a newcomer. None where all of them go first: there only those who
    are still to come will wait for it."""
    return ahead_and_behind(sizes, own_tokens, order)[1]


def ahead_and_behind(sizes: Sizes, own_tokens: int, order: str) -> tuple[float, float]:
    """`tokens_before` and `num_behind` in one look.

    Under `shortest` a pending prompt that is longer by d tokens (beyond `LONG_SHARE` of the scale, none) is overtaken
    unless it came `STRETCH` × d tokens' time ago or earlier. Its age is not in the sizes: ages are taken to be spread
    evenly over the time in which the pending work gathered, which at a busy replica is the time it takes to compute.
    """
    pending = [pair for pair in sizes if pair[0]]
    total = 0
    squares = 0.0
    for number, tokens in pending:
        total += tokens
        squares += tokens * tokens / number
    if order != "shortest" or not total:
        return float(total), 0.0
    longest = LONG_SHARE * squares / total
    own = min(own_tokens, longest)
    per_token = STRETCH / total
    ahead = behind = 0.0
    for number, tokens in pending:
        too_young = (min(tokens / number, longest) - own) * per_token
        if too_young <= 0.0:
            ahead += tokens
        elif too_young >= 1.0:
            behind += number
        else:
            ahead += tokens * (1.0 - too_young)
            behind += number * too_young
    return ahead, behind


def bucket_of(num_tokens: int) -> int:
    """The bucket of a prompt with `num_tokens` >= 1 tokens left."""
    return num_tokens.bit_length() - 1


def merged(sizes: Sizes, more: Iterable[int]) -> Sizes:
    """The histogram with prompts of `more` tokens each added."""
    numbers, tokens = [n for n, _ in sizes], [t for _, t in sizes]
    for size in more:
        bucket = bucket_of(size)
        missing = bucket + 1 - len(numbers)
        if missing > 0:
            numbers += [0] * missing
            tokens += [0] * missing
        numbers[bucket] += 1
        tokens[bucket] += size
    return tuple(zip(numbers, tokens, strict=True))
