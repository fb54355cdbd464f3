"""Between the command line of `warmgate bench policies` and what it does: traces are read, progress is shown."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ops.bench import policies
from ops.bench.policies import Findings, Grid, Row, Work, Workload
from ops.bench.policies_report import PoliciesReport
from ops.bench.report import command_line
from ops.simulate.driver import policy_named
from routing.policies import POLICIES


def run(trace_files: Sequence[Path], findings_file: Path | None, options: Mapping[str, Any]) -> PoliciesReport:
    """Raises TraceError, SimulationError and BenchError."""
    for name in options["policies"]:
        policy_named(name)
    grid = Grid(
        replicas=options["replicas"],
        kv_tokens=options["kv_tokens"],
        policies=options["policies"] or tuple(POLICIES),
        tolerance=options["tolerance"],
    )
    findings = Findings.opened(findings_file)
    workloads = [Workload.read(path, options["head"]) for path in trace_files]
    with _progress(grid.num_cells(workloads)) as told:
        rows = policies.run(workloads, grid, findings, Work(options["workers"], told))
    facts = {"tolerance": grid.tolerance, "traces": {w.name: _described(w) for w in workloads}}
    return PoliciesReport(rows, command_line(sys.argv), facts)


def _described(workload: Workload) -> dict[str, Any]:
    trace = workload.trace
    return {
        "file": trace.name,
        "first requests": len(trace.requests),
        "prompt tokens": trace.num_prompt_tokens,
        "block tokens": trace.block_tokens,
        "notes": trace.notes,
    }


@contextmanager
def _progress(num_cells: int) -> Iterator[Callable[[Row], None]]:
    """A bar on a terminal's stderr, a line a cell elsewhere."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
               TimeRemainingColumn())  # fmt: skip
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("simulating", total=num_cells)

        def told(row: Row) -> None:
            key = row.key
            words = f"{key.trace} {key.num_replicas} x {key.kv_tokens} {key.policy} {key.order}: {row.capacity:.4g}"
            bar.update(task, advance=1, description=words)
            if not console.is_terminal:
                console.print(words, markup=False, highlight=False)

        yield told
