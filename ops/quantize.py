"""`warmgate quantize`: a model folder's weights in fewer bits, in the format that other engines read too."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ops.errors import OperationError

if TYPE_CHECKING:
    from rich.progress import TaskID

    from replicas.engine.quantization.methods.recipes import Recipe

GROUP_SIZES = (128, 64, 32)

SMALL_HIDDEN_SIZE = 1024
"""Below it a model loses much by 4 bits, and a scale more costs little: small groups."""

TUNING_SEQUENCES = 96
"""What models are tuned with that take minutes."""

QUICK_WEIGHTS = 200_000_000
"""Up to so many, head included, a step of tuning takes some ten seconds of a core."""


class QuantizeError(OperationError):
    """The model could not be quantised. One line."""


@click.command(short_help="Write a model in fewer bits.")
@click.argument("model")
@click.option("--method", type=click.Choice(["int8", "nf4", "gptq", "awq"]), required=True)
@click.option("--out", type=click.Path(path_type=Path), help="New folder [default: beside the model, NAME-METHOD].")
@click.option(
    "--group-size",
    type=click.Choice(["128", "64", "32", "-1"]),
    help="Columns that share a scale (gptq, awq) [default: the largest that fits, of small models the smallest].",
)
@click.option("--act-order", is_flag=True, help="gptq: important columns first (desc_act).")
@click.option("--double-quant", is_flag=True, help="nf4: scales in 8 bits too.")
@click.option(
    "--strength", type=click.FloatRange(0, 1), default=0.5, show_default=True, help="int8: SmoothQuant's alpha."
)
@click.option("--samples", type=click.IntRange(min=1), default=32, show_default=True, help="Calibration sequences.")
@click.option("--sample-tokens", type=click.IntRange(min=2), default=512, show_default=True, help="Tokens in each.")
@click.option(
    "--text",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Calibration text [default: docstrings of Python's standard library].",
)
@click.option(
    "--tune",
    type=click.IntRange(min=0),
    help=f"int8, gptq, awq: sequences to tune scales and norms with [default: {TUNING_SEQUENCES} for small models].",
)
@click.option("--threads", type=click.IntRange(min=1), default=1, show_default=True, help="Torch threads.")
def quantize(model: str, out: Path | None, **options: Any) -> None:
    """Write MODEL (a catalogue name, hub id or folder) quantised into a new folder; head and embedding are kept.

    \b
    int8  SmoothQuant, then int8 weights and activations    compressed-tensors
    nf4   rounding to 4-bit NormalFloat, blocks of 64        bitsandbytes
    gptq  4 bits, errors made good by later columns         GPTQ
    awq   4 bits, weights that matter most scaled up        AutoAWQ (GEMM)

    Behind int8, gptq and awq, scales and norms are tuned to what MODEL itself predicts: minutes for a small model, too
    long for a large one on a CPU.

    \b
    warmgate quantize smollm2-135m --method awq
    warmgate quantize ./my-model --method gptq --group-size 64 --act-order --out ./my-model-gptq
    """
    from configs.runtime import home_dir
    from configs.tokenizer import find_model

    source = find_model(model, home_dir(os.environ))
    target = (out or source.with_name(f"{source.name}-{options['method']}")).absolute()
    if target.exists():
        raise QuantizeError(f"{target} exists already: choose another with --out, or remove it")
    began = time.monotonic()
    make_checkpoint(source, target, Wanted(**options))
    size = sum(path.stat().st_size for path in target.glob("*.safetensors"))
    click.echo(f"{target}: {size / 1e6:,.0f} MB of weights, {time.monotonic() - began:.0f} s")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A method and its settings, as the command line has them."""

    method: str
    threads: int = 1
    samples: int = 32
    sample_tokens: int = 512
    text: Path | None = None
    group_size: str | None = None
    act_order: bool = False
    double_quant: bool = False
    strength: float = 0.5
    tune: int | None = None


def make_checkpoint(source: Path, target: Path, wanted: Wanted) -> None:
    """Quantises a model folder into a new one. Raises QuantizeError."""
    from replicas.contract import EngineError
    from replicas.engine.quantization.methods.writing import Calibration, quantise_model, use_threads

    _refuse_others(wanted)
    use_threads(wanted.threads)
    try:
        recipe = _recipe(source, wanted)
        pieces = calibration_pieces(source, wanted) if recipe.is_calibrated else []
        texts = Calibration(spread(pieces, wanted.samples), spread(pieces, _num_tuning(source, wanted, recipe)))
        with _Progress(source.name) as report:
            quantise_model(source, target, recipe, texts, report)
    except (EngineError, OSError, ArithmeticError) as error:
        raise QuantizeError(str(error)) from error


