"""What a sweep leaves in its folder: profiles, report, pictures."""

from __future__ import annotations

import os
from pathlib import Path

from ops.tune.best import write_best
from ops.tune.errors import TuneError
from ops.tune.plot import plot
from ops.tune.report import BEST_FILE, OTHER_FILE, Report
from ops.tune.setup import Prepared


def write_all(prepared: Prepared, folder: Path) -> Report:
    """Report and pictures, then the best profile of each engine: `best.yaml` of the profile's own, `best-ENGINE.yaml`
    of the one beside it. Raises TuneError when nothing could be measured; the report then says why."""
    sweep = prepared.sweep
    report = Report(prepared.profile, sweep.plan, sweep.sides, sweep.stopped, prepared.notes)
    try:
        (folder / "report.md").write_text(report.markdown(), encoding="utf-8")
    except OSError as error:
        raise TuneError(f"{folder}: {error}") from error
    plot(sweep.sides, sweep.plan, folder)
    for side in sweep.sides:
        name = BEST_FILE if side is sweep.sides[0] else OTHER_FILE.format(side.name)
        if side.search.best is not None:
            write_best(report, side, folder / name, os.environ)
    if not any(side.search.best for side in sweep.sides):
        reasons = [outcome.reason for side in sweep.sides for outcome in side.search.outcomes]
        why = f", first {reasons[0]}" if reasons else ": it was stopped too early"
        raise TuneError(f"no candidate could be measured{why}")
    return report
