"""`warmgate simulate`: a trace, policies and fleets in; a table, a plot and one JSON object on the last line out."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.console import Console

from configs.schema import AdmissionConfig
from ops.picture import check_can_plot
from ops.token_count import TokenCount
from routing.policies import POLICIES

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from ops.simulate.capacity import Search
    from ops.simulate.cells import Cell, Finding
    from ops.simulate.fleet import FleetSpec
    from replicas.engine.order import OrderName
    from routing.policies import PolicySpec

_AT_LEAST_1 = click.IntRange(min=1)
_NOT_NEGATIVE = click.FloatRange(min=0)
_POSITIVE = click.FloatRange(min=0, min_open=True)
_WIDE = 200
"""Characters a line where no terminal says how many fit."""

_FILE = click.Path(path_type=Path, exists=True, dir_okay=False)


class Delay(click.ParamType[Any]):
    """Milliseconds, or `never`."""

    name = "MS|never"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float | None:
        if value == "never":
            return None
        seconds = _NOT_NEGATIVE.convert(value, param, ctx)
        assert seconds is not None
        return seconds / 1000


class TraceOrVerb(click.Group):
    """A group whose first argument may also be a trace: then it is the argument of `trace`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ctx.help_option_names:
            args = ["trace", *args]
        return super().parse_args(ctx, args)


@click.group(cls=TraceOrVerb, short_help="Play a trace with other policies, other fleets.")
def simulate() -> None:
    """What would a trace look like with another policy, another fleet?

    \b
    warmgate simulate TRACE [options]     the same as `simulate trace TRACE`; its --help has the options
    warmgate simulate calibrate URL       measure what a step of a live replica costs

    \b
    Examples:
      warmgate simulate conversation_trace.jsonl --policy warm --policy round_robin --load 0.8
      warmgate simulate conversation_trace.jsonl --capacity --replicas 4 --replicas 8 --plot capacity.png
      warmgate simulate usage.jsonl --replicas 6 --load 1.2
    """


@simulate.command(short_help="Play TRACE, with policies and fleets of choice.")
@click.argument("path", metavar="TRACE", type=_FILE)
@click.option("--policy", "policies", multiple=True, default=("warm",), show_default=True, metavar="NAME",
              help=f"Repeatable. There are {', '.join(POLICIES)}.")  # fmt: skip
@click.option("--replicas", multiple=True, default=(8,), type=_AT_LEAST_1, show_default=True, help="Repeatable.")
@click.option("--kv-tokens", multiple=True, default=("4M",), type=TokenCount(), show_default=True,
              help="KV cache of one replica, such as 512k; repeatable.")  # fmt: skip
@click.option("--order", "orders", multiple=True, type=click.Choice(["fcfs", "shortest"]),
              help="Prefill order of all replicas; repeatable. Default: what each policy ships with, shortest for "
              "warm, fcfs for all others.")  # fmt: skip
@click.option("--load", "loads", multiple=True, type=_POSITIVE,
              help="1.0 = prefill of the whole fleet, nothing cached. Repeatable. Default: 0.8.")  # fmt: skip
@click.option("--capacity", is_flag=True, help="Find the largest load with 95 % of first tokens in time.")
@click.option("--format", "format_name", type=click.Choice(["mooncake", "sessions", "azure", "servegen", "usage"]),
              help="The trace's format. Default: what it looks like.")  # fmt: skip
@click.option("--head", type=_AT_LEAST_1, help="Only the first requests of the trace.")
@click.option("--repeat", default=1, type=_AT_LEAST_1, help="The trace so many times in a row, prompts anew.")
@click.option("--ingresses", default=1, show_default=True, type=_AT_LEAST_1, help="Gateways, each with its own view.")
@click.option("--stale-ms", default=0.0, show_default=True, type=_NOT_NEGATIVE, help="How late state and events come.")
@click.option("--events-ms", multiple=True, type=Delay(), metavar="MS|never",
              help="How late KV events come. Default: as --stale-ms.")  # fmt: skip
