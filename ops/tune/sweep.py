"""Sweeps the engines one after the other, within a time, telling what it does; stopped at any moment it keeps what it
has found."""

from __future__ import annotations

import asyncio
import hashlib
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import msgspec

from ops.bench.load_spec import LoadResult
from ops.bench.report import describe_machine, package_versions
from ops.progress import Progress, Step
from ops.tune.capacity import Capacity, Grid, Ladder, Stated, capacity
from ops.tune.errors import TrialError
from ops.tune.findings import Failure, Findings, Rate, Run, Values, key_of
from ops.tune.search import Outcome, Search, Space
from ops.tune.subject import Subject
from ops.tune.trial import Place, Trial
from ops.tune.workload import Slo, Workload

FIRST_SHARE = 0.6
"""Of the time, for the profile's own engine where another is compared with it; what it leaves is the other's."""

Stopped: TypeAlias = Literal["", "time", "interrupted"]
"""Why a sweep ended before it was done."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is looked for and how. `grid`: every combination instead of knob after knob. `minutes`: for everything."""

    workload: Workload
    slo: Slo
    minutes: float
    grid: bool = False

    @property
    def ladder(self) -> Ladder:
        rates = self.workload.rates
        return Stated(tuple(sorted(set(rates)))) if rates else Grid()


@dataclass(slots=True)
class Side:
    """One engine's part of the sweep. `finished`: its search went to its end. `again`: the profile's own values once
    more, at the rate that the best met."""

    subject: Subject
    space: Space
    search: Search = field(init=False)
    finished: bool = False
    again: Run | None = None

    def __post_init__(self) -> None:
        self.search = Search(self.space, self.subject.is_possible)

    @property
    def name(self) -> str:
        return self.subject.group.engine.kind


@dataclass(slots=True)
class Sweep:
    """Runs all sides. Read `sides` and `stopped` afterwards. `clock` in seconds."""

    plan: Plan
    sides: list[Side]
    findings: Findings
    place: Place
    progress: Progress
    clock: Callable[[], float] = time.monotonic
    stopped: Stopped = ""
    _spent: list[float] = field(default_factory=list)

    def run(self) -> None:
        """Until all is found, the time is over, or SIGINT or SIGTERM comes (a second SIGINT: KeyboardInterrupt)."""
        asyncio.run(self._until_told())

    async def _until_told(self) -> None:
        loop = asyncio.get_running_loop()
        work = asyncio.ensure_future(self._all(loop.time() + 60 * self.plan.minutes))

        def stop() -> None:
            for number in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(number)
            self.progress.say("stopping: what was found is kept")
            work.cancel()

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop)
        try:
            await work
        except asyncio.CancelledError:
            self.stopped = "interrupted"

    async def _all(self, end: float) -> None:
        loop = asyncio.get_running_loop()
        for i, side in enumerate(self.sides):
            is_last = i == len(self.sides) - 1
            until = end if is_last else loop.time() + FIRST_SHARE * (end - loop.time())
            part = SidePart(self, side, until)
            side.finished = await _within(part.work(), until)
            if not side.finished:
                self.stopped = "time"
                self.progress.say(f"{side.name}: the time is over, what was found is kept")

    def expected_s(self, num_candidates: int, until: float) -> float:
        """How much longer so many candidates will take, as far as earlier ones tell; never beyond the end."""
        left_s = max(0.0, until - asyncio.get_running_loop().time())
        if not self._spent:
            return left_s
        return min(left_s, num_candidates * sum(self._spent) / len(self._spent))

    def note_spent(self, seconds: float) -> None:
        self._spent.append(seconds)


async def _within(work: Coroutine[Any, Any, None], until: float) -> bool:
    """Whether it came to its end by then (time of the loop)."""
    try:
        async with asyncio.timeout_at(until):
            await work
    except TimeoutError:
        return False
    return True


