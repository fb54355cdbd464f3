"""What a drafter may do wrong, and whom it is not asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from typing import cast

import pytest

from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, Sequence, StepResult
from replicas.engine.speculative.control import Fixed
from replicas.engine.speculative.drafter import Guess, Wish
from replicas.engine.speculative.speculator import Speculator
from replicas.engine.structured.grammar import Grammar
from tests.replicas.engine_kit import make_kit, make_request


class Failing:
    """Guesses nonsense, and fails in one of its methods when it is called for the third time."""

    is_settled = True

    def __init__(self, where: str) -> None:
        self.asked: list[list[str]] = []
        self.retained: frozenset[str] = frozenset()
        self._where = where
        self._num_calls = 0

    def draft(self, wishes: Rows[Wish]) -> Mapping[str, Guess]:
        self.asked.append([wish.seq.request_id for wish in wishes])
        self._called("draft")
        return {wish.seq.request_id: Guess(Drafts.chain([97] * wish.max_drafts)) for wish in wishes}

    def observe(self, plan: Plan, result: StepResult) -> None:
        self._called("observe")

    def retain(self, running: frozenset[str]) -> None:
        self.retained = running
        self._called("retain")

    def _called(self, where: str) -> None:
        self._num_calls += where == self._where
        if self._num_calls == 3:
            raise ZeroDivisionError("a bug")


@pytest.mark.parametrize("where", ["draft", "observe", "retain"])
def test_a_drafter_that_fails_is_not_asked_again_and_nobody_else_notices(
    where: str, caplog: pytest.LogCaptureFixture
) -> None:
    kit, drafter = make_kit(), Failing(where)
    kit.core.speculator = Speculator(drafter, Fixed(3))
    wanted = [make_request(f"r{i}", range(i + 2), max_tokens=20, seed=i) for i in range(2)]
    for request in wanted:
        kit.add(request)
    with caplog.at_level(logging.ERROR):
        kit.run()
    for request in wanted:
        assert kit.tokens(request.request_id) == kit.expected(request)
    assert kit.core.dead is None and len(drafter.asked) <= 3
    (record,) = caplog.records
    assert "goes on without guesses" in record.message and record.exc_info is not None
    caplog.clear()


class Bearing:
    """As much of a grammar as is looked at."""

    def __init__(self, bears_guesses: bool) -> None:
        self.bears_guesses = bears_guesses


def test_no_guesses_are_asked_for_behind_which_masks_are_too_dear() -> None:
    drafter = Failing("never")
    running = [Sequence.from_request(make_request(name, [1, 2]), 0.0) for name in ("free", "cheap", "dear")]
    for seq, bears in zip(running[1:], (True, False), strict=True):
        seq.grammar = cast(Grammar, Bearing(bears))
    drafts = Speculator(drafter, Fixed(2)).draft(running)
    assert drafter.asked == [["free", "cheap"]] and set(drafts) == {"free", "cheap"}
    assert drafter.retained == {"free", "cheap", "dear"}, "it is asked for again"
