"""What a sweep says at its end: engines side by side, every candidate, two pictures, one JSON object."""

from __future__ import annotations

import datetime
import shlex
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from rich.console import Console

from ops.bench.load_spec import Quantiles
from ops.bench.report import TextTable, command_line, describe_machine, markdown_table, package_versions, rich_table
from ops.tune.findings import Run
from ops.tune.search import Outcome
from ops.tune.sweep import Plan, Side, Stopped, ms

ENGINES = ("engine", "values", "requests/s in time", "output tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99",
           "all at once: output tokens/s")  # fmt: skip
CANDIDATES = ("values", "requests/s in time", "output tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99",
              "all at once: output tokens/s")  # fmt: skip
BEST_FILE, OTHER_FILE = "best.yaml", "best-{}.yaml"
LATENCY_PICTURE, THROUGHPUT_PICTURE = "latency.png", "throughput.png"

SHORT_S = 5.0


@dataclass(frozen=True, slots=True)
class Report:
    """`profile`: its name; `notes`: sentences a reader needs, such as why nothing is compared."""

    profile: str
    plan: Plan
    sides: Sequence[Side]
    stopped: Stopped = ""
    notes: Sequence[str] = ()
    command: Sequence[str] = field(default_factory=lambda: command_line(sys.argv))
    date: datetime.date = field(default_factory=datetime.date.today)

    def engines(self) -> TextTable:
        """The best of each engine, and what its profile's own values come to."""
        rows = []
        for side in self.sides:
            best = side.search.best
            first = next(iter(side.search.outcomes), None)
            for outcome, mark in ((first, ""), (best, " **best**")):
                if outcome is not None and not (mark == "" and outcome is best):
                    rows.append([f"{side.name}{mark}", side.subject.named(outcome.values), *cells(outcome)])
        return ENGINES, rows

    def candidates(self, side: Side) -> TextTable:
        """Everything that was tried, the best first."""
        best = side.search.best
        ranked = sorted(side.search.outcomes, key=lambda outcome: (outcome is not best, _rank(outcome)))
        rows = [[side.subject.named(outcome.values), *cells(outcome)] for outcome in ranked]
        return CANDIDATES, rows

    def markdown(self) -> str:
        versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
        slo, workload = self.plan.slo, self.plan.workload
        parts = [
            f"# Tuning {self.profile}",
            f"{self.date.isoformat()}, {describe_machine()}; {versions}.",
            f"```\n{shlex.join(self.command)}\n```",
            f"Workload: {workload}{self._measured_tokens()}. In time: {slo}.",
            *(f"**{line}**" for line in self._stops()),
            "## Engines side by side",
            markdown_table(*self.engines()),
            "Latencies are those at the rate in the third column, from when a request was meant to be sent. *All at "
            "once* is the closed loop: every request at the start, so the most the replicas do.",
            f"![Latency against request rate]({LATENCY_PICTURE})",
            f"![Throughput of every candidate]({THROUGHPUT_PICTURE})",
        ]
        for side in self.sides:
            parts += [f"## Candidates of {side.name}", markdown_table(*self.candidates(side))]
            parts += [f"- {line}" for line in (*edges(side), *doubts(side, self.plan))]
        parts += [f"- {note}" for note in self.notes]
        return "\n\n".join(parts) + "\n"

    def show(self, console: Console) -> None:
        header, rows = self.engines()
        plain = [[cell.replace("**", "") for cell in row] for row in rows]
        console.print(rich_table(f"{self.profile}: {self.plan.workload}", header, plain))
        for line in [*self._stops(), *self.notes]:
            console.print(f"• {line}", style="dim", markup=False, soft_wrap=True)

    def as_json(self) -> dict[str, Any]:
        return {
            "command": "tune",
            "profile": self.profile,
            "date": self.date.isoformat(),
            "machine": describe_machine(),
            "versions": package_versions(),
            "workload": self.plan.workload.as_json(),
            "slo": self.plan.slo.as_json(),
            "stopped": self.stopped or None,
            "engines": [_side_json(side, self.plan) for side in self.sides],
            "notes": list(self.notes),
        }

    def json_line(self) -> str:
        return msgspec.json.encode(self.as_json()).decode()

    def _stops(self) -> Iterator[str]:
        if self.stopped == "time":
            yield f"The {self.plan.minutes:g} minutes were over before everything was tried: the same command goes on."
        elif self.stopped == "interrupted":
            yield "Interrupted before everything was tried: the same command goes on."
        for side in self.sides:
            if side.search.best is not None and not meets(side.search.best):
                yield f"{side.name}: no candidate met the SLO at any rate; the best is the one with most throughput."

    def _measured_tokens(self) -> str:
        """What the replicas counted, which is what was really asked."""
        runs = [run for side in self.sides for run in runs_of(side) if run.num_ok]
        if not runs:
            return ""
        num = sum(run.num_ok for run in runs)
        prompt, cached = (sum(getattr(r, f"num_{what}_tokens") for r in runs) / num for what in ("prompt", "cached"))
        return f" (counted by the replicas: {prompt:.1f} tokens a prompt, {cached:.1f} of them from the prefix cache)"


def meets(outcome: Outcome) -> bool:
    return outcome.capacity is not None and outcome.capacity.rung is not None