@click.option("--look-ahead", default=AdmissionConfig().look_ahead, show_default=True,
              type=click.IntRange(min=0, max=64),
              help="Late binding, with policies that weigh in seconds: choose request and replica together, among so "
              "many. 0: send at once, as with all others.")  # fmt: skip
@click.option("--max-ahead", type=click.IntRange(min=0),
              help="Late binding in fair order: requests that may wait at a replica.")  # fmt: skip
@click.option("--max-num-seqs", default=256, show_default=True, type=_AT_LEAST_1)
@click.option("--max-num-batched-tokens", default=2048, show_default=True, type=_AT_LEAST_1)
@click.option("--adapters", type=_AT_LEAST_1, help="Ask for so many LoRA adapters, by conversation.")
@click.option("--adapter-slots", default=8, show_default=True, type=_AT_LEAST_1, help="LoRA slots of a replica.")
@click.option("--adapter-zipf", default=1.0, show_default=True, type=_NOT_NEGATIVE)
@click.option("--tenants", type=_AT_LEAST_1, help="Let so many tenants ask, by conversation (Zipf 1).")
@click.option("--calibration", type=_FILE, help="Step costs, from `warmgate simulate calibrate`.")
@click.option("--seed", default=0, show_default=True, type=int)
@click.option("--workers", type=_AT_LEAST_1, help="Simulations at once. Default: the cores there are.")
@click.option("--plot", "plot_to", type=click.Path(path_type=Path, dir_okay=False), help="TTFT CDF and attainment.")
@click.option("--json", "as_json", is_flag=True, help="Only the JSON line, on a terminal too.")
def trace(path: Path, as_json: bool, plot_to: Path | None, workers: int | None, **options: Any) -> None:
    """Simulate TRACE: Mooncake or session JSON lines, Azure CSV, ServeGen tar.gz, or the gateway's own usage log.

    Prints a table; where the output is no terminal, a last line with everything as JSON too.
    """
    from ops.simulate.cells import Crew, find_all, num_cores
    from ops.simulate.report import Report

    if plot_to is not None:
        check_can_plot(plot_to)
    began = time.monotonic()
    played = _trace(path, options)
    cells = _cells(options, None if options["adapters"] is None else options["adapter_slots"], _search(plot_to))
    with _progress(len(cells)) as told:
        findings = find_all(played, cells, Crew(workers or num_cores(), told))
    report = Report(played, cells[0].fleet, findings, time.monotonic() - began)
    if not as_json:
        report.show(Console(width=None if sys.stdout.isatty() else _WIDE))
    if as_json or not sys.stdout.isatty():
        click.echo(report.json_line())
    if plot_to is not None:
        from ops.simulate.plot import plot

        plot(findings, plot_to, path.name)


@simulate.command(short_help="Measure what a step of a live replica costs.")
@click.argument("url")
@click.option("--model", required=True, help="Model id as the server names it.")
@click.option("--api-key", envvar="WARMGATE_API_KEY", help="Bearer token, where the server wants one.")
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), default=Path("calibration.json"),
              show_default=True, help="Where the calibration is written.")  # fmt: skip
@click.option("--prompt-tokens", default=2048, show_default=True, type=click.IntRange(min=64), help="Longest prompt.")
@click.option("--sequences", default=8, show_default=True, type=click.IntRange(min=2), help="Most answers at once.")
@click.option("--max-num-batched-tokens", default=2048, show_default=True, type=_AT_LEAST_1,
              help="Prompt tokens the server computes in one step at most.")  # fmt: skip
def calibrate(url: str, out: Path, **options: Any) -> None:
    """Measure prefill rate and step time at URL with a few streamed requests, best while nobody else asks.

    One idle replica should answer at URL: several share the load and look faster than each is.
    """
    import asyncio

    from ops.simulate.calibrate import Measuring, calibrate_live
    from ops.simulate.calibration import save_calibration

    with Console(stderr=True).status("measuring …"):
        found = asyncio.run(calibrate_live(url, Measuring(**options)))
    save_calibration(out, found)
    Console().print(
        f"prefill {found.prefill_tokens_per_s:.0f} tokens/s, step {found.step_base_s * 1000:.2f} ms "
        f"+ {found.step_per_sequence_s * 1000:.3f} ms per sequence: written to {out}",
        highlight=False,
        soft_wrap=True,
    )


