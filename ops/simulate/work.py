"""A request at a simulated replica, and what one event there brings."""

from __future__ import annotations

from dataclasses import dataclass, field
from math import inf

from ops.simulate.trace import TraceRequest
from replicas.engine.order import OrderKey


class Work:
    """A request at a replica; `tag` is whatever the sender recognises it by. Times in seconds, sizes in tokens.

    `num_expected`: what it would compute if it began now, `reach` the blocks that were found cached for that.
    `num_left`, `num_stored`, `num_private`: once it is admitted, prompt tokens to compute, blocks offered to others,
    tokens of KV held beside cached blocks.
    """

    __slots__ = ("arrival", "deadline_s", "due", "fair_tag", "fair_weight", "finish_step", "key", "not_before",
                 "num_cached", "num_expected", "num_left", "num_private", "num_stored", "number", "priority", "reach",
                 "request", "tag")  # fmt: skip

    def __init__(self, request: TraceRequest, tag: int, fair_tag: float = 0.0, priority: int = 0) -> None:
        self.request = request
        self.tag = tag
        self.fair_tag = fair_tag
        self.fair_weight = 1.0
        self.priority = priority
        self.deadline_s: float | None = None
        self.arrival = 0.0
        self.due = 0.0
        self.number = 0
        self.key: OrderKey = (0.0, 0.0, 0)
        self.not_before = -inf
        self.reach = 0
        self.num_expected = 0
        self.num_left = 0
        self.num_cached = 0
        self.num_stored = 0
        self.num_private = 0
        self.finish_step = 0


@dataclass(slots=True)
class Progress:
    """What one event brought: prompts that were admitted, requests with their first token, requests that ended."""

    at: float
    admitted: list[Work] = field(default_factory=list)
    first: list[Work] = field(default_factory=list)
    ended: list[Work] = field(default_factory=list)