def _refuse_others(wanted: Wanted) -> None:
    """Options that this method has no use for. Raises QuantizeError."""
    given: dict[str, tuple[bool, tuple[str, ...]]] = {
        "--group-size": (wanted.group_size is not None, ("gptq", "awq")),
        "--act-order": (wanted.act_order, ("gptq",)),
        "--double-quant": (wanted.double_quant, ("nf4",)),
        "--tune": (bool(wanted.tune), ("int8", "gptq", "awq")),
    }
    for option, (is_given, methods) in given.items():
        if is_given and wanted.method not in methods:
            *others, last = methods
            named = f"{', '.join(others)} and {last}" if others else last
            raise QuantizeError(f"{option} is for {named}, not for {wanted.method}")


def _recipe(source: Path, wanted: Wanted) -> Recipe:
    from replicas.engine.quantization.methods import recipes
    from replicas.engine.quantization.methods.gptq import GptqSettings

    if wanted.method == "int8":
        return recipes.Int8(wanted.strength)
    if wanted.method == "nf4":
        return recipes.Nf4(wanted.double_quant)
    group = int(wanted.group_size) if wanted.group_size else _fitting_group(source)
    if wanted.method == "awq":
        return recipes.Awq(group)
    return recipes.Gptq(GptqSettings(group, wanted.act_order))


def _fitting_group(source: Path) -> int:
    from replicas.engine.families import read_spec

    spec = read_spec(source)
    widths = (spec.hidden_size, spec.num_heads * spec.head_dim, spec.intermediate_size)
    for size in reversed(GROUP_SIZES) if _is_small(source) else GROUP_SIZES:
        if all(width % size == 0 for width in widths):
            return size
    raise QuantizeError(f"no group size of {GROUP_SIZES} divides matrices of {widths} columns")


def _is_small(source: Path) -> bool:
    from replicas.engine.families import read_spec

    return read_spec(source).hidden_size < SMALL_HIDDEN_SIZE


def _num_weights(source: Path) -> int:
    """That every token is multiplied with."""
    from replicas.engine.families import read_spec

    spec = read_spec(source)
    attention = 2 * spec.hidden_size * spec.head_dim * (spec.num_heads + spec.num_kv_heads)
    layer = attention + 3 * spec.hidden_size * spec.intermediate_size
    return spec.num_layers * layer + spec.vocab_size * spec.hidden_size


def _num_tuning(source: Path, wanted: Wanted, recipe: Recipe) -> int:
    """Sequences to tune with."""
    if not recipe.is_tunable:
        return 0
    if wanted.tune is not None:
        return wanted.tune
    return TUNING_SEQUENCES if _num_weights(source) <= QUICK_WEIGHTS else 0


def calibration_pieces(source: Path, wanted: Wanted) -> list[list[int]]:
    """Token ids of the text, cut into sequences."""
    from configs.tokenizer import load_model_files
    from ops.texts import calibration_text

    text = wanted.text.read_text(encoding="utf-8") if wanted.text else calibration_text()
    tokenizer = load_model_files(str(source.absolute()), source).tokenizer
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    length = wanted.sample_tokens
    pieces = [ids[i : i + length] for i in range(0, len(ids) - length + 1, length)]
    if not pieces:
        raise QuantizeError(f"the calibration text has {len(ids)} tokens, fewer than one sequence of {length}")
    return pieces


def spread(pieces: Sequence[list[int]], count: int) -> list[list[int]]:
    """`count` of the pieces at equal distances, all of them when there are fewer."""
    if count >= len(pieces):
        return list(pieces)
    return [pieces[i * len(pieces) // count] for i in range(count)]


class _Progress:
    """A bar of layers on a terminal, a line for every tenth elsewhere; then another, of tuning steps."""

    def __init__(self, name: str) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._console = Console(stderr=True, highlight=False)
        self._lively = self._console.is_terminal and not self._console.no_color
        self._name = name
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,
            disable=not self._lively,
        )
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Callable[[str, int, int], None]:
        self._bar.start()
        return self._report

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def _report(self, what: str, done: int, total: int) -> None:
        if what not in self._tasks:
            self._tasks[what] = self._bar.add_task(f"{self._name}: {what}", total=total)
        self._bar.update(self._tasks[what], completed=done)
        if not self._lively and (done == total or done % max(1, total // 10) == 0):
            self._console.print(f"{self._name}: {done} of {total} {what}", markup=False)
