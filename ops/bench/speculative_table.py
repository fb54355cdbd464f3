"""The table of `warmgate bench speculative --table`: fixed numbers of guesses, what theory expects of them, and what
they gave.

A step with K guesses, each right with probability a if the one before was, gives (1 - a^(K+1)) / (1 - a) tokens and
takes 1 + c·K plain steps; c is drafting and checking together. Where only a share s of the steps has guesses (prompt
lookup finds nothing to guess from), both are means over steps with and without.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass

from ops.bench.harness import Notice, Samples
from ops.bench.report import Report
from ops.bench.speculative import Speaking, Spoken, Workload
from replicas.engine.speculative.adaptive import expected_tokens
from replicas.engine.speculative.control import Fixed
from replicas.engine.speculative.speculator import Speculator

HEADER = ("method", "work", "K", "steps with guesses", "acceptance", "cost of a guess", "expected", "measured")


@dataclass(frozen=True, slots=True)
class Row:
    """One method on one workload with K guesses: see this module's words. `measured` and `expected` are speed-ups,
    `measured` the median, with `low` and `high`."""

    method: str
    workload: str
    num_drafts: int
    share: float
    acceptance: float
    cost: float
    expected: float
    measured: float
    low: float
    high: float

    @property
    def cells(self) -> list[str]:
        """For the table."""
        *first, measured, low, high = map(str, astuple(self))
        return [*first, f"{measured} ({low} to {high})"]

    @classmethod
    def of(cls, side: Speaking, work: Workload, num_drafts: int, pairs: Sequence[tuple[Spoken, Spoken]]) -> Row:
        """From pairs of (plain, with guesses)."""
        _, guessed = pairs[-1]
        num_right = sum(guessed.by_position)
        all_right = guessed.by_position[num_drafts - 1] if len(guessed.by_position) >= num_drafts else 0
        num_tested = num_right + guessed.num_drafts - all_right
        share = guessed.num_drafts / (guessed.num_steps * len(work.prompts))
        acceptance = num_right / num_tested if num_tested else 0.0
        slower = statistics.median(ours.step_s / plain.step_s for plain, ours in pairs)
        cost = max(0.0, slower - 1) / (share * num_drafts) if share else 0.0
        faster = [ours.tokens_per_s / plain.tokens_per_s for plain, ours in pairs]
        tokens = 1 - share + share * expected_tokens(acceptance, num_drafts)
        return cls(
            side.name,
            work.name,
            num_drafts,
            round(share, 3),
            round(acceptance, 3),
            round(cost, 3),
            round(tokens / (1 + share * cost * num_drafts), 3),
            round(statistics.median(faster), 3),
            round(min(faster), 3),
            round(max(faster), 3),
        )


@dataclass(frozen=True, slots=True)
class Asked:
    """Numbers of guesses, and pairs of measurements for each."""

    lengths: Sequence[int]
    num_pairs: int = 5


async def measure(plain: Speaking, guessing: Sequence[Speaking], asked: Asked, notice: Notice) -> list[Row]:
    """Every method on the workloads with one sequence, for every length."""
    rows: list[Row] = []
    await plain.start()
    for side in guessing:
        await side.start()
        speculator = side.core.speculator
        assert speculator is not None
        for work in (work for work in side.work if len(work.prompts) == 1):
            for num_drafts in asked.lengths:
                notice(f"{side.name}, {work.name}, {num_drafts} guesses")
                side.core.speculator = Speculator(speculator.drafter, Fixed(num_drafts))
                pairs = [(plain.speak(work), side.speak(work)) for _ in range(asked.num_pairs)]
                rows.append(Row.of(side, work, num_drafts, pairs))
        await side.stop()
    await plain.stop()
    return rows


async def run(plain: Speaking, guessing: Sequence[Speaking], asked: Asked, notice: Notice) -> Report:
    """Measures, and makes a table of it."""
    rows = [row.cells for row in await measure(plain, guessing, asked, notice)]
    title = f"Guesses of fixed number, expected and measured: {plain.model_dir.name}, float32, 1 thread"
    facts = {"tokens": {work.name: work.num_tokens for work in plain.work}}
    return Report(
        "speculative-table", title, Samples({}), facts=facts, tables=[(HEADER, rows)], repeats=asked.num_pairs
    )
