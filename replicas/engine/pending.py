"""The prompts that an engine has yet to compute, waiting or begun: by size, and by tenant. O(1) a change."""

from __future__ import annotations

from collections.abc import Iterator

from replicas.engine.order import finish_tag
from replicas.engine.sequence import Sequence


class PendingPrompts:
    """Counts prompts under the tokens they have left. Bucket i of `sizes` holds those with 2^i to 2^(i+1) - 1."""

    def __init__(self) -> None:
        self.num_tokens = 0
        self._numbers: list[int] = []
        self._tokens: list[int] = []
        self._sizes: tuple[tuple[int, int], ...] | None = ()
        self._lines: dict[str, dict[str, Sequence]] = {}

    @property
    def sizes(self) -> tuple[tuple[int, int], ...]:
        """(number, tokens) by bucket, trailing empty ones left out."""
        if self._sizes is None:
            length = len(self._numbers)
            while length and not self._numbers[length - 1]:
                length -= 1
            self._sizes = tuple(zip(self._numbers[:length], self._tokens[:length], strict=True))
        return self._sizes

    def put(self, seq: Sequence, num_left: int) -> None:
        """Counts a prompt with that many tokens left: a new one, or one that has made progress; 0 takes it out."""
        counted = seq.standing.num_left
        if counted == num_left:
            return
        if counted:
            self._add(counted, -1)
        if num_left:
            self._add(num_left, 1)
            if not counted:
                self._lines.setdefault(seq.request.tenant, {})[seq.request_id] = seq
        elif counted:
            line = self._lines[seq.request.tenant]
            del line[seq.request_id]
            if not line:
                del self._lines[seq.request.tenant]
        seq.standing.num_left = num_left

    def rivals(self, seq: Sequence) -> Iterator[tuple[float, float]]:
        """(finish tag, due) of every pending prompt of other tenants in the same priority band."""
        tenant, priority = seq.request.tenant, seq.request.priority
        for other, line in self._lines.items():
            if other != tenant:
                for rival in line.values():
                    if rival.request.priority == priority:
                        standing = rival.standing
                        yield finish_tag(rival.request, standing.num_expected), standing.due

    def check(self, expected: dict[str, int]) -> None:
        """Asserts that just these prompts are counted, with these tokens left (by request id)."""
        members = {request_id: seq for line in self._lines.values() for request_id, seq in line.items()}
        assert {request_id: seq.standing.num_left for request_id, seq in members.items()} == expected
        assert self.num_tokens == sum(expected.values()) == sum(tokens for _, tokens in self.sizes)
        assert sum(number for number, _ in self.sizes) == len(expected)
        for bucket, (number, tokens) in enumerate(self.sizes):
            assert number << bucket <= tokens < max(1, number) << bucket + 1, f"{bucket=} {number=} {tokens=}"

    def _add(self, size: int, sign: int) -> None:
        bucket = size.bit_length() - 1
        missing = bucket + 1 - len(self._numbers)
        if missing > 0:
            self._numbers += [0] * missing
            self._tokens += [0] * missing
        self._numbers[bucket] += sign
        self._tokens[bucket] += sign * size
        self.num_tokens += sign * size
        self._sizes = None
