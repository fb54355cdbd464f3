"""`warmgate doctor`: what on this machine would keep a profile from being served, and what to do about it.

Each check is a function of the `Patient` that yields findings; `ops.checks` holds them. A check never raises for
something that is wrong with the machine: that is a finding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

from configs.errors import ConfigError
from configs.load import Profile
from configs.runtime import home_dir

if TYPE_CHECKING:
    from rich.console import Console

Status: TypeAlias = Literal["ok", "warn", "fail"]
_ORDER: tuple[Status, ...] = ("ok", "warn", "fail")
_STYLE = {"ok": "green", "warn": "yellow", "fail": "red"}


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the table. `advice`: what to do, empty when nothing need be done."""

    check: str
    status: Status
    detail: str
    advice: str = ""


@dataclass(frozen=True, slots=True)
class Patient:
    """What is examined: a profile on this machine. `gpu_gib`: on cards of that size, instead of those that are here."""

    profile: Profile
    home: Path
    env: Mapping[str, str]
    gpu_gib: float | None = None


Check: TypeAlias = Callable[[Patient], Iterable[Finding]]


def diagnose(
    name: str, load: Callable[[], Profile], env: Mapping[str, str], gpu_gib: float | None = None
) -> list[Finding]:
    """Runs every check on a profile; without a usable profile only those of the machine. `gpu_gib`: see `Patient`."""
    from ops import checks

    findings = [finding for check in checks.MACHINE for finding in check()]
    try:
        profile = load()
    except ConfigError as error:
        return [*findings, Finding("config", "fail", str(error), "correct the profile, then run this again")]
    num = len(profile.config.groups)
    findings.append(Finding("config", "ok", f"{name}: {num} {'group' if num == 1 else 'groups'}, no contradiction"))
    patient = Patient(profile, home_dir(env), env, gpu_gib)
    return [*findings, *_examined(patient, checks.PROFILE)]


def _examined(patient: Patient, checks: Sequence[Check]) -> Iterator[Finding]:
    for check in checks:
        yield from check(patient)


def worst(findings: Sequence[Finding]) -> Status:
    """The gravest status among the findings."""
    return max((finding.status for finding in findings), key=_ORDER.index, default="ok")


def to_json(findings: Sequence[Finding]) -> str:
    """`{"status": …, "findings": [{"check", "status", "detail", "advice"}, …]}`."""
    return json.dumps({"status": worst(findings), "findings": [asdict(finding) for finding in findings]}, indent=2)


def render(findings: Sequence[Finding], console: Console) -> None:
    """A table, then one line that sums up."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("check", no_wrap=True)
    table.add_column("", no_wrap=True)
    table.add_column("found", overflow="fold")
    for finding in findings:
        found = Text(finding.detail)
        if finding.advice:
            found.append(f"\n→ {finding.advice}", style="dim")
        table.add_row(finding.check, Text(finding.status, style=_STYLE[finding.status]), found)
    console.print(table)
    counts = {status: sum(finding.status == status for finding in findings) for status in _ORDER}
    console.print(f"\n{counts['ok']} ok, {counts['warn']} to mind, {counts['fail']} failed", style="bold")
