"""Commands of `warmgate bench` that measure our own engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from ops.bench.options import (
    AT_LEAST_1,
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


@click.command(short_help="tok/s, TTFT and TPOT beside transformers and vLLM.")
@model_option
@repeats_option
@quick_option
@record_option
@click.option("--side", "wanted", multiple=True, help="Only these sides (repeat the option). Default: all.")
@click.option("--threads", default=1, show_default=True, type=AT_LEAST_1, help="Threads of every side.")
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
    chosen = known(wanted, module.ALL)
    workload = module.Workload(model_dir(model), **set_to)
    if quick:
        workload = module.Workload(model_dir(model), levels=(1, 2), num_prompt_tokens=16, max_tokens=4, **set_to)
    report = measured(lambda notice: module.run(workload, chosen, plan_of(repeats, quick), notice))
    finish(report, recorded)
    if plot_to is not None:
        module.plot(report, plot_to)


@click.command(short_help="A token with and without the KV cache.")
@model_option
@repeats_option
@quick_option
@record_option
def kv(model: str, repeats: int, quick: bool, recorded: bool) -> None:
    """A token with and without the KV cache at 64 to 1,024 tokens: the same tokens, and how much faster."""
    from ops.bench import kv as module

    lengths = module.LENGTHS[:1] if quick else module.LENGTHS
    folder = model_dir(model)
    finish(measured(lambda notice: module.run(folder, lengths, plan_of(repeats, quick), notice)), recorded)


@click.command("lora-routing", short_help="50 adapters on 2 replicas with 8 slots, by routing.")
@model_option
@repeats_option
@quick_option
@record_option
@click.option("--side", "wanted", multiple=True, help="Only these engines (repeat the option). Default: all.")
def lora_routing(model: str, repeats: int, quick: bool, recorded: bool, wanted: tuple[str, ...]) -> None:
    """Swaps and TTFT of a Zipf mix of 50 adapters on two replicas with 8 slots each, beside least-outstanding routing,
    every token checked: the in-house engine, and vLLM where it is installed."""
    from importlib.util import find_spec

    from ops.bench import lora_routing as module

    here = tuple(kind for kind in module.ENGINES if kind != "vllm" or find_spec("vllm"))
    engines = tuple(kind for kind in here if kind in known(wanted, here))
    folder = model_dir(model)
    workload = module.Workload(folder)
    if quick:
        workload = module.Workload(folder, num_adapters=12, num_requests=12, max_tokens=6, num_slots=2)
    finish(measured(lambda notice: module.run(workload, engines, plan_of(repeats, quick), notice)), recorded)


@click.command(short_help="Many adapters in a batch, and in a fleet.")
@model_option
@repeats_option
@quick_option
@record_option
@click.option("--rank", default=8, show_default=True, type=click.IntRange(1, 512), help="Of every adapter.")
@click.option("--dtype", default="float32", show_default=True, type=click.Choice(["float32", "bfloat16"]))
def lora(model: str, repeats: int, quick: bool, recorded: bool, **set_to: Any) -> None:
    """Batches of 1 to 256 adapters beside the base model, the pause of a swap, a fleet with 1,000 adapters."""
    from ops.bench import lora as module
    from ops.bench.lora_fleet import FleetWorkload

    workload = module.Workload(model_dir(model), **set_to)
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
        workload = module.Workload(model_dir(model), **small, **set_to)
    finish(measured(lambda notice: module.run(workload, plan_of(repeats, quick), notice)), recorded)


@click.command(short_help="Answers beside a long prompt.")
@model_option
@repeats_option
@quick_option
@record_option
@click.option("--limit-ms", default=30.0, show_default=True, type=click.FloatRange(1.0), help="What a step may stall.")
def stall(model: str, repeats: int, quick: bool, recorded: bool, limit_ms: float) -> None:
    """How long running answers wait beside a prompt of 8,000 tokens, with max_prefill_stall_s and without."""
    from ops.bench import stall as module

    size = module.Size(limit_s=limit_ms / 1000)
    if quick:
        size = module.Size(num_talkers=2, answer_tokens=3, num_alone=2, prompt_tokens=2500, limit_s=limit_ms / 1000)
    folder = model_dir(model)
    finish(measured(lambda notice: module.run(folder, size, plan_of(repeats, quick), notice)), recorded)


@click.command(short_help="What grammars cost.")
@model_option
@repeats_option
@quick_option
@record_option
def structured(model: str, repeats: int, quick: bool, recorded: bool) -> None:
    """What grammars cost: the sampler's time a token with and without, compiling, and the guard before it."""
    from ops.bench import structured as module

    folder = model_dir(model)
    num_steps = 2 if quick else 60
    finish(measured(lambda notice: module.run(folder, num_steps, plan_of(repeats, quick), notice)), recorded)


@click.command(short_help="Decoding with guesses beside plain decoding.")
@model_option
@repeats_option
@quick_option
@record_option
@click.option("--side", "wanted", multiple=True, help="Only these methods (repeat the option). Default: all there is.")
@click.option("--head", type=click.Path(exists=True, path_type=Path), help="mlp_speculator: `warmgate train-draft`'s.")
@click.option("--draft", type=click.Path(exists=True, path_type=Path), help="draft_model: a smaller model's folder.")
@click.option("--tokens", "num_tokens", default=64, show_default=True, type=AT_LEAST_1, help="Of an answer.")
@click.option("--table", "lengths", help="Instead: fixed numbers of guesses (1,2,4,8) beside theory.")
def speculative(
    model: str, repeats: int, quick: bool, recorded: bool, wanted: tuple[str, ...], lengths: str | None, **spec: Any
) -> None:
    """Decoding with guesses beside plain decoding: copying, chat and noise, alone and in a batch."""
    from ops.bench import speculative as module

    files = {"mlp_speculator": spec["head"], "draft_model": spec["draft"]}
    there = tuple(name for name in module.METHODS if files.get(name, name) is not None)
    num_tokens = 8 if quick else spec["num_tokens"]
    given = {name: path for name, path in files.items() if path is not None}
    sides = module.sides(model_dir(model), given, known(wanted, there), num_tokens)
    if lengths is not None:
        from ops.bench import speculative_table as table

        asked = table.Asked(_lengths(lengths), plan_of(repeats, quick).num_repeats)
        finish(measured(lambda notice: table.run(sides[0], sides[1:], asked, notice)), recorded)
        return
    finish(measured(lambda notice: module.run(sides, plan_of(repeats, quick), notice)), recorded)


def _lengths(words: str) -> list[int]:
    found = [int(word) for word in words.split(",") if word.strip().isdecimal()]
    if len(found) != len(words.split(",")) or min(found) < 1:
        raise click.BadParameter(f"{words!r} is no list of numbers of guesses like 1,2,4", param_hint="--table")
    return found


COMMANDS = (engine, lora_routing, kv, lora, speculative, stall, structured)
