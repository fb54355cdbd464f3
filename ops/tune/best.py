"""Writes the best profile: the whole of it, fit to be served, with what was found in a comment at its top."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from configs.document import write_text
from configs.load import load_profile
from ops.bench.report import describe_machine, package_versions
from ops.tune.errors import TuneError
from ops.tune.findings import in_plain
from ops.tune.knobs import where
from ops.tune.report import Report, cells, meets
from ops.tune.search import Outcome
from ops.tune.subject import BY_NAME
from ops.tune.sweep import Side


def write_best(report: Report, side: Side, path: Path, env: Mapping[str, str] | None = None) -> None:
    """Writes the side's best candidate as a profile, and reads it again. Raises ConfigError, TuneError.

    Only its owner may read it: profiles can hold keys.
    """
    best = side.search.best
    assert best is not None, "there is a best"
    text = (
        "\n".join(f"# {line}" for line in _head(report, side, best)) + "\n" + write_text(side.subject.tree(best.values))
    )
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
            os.fchmod(file.fileno(), 0o600)  # it may have been there
            file.write(text)
    except OSError as error:
        raise TuneError(f"{path}: {error}") from error
    engine = load_profile(path, env or {}).config.groups[side.subject.group_index].engine
    other = [name for name, value in best.values.items() if BY_NAME[name].of(engine) != value]
    if other:
        raise TuneError(
            f"{path} is not what was measured as long as the environment sets {', '.join(other)}: WARMGATE_* wins over "
            "profiles; unset it and give --set instead"
        )


def _head(report: Report, side: Side, best: Outcome) -> list[str]:
    plan = report.plan
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    rate, tokens, ttft50, ttft99, tpot50, tpot99, closed = cells(best)
    figures = f"no rate in time; all at once {closed} output tokens/s"
    if meets(best):
        figures = (
            f"{rate} requests/s in time: {tokens} output tokens/s, TTFT p50 {ttft50} p99 {ttft99}, "
            f"TPOT p50 {tpot50} p99 {tpot99}; all at once {closed} output tokens/s"
        )
    return [
        f"{report.profile}, tuned by `warmgate tune` on {report.date.isoformat()} ({side.name}).",
        f"Workload: {plan.workload}.",
        f"In time: {plan.slo}.",
        f"Found: {figures}.",
        *(
            f"  {where(BY_NAME[name], side.subject.group_index)}: {in_plain(value)}"
            for name, value in best.values.items()
        ),
        f"Machine: {describe_machine()}; {versions}.",
    ]