@dataclass(slots=True)
class SidePart:
    """Measures the candidates of one side, or finds what was measured before."""

    sweep: Sweep
    side: Side
    until: float
    _situation: str = field(init=False)

    def __post_init__(self) -> None:
        self._situation = situation_of(self.side.subject, self.sweep.plan.workload)

    async def work(self) -> None:
        """The search, then a look at whether the machine has changed meanwhile."""
        search = self.side.search
        await (search.everywhere if self.sweep.plan.grid else search.along_knobs)(self.evaluate)
        best = search.best
        if best is None or best.capacity is None or key_of(best.values) == key_of(search.base):
            return
        if best.capacity.best is not None:
            self.side.again = await self._again(best.capacity.best.rate)

    async def _again(self, rate: Rate) -> Run | None:
        """The profile's own values at that rate, freshly started; None where they do not run."""
        sweep, values = self.sweep, self.side.search.base
        if sweep.findings.failure(self._situation, values) is not None:
            return None
        found = sweep.findings.run(self._situation, values, rate, repeat=1)
        if found is not None:
            return found
        try:
            with sweep.progress.step(f"{self.side.name} again") as step:
                step.note = f"{self.side.subject.named(values)}: {rate:g} requests/s"
                async with Trial(self.side.subject.alone(values), sweep.plan.workload, sweep.place) as trial:
                    result = await trial.measure(rate)
                found = msgspec.structs.replace(self._run(values, rate, result), repeat=1)
                step.tell(f"{step.note}, {found.share_in_time(sweep.plan.slo):.0%} in time")
        except TrialError:
            return None
        sweep.findings.add(found)
        return found

    async def evaluate(self, values: Values, to_beat: int | None) -> Outcome:
        """A `search.Evaluate`."""
        side, sweep = self.side, self.sweep
        number, expected = len(side.search.outcomes) + 1, side.search.num_expected(grid=sweep.plan.grid)
        name = side.subject.named(values)
        try:
            with sweep.progress.step(f"{side.name} {number}/{max(number, expected)}") as step:
                step.note = name
                found = await self._capacity(values, to_beat, step)
                step.tell(f"{name}: {in_words(found)}{self._to_go(expected - number)}")
        except TrialError as error:
            return Outcome(values, reason=str(error))
        return Outcome(values, found)

    async def _capacity(self, values: Values, to_beat: int | None, step: Step) -> Capacity:
        sweep, name, began = self.sweep, step.note, self.sweep.clock()
        known = sweep.findings.failure(self._situation, values)
        if known is not None:
            step.note = f"{name}: {known.reason} (found before)"
            raise TrialError(known.reason)
        async with Trial(self.side.subject.alone(values), sweep.plan.workload, sweep.place) as trial:

            async def measure(rate: Rate) -> Run:
                step.tell(f"{name}: {'all at once' if rate is None else f'{rate:g} requests/s'}")
                found = sweep.findings.run(self._situation, values, rate)
                if found is None:
                    found = self._run(values, rate, await trial.measure(rate))
                    sweep.findings.add(found)
                return found

            try:
                found = await capacity(measure, sweep.plan.slo, sweep.plan.ladder, to_beat)
            except TrialError as error:
                digest = hashlib.sha256(key_of(values).encode()).hexdigest()[:8]
                trial.keep_log(f"failed-{self.side.name}-{digest}")
                step.note = f"{name}: {error}"
                sweep.findings.add(
                    Failure(situation=self._situation, engine=self.side.name, values=dict(values), reason=str(error))
                )
                raise
            if trial.started:  # what was found before took no time
                sweep.note_spent(sweep.clock() - began)
        return found

    def _run(self, values: Values, rate: Rate, result: LoadResult) -> Run:
        return Run(
            situation=self._situation,
            engine=self.side.name,
            values=dict(values),
            rate=rate,
            wall_s=result.wall_s,
            num_output_tokens=result.num_tokens,
            num_prompt_tokens=result.num_prompt_tokens,
            num_cached_tokens=result.num_cached_tokens,
            num_rejected=result.num_rejected,
            timings=result.timings,
        )

    def _to_go(self, num_candidates: int) -> str:
        if num_candidates <= 0:
            return ""
        seconds = self.sweep.expected_s(num_candidates, self.until)
        words = f"{seconds / 60:.0f} min" if seconds >= 90 else f"{seconds:.0f} s"
        return f"  [about {words} to go with {self.side.name}]"


def in_words(found: Capacity) -> str:
    """What came of a candidate, in half a line."""
    if found.best is not None and found.best.rate is not None:
        ttft, tpot = found.best.ttft, found.best.tpot
        return (
            f"{found.best.rate:g} requests/s in time, TTFT p50 {ms(ttft.p50)} p99 {ms(ttft.p99)}, "
            f"TPOT p50 {ms(tpot.p50)} p99 {ms(tpot.p99)}"
        )
    saturated = f"saturated at {found.closed.requests_per_s:.3g} requests/s"
    return f"not better ({saturated})" if found.is_bound else f"no rate in time ({saturated})"


def ms(seconds: float | None) -> str:
    """Milliseconds; a dash where the quantile is of requests without an answer."""
    return "-" if seconds is None else f"{1000 * seconds:.0f} ms"


def situation_of(subject: Subject, workload: Workload) -> str:
    """A digest of all that figures depend on besides knobs and rate: profile, workload, versions, machine."""
    what = [subject.fixed(), workload.as_json(), package_versions(), describe_machine()]
    return hashlib.sha256(msgspec.json.encode(what, order="sorted")).hexdigest()[:16]
