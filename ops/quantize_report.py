"""`warmgate quantize-report`: every scheme's memory, speed, perplexity and accuracy on a small task, beside bfloat16.

What is measured is kept in a file; a report that was stopped goes on where it was. Speeds are taken in visits, one
scheme after the other and all of them again, so that a machine that slows down slows all alike.
"""

from __future__ import annotations

import gc
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from configs.schema import EngineConfig
from ops.errors import OperationError
from ops.picture import check_can_plot
from ops.quality import (
    Engine,
    Ledger,
    Subject,
    has_quality,
    measure_perplexity,
    measure_quiz,
    measure_speed,
    windows,
)
from ops.quality_table import ReportError, Row, as_json, as_table, plot
from ops.quiz import Question, questions

if TYPE_CHECKING:
    import tokenizers

_COMMON: dict[str, Any] = {
    "kv_cache_gib": 0.25,
    "max_num_seqs": 8,
    "prefix_caching": False,
    "structured": False,
    "self_check": False,
}
_ON_THE_FLY: dict[str, dict[str, Any]] = {
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
    "int8 on loading": {"quantization": "int8"},
    "w8a8 on loading": {"quantization": "w8a8"},
    "fp8 on loading": {"quantization": "fp8"},
    "int4 on loading": {"quantization": "int4"},
    "nf4 on loading": {"quantization": "nf4"},
    "int8 cache": {"kv_cache_dtype": "int8"},
    "fp8 cache": {"kv_cache_dtype": "fp8"},
}
_METHODS = ("int8", "nf4", "gptq", "awq")
SCHEMES = (*_ON_THE_FLY, *_METHODS)
_AT_LEAST_1 = click.IntRange(min=1)
_PICTURE = "quantize-report.png"


@dataclass(slots=True)
class _Work:
    """What is to be measured on every subject, until `is_over`."""

    source: Path
    threads: int
    ledger: Ledger
    cut: Sequence[list[int]]
    asked: Sequence[Question]
    tokenizer: tokenizers.Tokenizer
    visits: int
    is_over: Callable[[], bool]
    say: Callable[[str], None]
    failed: dict[str, str] = field(default_factory=dict)


@click.command("quantize-report", short_help="Compare quantisation schemes on a model.")
@click.argument("model")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), default="quantize-report", show_default=True,
              help="Folder for results, the plot and the checkpoints that are made.")  # fmt: skip
@click.option("--scheme", "schemes", multiple=True, type=click.Choice(SCHEMES),
              help="Only these; more than once. [default: all]")  # fmt: skip
@click.option("--folder", "folders", multiple=True, type=click.Path(exists=True, file_okay=False, path_type=Path),
              help="A quantised checkpoint of the same model besides, such as one with a GGUF.")  # fmt: skip
@click.option("--tokens", type=_AT_LEAST_1, help="Of the text, for perplexity. [default: all, some 110,000]")
@click.option("--questions", "num_questions", type=_AT_LEAST_1, help="Of the quiz. [default: all, some 340]")
@click.option("--visits", type=_AT_LEAST_1, default=5, show_default=True, help="Measurements of each speed.")
@click.option("--minutes", type=click.FloatRange(0, min_open=True), help="Stop after these; call it again to go on.")
@click.option("--threads", type=_AT_LEAST_1, default=1, show_default=True)
def quantize_report(model: str, out: Path, schemes: tuple[str, ...], **options: Any) -> None:
    """Compare quantisation schemes on MODEL: memory, speed, perplexity, accuracy, each beside bfloat16.

    \b
    text   the reference of the Python language as pydoc carries it, in windows of 512 tokens
    task   four answers to choose from: HTTP statuses, system errors, media types

    \b
    warmgate quantize-report smollm2-135m
    warmgate quantize-report smollm2-135m --scheme bfloat16 --scheme awq --tokens 20000 --minutes 10
    """
    from configs.runtime import home_dir
    from configs.tokenizer import find_model, load_model_files
    from ops.texts import evaluation_text

    check_can_plot(out / _PICTURE)
    began = time.monotonic()
    minutes: float | None = options["minutes"]
    source = find_model(model, home_dir(os.environ))
    tokenizer = load_model_files(str(source.absolute()), source).tokenizer
    work = _Work(
        source=source,
        threads=options["threads"],
        ledger=Ledger.open(out / "results.jsonl"),
        cut=windows(evaluation_text(), tokenizer, options["tokens"]),
        asked=questions()[: options["num_questions"]],
        tokenizer=tokenizer,
        visits=options["visits"],
        is_over=lambda: minutes is not None and time.monotonic() - began > minutes * 60,
        say=lambda words: click.echo(words, err=True),
    )
    subjects = list(_subjects(source, out, schemes or SCHEMES, options["threads"]))
    subjects += [_subject(folder.name, folder, {}, options["threads"]) for folder in options["folders"]]
    is_done = _measure(work, subjects)
    _tell([Row.of(work.ledger, subject) for subject in subjects if subject.name not in work.failed], work, out)
    if not is_done:
        click.echo("unfinished: call it again to go on", err=True)


