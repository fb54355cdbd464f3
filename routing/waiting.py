"""Who waits before whom at a replica, read off the sizes of its pending prompts: pure functions for the cost.

A replica tells its pending prompts as a histogram: bucket i holds the (number, tokens) of those with 2^i to 2^(i+1) - 1
uncached prompt tokens left, waiting or partly computed. The order that the replica really uses decides who of them goes
before a newcomer: under `shortest` those that are not longer, and of the longer ones those that have aged enough. Under
any other order all of them do (bands and deadlines are not in the sizes; foreign servers: first come), and nobody asks
for sizes.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection
from typing import TypeAlias

import msgspec

SHORTEST = "shortest"
"""The order that goes by size."""

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


class Pending(msgspec.Struct, frozen=True):
    """A replica's pending prompts as `shortest` orders them, prepared once so that each question is two bisections.

    `means`: mean size of a prompt, by bucket that is not empty, rising; those longer than `alike` are one bucket of
    that size. `tokens`, `weights` (tokens x mean size) and `numbers` sum up the buckets before each, the last all of
    them. `apart`: how much shorter a newcomer must be to overtake everybody of a size. `excess`: the tokens that the
    last bucket has more than its prompts would at the size `alike`.
    """

    alike: float = 0.0
    apart: float = 0.0
    means: tuple[float, ...] = ()
    tokens: tuple[int, ...] = (0,)
    weights: tuple[float, ...] = (0.0,)
    numbers: tuple[int, ...] = (0,)
    excess: float = 0.0

    def ahead_and_behind(self, own_tokens: int) -> tuple[float, float]:
        """Pending tokens computed before the first of a newcomer with `own_tokens` uncached ones, and the number of
        prompts that would wait for it.

        A prompt that is longer by d tokens (beyond `alike`, none is) is overtaken unless it came `STRETCH` x d tokens'
        time ago or earlier. Its age is not in the sizes: ages are taken to be spread evenly over the time in which the
        pending work gathered, which at a busy replica is the time it takes to compute. So of those longer by d, the
        part d / `apart` is too young to go first.
        """
        tokens = self.tokens
        if own_tokens >= self.alike:
            return float(tokens[-1]), 0.0
        means, numbers = self.means, self.numbers
        first = bisect_right(means, own_tokens)  # the first that is longer
        last = bisect_left(means, own_tokens + self.apart, first)  # the first that is longer by `apart`
        before = tokens[first]
        longer = tokens[last] - before
        too_young = (self.weights[last] - self.weights[first] - own_tokens * longer) / self.apart
        # The sum over those prompts of their size: their tokens, but for the bucket of the alike.
        sizes = longer - self.excess if last == len(means) else longer
        waiting = (sizes - own_tokens * (numbers[last] - numbers[first])) / self.apart
        return before + longer - too_young, numbers[-1] - numbers[last] + waiting


NOBODY = Pending()


def pending_of(sizes: Sizes) -> Pending:
    """The histogram, prepared."""
    num_tokens = num_prompts = 0
    squares = 0.0
    means: list[float] = []
    tokens, weights, numbers = [0], [0.0], [0]
    for number, in_bucket in sizes:
        if number:
            mean = in_bucket / number
            num_prompts += number
            num_tokens += in_bucket
            squares += in_bucket * mean
            means.append(mean)
            tokens.append(num_tokens)
            weights.append(squares)
            numbers.append(num_prompts)
    if not num_tokens:
        return NOBODY
    alike = LONG_SHARE * squares / num_tokens
    num_shorter = bisect_left(means, alike)
    num_alike = num_prompts - numbers[num_shorter]
    tokens_alike = num_tokens - tokens[num_shorter]
    return Pending(
        alike,
        num_tokens / STRETCH,
        (*means[:num_shorter], alike),
        (*tokens[: num_shorter + 1], num_tokens),
        (*weights[: num_shorter + 1], weights[num_shorter] + tokens_alike * alike),
        (*numbers[: num_shorter + 1], num_prompts),
        tokens_alike - num_alike * alike,
    )


def bucket_of(num_tokens: int) -> int:
    """The bucket of a prompt with `num_tokens` >= 1 tokens left."""
    return num_tokens.bit_length() - 1


def merged(sizes: Sizes, more: Collection[int]) -> Sizes:
    """The histogram with prompts of `more` tokens each added."""
    if not more:
        return sizes
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
