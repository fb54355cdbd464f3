"""`warmgate tune`: from a command line to subjects, knobs and a sweep; from a sweep to files."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from ops.token_count import TokenCount
from ops.tune.setup import Wanted, prepare

_AT_LEAST_1 = click.IntRange(min=1)
_POSITIVE = click.FloatRange(min=0, min_open=True)
_WIDE = 200
"""Characters a line where no terminal says how many fit."""


@click.command(short_help="Find the best settings for a workload.")
@click.argument("profile", default="quickstart")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set any key first; may be repeated.")
@click.option("--group", metavar="NAME", help="Which group, where the profile has several.")
@click.option("--input-tokens", default=512, show_default=True, type=TokenCount(), help="Length of every prompt.")
@click.option("--shared-tokens", default=128, show_default=True, type=click.IntRange(min=0),
              help="Of those, alike in all prompts.")  # fmt: skip
@click.option("--output-tokens", default=64, show_default=True, type=TokenCount(), help="Length of every answer.")
@click.option("--requests", default=64, show_default=True, type=_AT_LEAST_1, help="Of each run.")
@click.option("--rate", "rates", multiple=True, type=_POSITIVE, metavar="PER_S",
              help="Try this request rate; may be repeated. Default: rates are looked for.")  # fmt: skip
@click.option("--ttft-ms", default=1000.0, show_default=True, type=_POSITIVE, help="A first token in time.")
@click.option("--tpot-ms", default=100.0, show_default=True, type=_POSITIVE, help="Each further token, on average.")
@click.option("--share", default=0.95, show_default=True, type=click.FloatRange(0, 1, min_open=True),
              help="Of the requests that must be in time.")  # fmt: skip
@click.option("--sweep", "sweeps", multiple=True, metavar="KNOB=VALUE,…",
              help="Values of a knob; may be repeated. Default: all knobs, values around the profile's.")  # fmt: skip
@click.option("--grid", is_flag=True, help="Every combination, not knob after knob.")
@click.option("--compare", default="native", show_default=True, type=click.Choice(["native", "vllm", "none"]),
              help="Tune this engine too, on the same workload.")  # fmt: skip
@click.option("--minutes", default=20.0, show_default=True, type=_POSITIVE, help="For all measurements together.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), help="Folder [default: ./tune-PROFILE].")
@click.option("--retry-failed", is_flag=True, help="Try again what failed in an earlier call.")
def tune(profile: str, out: Path | None, **options: Any) -> None:
    """Find the settings of PROFILE with which most requests a second are answered in time, and write that profile.

    Starts real replicas and an ingress for each candidate, sends them the workload, and writes best.yaml, report.md,
    pictures and findings.jsonl into a folder. The same call again goes on where it stopped. Ctrl-C keeps what was
    found.

    \b
    Knobs: max_num_seqs, max_num_batched_tokens; for the chunk of a prompt long_prefill_token_threshold
    (vLLM, tokens) or max_prefill_stall_s (in-house, seconds); gpu_memory_utilization (vLLM on GPUs)
    or kv_cache_gib.

    \b
    warmgate tune vllm-cpu --input-tokens 256 --output-tokens 32 --ttft-ms 2000 --tpot-ms 150
    warmgate tune my.yaml --group chat --sweep max_num_seqs=64,128,256 --sweep max_num_batched_tokens=4096,8192
    warmgate tune my.yaml --grid --compare none --minutes 120 --out tuned
    """
    folder = out or Path(f"tune-{Path(profile).stem}")
    rates, sweeps = tuple(options.pop("rates")), tuple(options.pop("sweeps"))
    wanted = Wanted(profile=profile, folder=folder, rates=rates, sweeps=sweeps, **options)
    click.get_current_context().exit(run(wanted, Console(stderr=True, highlight=False)))


def run(wanted: Wanted, console: Console) -> int:
    """Sweeps and writes. The exit code: 130 when it was interrupted."""
    from ops.progress import Progress
    from ops.tune.writing import write_all

    progress = Progress(console)
    prepared = prepare(wanted, os.environ, progress)
    prepared.sweep.run()
    report = write_all(prepared, wanted.folder)
    progress.say(f"profile, report and pictures are in {wanted.folder}")
    report.show(Console(width=None if sys.stdout.isatty() else _WIDE, highlight=False))
    click.echo(report.json_line())
    return 130 if report.stopped == "interrupted" else 0