def _subjects(source: Path, out: Path, schemes: Sequence[str], threads: int) -> Iterator[Subject]:
    """In the order of `SCHEMES`, so that bfloat16 comes first."""
    for name in SCHEMES:
        if name in schemes:
            folder = out / f"{source.name}-{name}" if name in _METHODS else source
            yield _subject(name, folder, _ON_THE_FLY.get(name, {}), threads)


def _subject(name: str, folder: Path, settings: dict[str, Any], threads: int) -> Subject:
    return Subject(name, folder.absolute(), EngineConfig(**_COMMON, **settings, threads=threads))


def _measure(work: _Work, subjects: Sequence[Subject]) -> bool:
    """Visits all subjects again and again; whether everything was measured."""
    for visit in range(work.visits):
        for subject in subjects:
            if subject.name in work.failed:
                continue
            if work.is_over():
                return False
            if not _visit(work, subject, visit):
                return False
    return True


def _visit(work: _Work, subject: Subject, visit: int) -> bool:
    """One subject's speed, the first time its quality too; False when the time was over before that."""
    from replicas.contract import EngineError

    try:
        _make(work, subject)
        if _is_measured(work, subject, visit):
            return True
        work.say(f"visit {visit + 1} of {work.visits}: {subject.name}")
        engine = Engine.load(subject)
        measure_speed(work.ledger, subject, engine, visit)
        if visit:
            return True
        kinds = (
            ("windows", measure_perplexity(work.ledger, subject, engine, work.cut)),
            ("questions", measure_quiz(work.ledger, subject, engine, work.asked, work.tokenizer)),
        )
        return all(_go_through(work, f"{subject.name}: {name}", pieces) for name, pieces in kinds)
    except (EngineError, OperationError, OSError) as error:
        work.failed[subject.name] = str(error)
        work.say(f"{subject.name}: {error}")
        return True
    finally:
        gc.collect()  # an engine is many gigabytes in many cycles


def _go_through(work: _Work, name: str, pieces: Iterator[None]) -> bool:
    """Piece after piece; False when the time was over before the last."""
    for done, _ in enumerate(pieces, 1):
        work.say(f"  {name}: {done} pieces")
        if work.is_over():
            return False
    return True


def _is_measured(work: _Work, subject: Subject, visit: int) -> bool:
    if work.ledger.get(subject, "speed", visit) is None:
        return False
    return visit > 0 or has_quality(work.ledger, subject, work.cut, work.asked)


def _make(work: _Work, subject: Subject) -> None:
    """Quantises the model where a checkpoint of ours is asked for and not there yet. Raises QuantizeError."""
    if subject.name in _METHODS and not subject.model_dir.exists():
        from ops.quantize import Wanted, make_checkpoint

        make_checkpoint(work.source, subject.model_dir, Wanted(method=subject.name, threads=work.threads))


def _tell(rows: Sequence[Row], work: _Work, out: Path) -> None:
    if not rows:
        raise ReportError("nothing could be measured: " + "; ".join(work.failed.values()))
    click.echo(as_table(rows))
    found = as_json(rows, work.failed)
    (out / "quantize-report.json").write_text(json.dumps(found, indent=2) + "\n")
    click.echo(json.dumps(found))
    plot(rows, out / _PICTURE)