def _trace(path: Path, options: dict[str, Any]) -> Any:
    """The trace as the options want it. Raises TraceError."""
    from ops.simulate.formats import load_trace
    from ops.simulate.variants import AdapterMix, repeated, with_adapters, with_tenants

    found = load_trace(path, options["format_name"])
    if options["head"] is not None:
        found = found.head(options["head"])
    if options["repeat"] > 1:
        found = repeated(found, options["repeat"])
    if options["tenants"] is not None:
        found = with_tenants(found, options["tenants"], seed=options["seed"])
    if options["adapters"] is not None:
        mix = AdapterMix(options["adapters"], options["adapter_zipf"], ranks=(4, 8, 16, 32), seed=options["seed"])
        found = with_adapters(found, mix)
    return found


def _cells(options: dict[str, Any], adapter_slots: int | None, search: Search) -> list[Cell]:
    """Every combination that was asked for: fleets outside, policies inside."""
    from ops.simulate.cells import Cell
    from ops.simulate.driver import policy_named

    policies = {name: policy_named(name) for name in options["policies"]}
    if options["capacity"] and options["loads"]:
        raise click.UsageError("--capacity finds the load: leave out --load")
    loads: Sequence[float | None] = (None,) if options["capacity"] else options["loads"] or (0.8,)
    orders: Sequence[OrderName | None] = options["orders"] or (None,)
    return [
        Cell(name, fleet.as_bound(policy), load, search)
        for replicas in options["replicas"]
        for kv_tokens in options["kv_tokens"]
        for order in orders
        for load in loads
        for name, policy in policies.items()
        for fleet in [_fleet(options, (replicas, kv_tokens, order or _shipped_order(policy)), adapter_slots or 0)]
    ]


def _shipped_order(policy: PolicySpec) -> OrderName:
    """Ours is made for short prompts first; the engines that others' rules come with run first come, first served."""
    return "shortest" if policy.weighs_seconds else "fcfs"


def _search(plot_to: Path | None) -> Search:
    """A picture shows how attainment falls, so then every run is played to its end."""
    from ops.simulate.capacity import Search
    from ops.simulate.driver import run

    return Search() if plot_to is None else Search(attempt=run)


def _fleet(options: dict[str, Any], varied: tuple[int, int, Any], adapter_slots: int) -> FleetSpec:
    from ops.simulate.calibration import Calibration, load_calibration
    from ops.simulate.fleet import FleetSpec
    from ops.simulate.replica import ReplicaSpec

    replicas, kv_tokens, order = varied
    stale_s = options["stale_ms"] / 1000
    replica = ReplicaSpec(
        kv_tokens=kv_tokens,
        max_num_seqs=options["max_num_seqs"],
        max_num_batched_tokens=options["max_num_batched_tokens"],
        order=order,
        max_adapters=adapter_slots,
        calibration=load_calibration(options["calibration"]) if options["calibration"] else Calibration(),
    )
    return FleetSpec(
        num_replicas=replicas,
        replica=replica,
        num_ingresses=options["ingresses"],
        stats_delay_s=stale_s,
        events_delay_s=options["events_ms"][-1] if options["events_ms"] else stale_s,
        max_ahead=options["max_ahead"],
        look_ahead=options["look_ahead"],
        seed=options["seed"],
    )


@contextmanager
def _progress(num_cells: int) -> Iterator[Callable[[Finding], None]]:
    """A bar on a terminal's stderr, nothing elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("simulating"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal, auto_refresh=False
    ) as bar:
        task = bar.add_task("", total=num_cells)

        def told(_finding: Finding) -> None:
            bar.advance(task)
            bar.refresh()

        bar.refresh()
        yield told
