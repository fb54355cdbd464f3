"""What `warmgate quantize-report` found: as a table, as a JSON object, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ops.errors import OperationError
from ops.quality import Ledger, Subject, accuracy, perplexity, speed


class ReportError(OperationError):
    """The report could not be made. One line."""


@dataclass(frozen=True, slots=True)
class Row:
    """One subject's figures; None is what has not been measured yet."""

    name: str
    weight_bytes: float | None
    kv_bytes_per_token: float | None
    tokens_per_s: float | None
    perplexity: float | None
    num_tokens: int
    accuracy: float | None
    num_questions: int

    @classmethod
    def of(cls, ledger: Ledger, subject: Subject) -> Row:
        fast, nats, right = speed(ledger, subject), perplexity(ledger, subject), accuracy(ledger, subject)
        return cls(
            name=subject.name,
            weight_bytes=None if fast is None else fast["weight_bytes"],
            kv_bytes_per_token=None if fast is None else fast["kv_bytes"],
            tokens_per_s=None if fast is None else fast["tokens_per_s"],
            perplexity=None if nats is None else nats[0],
            num_tokens=0 if nats is None else nats[1],
            accuracy=None if right is None else right[0],
            num_questions=0 if right is None else right[1],
        )


def as_json(rows: Sequence[Row], failed: dict[str, str]) -> dict[str, Any]:
    """Everything, with ratios to the first row."""
    found = [{name: getattr(row, name) for name in Row.__dataclass_fields__} | _ratios(row, rows[0]) for row in rows]
    return {"benchmark": "quantize-report", "baseline": rows[0].name, "rows": found, "failed": failed}


def as_table(rows: Sequence[Row]) -> str:
    """A Markdown table; what is not there yet is a dash."""
    head = ("scheme", "weights MB", "KV B/token", "tok/s", "× first", "perplexity", "loss", "tokens", "right", "asked")
    lines = [head, tuple("---" if i == 0 else "--:" for i in range(len(head)))]
    for row in rows:
        ratios = _ratios(row, rows[0])
        lines.append(
            (
                row.name,
                _number(None if row.weight_bytes is None else row.weight_bytes / 1e6, ".1f"),
                _number(row.kv_bytes_per_token, ",.0f"),
                _number(row.tokens_per_s, ".1f"),
                _number(ratios["speed_ratio"], ".2f"),
                _number(row.perplexity, ".3f"),
                _number(ratios["perplexity_loss"], "+.2%"),
                f"{row.num_tokens:,}",
                _number(row.accuracy, ".1%"),
                str(row.num_questions),
            )
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def plot(rows: Sequence[Row], path: Path) -> None:
    """Perplexity against memory and against speed, a point a scheme. Raises ReportError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    FigureCanvasAgg(figure)
    memory, rate = figure.subplots(1, 2, sharey=True)
    for row in rows:
        if row.perplexity is None or row.weight_bytes is None or row.tokens_per_s is None:
            continue
        for axes, x in ((memory, row.weight_bytes / 1e6), (rate, row.tokens_per_s)):
            axes.plot([x], [row.perplexity], marker="o")
            axes.annotate(row.name, (x, row.perplexity), xytext=(4, 3), textcoords="offset points", fontsize="small")
    memory.set(xlabel="weights, MB", ylabel="perplexity")
    rate.set(xlabel="tokens a second, one request")
    for axes in (memory, rate):
        axes.grid(alpha=0.3)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise ReportError(f"{path}: {error}") from error


def _ratios(row: Row, first: Row) -> dict[str, float | None]:
    """Losses are compared only where both were scored on the same tokens."""
    is_alike = row.num_tokens == first.num_tokens
    return {
        "speed_ratio": _quotient(row.tokens_per_s, first.tokens_per_s),
        "memory_ratio": _quotient(row.weight_bytes, first.weight_bytes),
        "perplexity_loss": None
        if row.perplexity is None or first.perplexity is None or not is_alike
        else row.perplexity / first.perplexity - 1,
    }


def _quotient(one: float | None, other: float | None) -> float | None:
    return None if one is None or not other else one / other


def _number(value: float | None, form: str) -> str:
    return "–" if value is None else format(value, form)