def runs_of(side: Side) -> list[Run]:
    """All of a side's runs."""
    found = [o.capacity for o in side.search.outcomes if o.capacity is not None]
    return [run for capacity in found for run in (capacity.closed, *capacity.runs)]


def cells(outcome: Outcome) -> list[str]:
    """A candidate's figures at its best rate; of one that was left there, what is known."""
    found = outcome.capacity
    if found is None:
        return [f"failed: {outcome.reason}", *[""] * 6]
    closed = f"{found.closed.output_tokens_per_s:.1f}"
    if found.best is None or found.best.rate is None:
        return [_missed(outcome), *[""] * 5, closed]
    best = found.best
    quantiles = (best.ttft.p50, best.ttft.p99, best.tpot.p50, best.tpot.p99)
    return [f"{best.rate:.3g}", f"{best.output_tokens_per_s:.1f}", *map(ms, quantiles), closed]


def _missed(outcome: Outcome) -> str:
    found = outcome.capacity
    assert found is not None
    if not found.is_bound:
        return "none"
    return f"< {found.runs[0].rate:.3g}" if found.runs else "saturated too early"


def _rank(outcome: Outcome) -> float:
    found = outcome.capacity
    if found is None:
        return float("inf")
    return -1e6 - found.rung if found.rung is not None else -found.closed.requests_per_s


def edges(side: Side) -> Iterator[str]:
    """Where more could be found: the best value is the largest or smallest that was tried."""
    best = side.search.best
    if best is None:
        return
    for name, values in side.space.items():
        numbers = sorted(value for value in values if value is not None)
        chosen = best.values[name]
        if chosen is None or len(numbers) < 2 or chosen == values[0]:
            continue
        if chosen in (numbers[0], numbers[-1]):
            end = "smallest" if chosen == numbers[0] else "largest"
            yield f"`{name}`: {chosen:g} was the {end} value tried; `--sweep {name}=…` tries others."


def doubts(side: Side, plan: Plan) -> Iterator[str]:
    """What the figures cannot tell."""
    best = side.search.best
    if best is None or best.capacity is None:
        return
    found = best.capacity
    if found.closed.wall_s < SHORT_S:
        yield (
            f"All {plan.workload.num_requests} requests at once took {found.closed.wall_s:.1f} s, too short for "
            "a queue to build up: more `--requests` would tell more."
        )
    if found.best is None or found.rung is None:
        return
    if found.best is found.runs[-1] and not plan.workload.rates:
        yield "The SLO did not bind: the highest rate below saturation was still in time."
    first = side.search.outcomes[0].capacity
    if first is not None and first.rung is not None and found.rung - first.rung == 1 and not plan.workload.rates:
        yield "The best is one step of the ladder (9 %) above the profile's own values: about what repeats differ by."
    if side.again is not None:
        met_before = first is not None and first.rung is not None and first.rung >= found.rung
        yield _second_look(side.again, plan, "met" if met_before else "missed")
    at_once = found.best.mean_under_way / side.subject.group.replicas
    yield (
        f"At the best rate {at_once:.1f} requests were under way at once in a replica on average: a `max_num_seqs` far "
        "above that changes little but noise."
    )


def _second_look(again: Run, plan: Plan, before: Literal["met", "missed"]) -> str:
    """`before`: what the same did with this rate at the beginning."""
    words = (
        f"Measured once more at the end, the profile's own values had {again.share_in_time(plan.slo):.0%} of requests "
        f"in time at {again.rate:.3g} requests/s, the best one's rate"
    )
    if not again.meets(plan.slo):
        noise = "it was met at the beginning, so the machine differs more than the candidates do"
        luck = "the best one's own luck was not tried again"
        return f"{words}: {f'a difference, as far as one look tells ({luck})' if before == 'missed' else noise}."
    return f"{words}: so they meet it too, and the difference is the machine's or chance, not the knobs'."


def _side_json(side: Side, plan: Plan) -> dict[str, Any]:
    best = side.search.best
    found = None if best is None else best.capacity
    return {
        "engine": side.name,
        "finished": side.finished,
        "candidates": len(side.search.outcomes),
        "failed": sum(outcome.capacity is None for outcome in side.search.outcomes),
        "values": None if best is None else dict(best.values),
        "saturation_requests_per_s": None if found is None else round(found.closed.requests_per_s, 4),
        "saturation_output_tokens_per_s": None if found is None else round(found.closed.output_tokens_per_s, 2),
        "best": None if found is None or found.best is None else run_json(found.best),
        "profile_again_in_time": None if side.again is None else side.again.share_in_time(plan.slo),
    }


def run_json(run: Run) -> dict[str, Any]:
    """A run's figures, milliseconds rounded to a tenth."""

    def in_ms(found: Quantiles) -> dict[str, float | None]:
        return {
            name: None if value is None else round(1000 * value, 1)
            for name, value in (("p50", found.p50), ("p99", found.p99))
        }

    return {
        "requests_per_s": run.rate,
        "output_tokens_per_s": round(run.output_tokens_per_s, 2),
        "ttft_ms": in_ms(run.ttft),
        "tpot_ms": in_ms(run.tpot),
    }
