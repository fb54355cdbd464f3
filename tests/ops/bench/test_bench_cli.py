"""`warmgate bench` as a person meets it: help, mistakes, and a short run of each benchmark that ends in JSON."""

from __future__ import annotations

import json
import os
import re
import struct
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner, Result

from ops.bench import cli, engine, engine_cli, kv, stack
from ops.bench.harness import BenchError, Plan, Samples
from ops.bench.options import PAGE
from ops.bench.report import Report
from ops.cli import main

ROOT = Path(__file__).parents[3]
MARK = "BENCH_TEST_MARK"
FIELDS = {
    "tables",
    "benchmark",
    "date",
    "machine",
    "versions",
    "command",
    "repeats",
    "sides",
    "ratios",
    "facts",
    "notes",
}


def bench(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["bench", *arguments], prog_name="warmgate")


@pytest.fixture()
def marked() -> Iterator[dict[str, str]]:
    """An environment by which every process of a run can be found: none may be left."""
    mark = uuid.uuid4().hex
    yield {**os.environ, MARK: mark}
    assert not [process.cmdline() for process in psutil.process_iter() if _has_mark(process, mark)]


def _has_mark(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark
    except psutil.Error:
        return False


def measured(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    """Runs a benchmark; what the last line of its output says."""
    command = [sys.executable, "-m", "ops.cli", "bench", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    *table, line = done.stdout.splitlines()
    assert any("median (lowest to highest)" in row for row in table)
    found: dict[str, Any] = json.loads(line)
    assert set(found) == FIELDS
    assert found["repeats"] == 1
    return found


@pytest.fixture()
def smollm2() -> None:
    home = Path(os.environ.get("WARMGATE_HOME", Path.home() / ".cache" / "warmgate"))
    folder = home / "models" / "smollm2-135m"
    if not (folder / "config.json").is_file():
        pytest.skip(f"SmolLM2 is not in {folder}: `warmgate models pull smollm2-135m` gets it")


def test_help_lists_the_benchmarks() -> None:
    result = bench("--help")
    assert result.exit_code == 0
    listed = result.output.partition("Commands:")[2]
    assert re.findall(r"^  (\S+)  ", listed, re.MULTILINE) == sorted(cli.bench.commands)


@pytest.mark.parametrize("benchmark", ["engine", "gateway"])
def test_unknown_side_is_exit_code_2_and_names_those_there_are(benchmark: str) -> None:
    result = bench(benchmark, "--quick", "--side", "warmgate", "--side", "llm-d")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--side: llm-d: there are warmgate, " in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ("kv", "--repeats", "0"),
        ("gateway", "--repeats", "-1"),
        ("engine", "--threads", "0"),
        ("engine", "--dtype", "int3"),
    ],
)
def test_impossible_numbers_are_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = bench(*arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"Invalid value for '{arguments[1]}'" in result.stderr


@pytest.mark.parametrize("flags", [("--quick", "--record"), ("--record", "--quick")])
def test_quick_run_is_never_recorded(flags: tuple[str, str]) -> None:
    result = bench("gateway", *flags)
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--quick measures nothing, so there is nothing to --record" in result.stderr


def test_model_that_is_not_here_is_exit_code_2_and_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMGATE_HOME", str(tmp_path))
    result = bench("kv", "--quick")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.count("\n") == 1 and "warmgate models pull smollm2-135m" in result.stderr


@pytest.fixture()
def pretended(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Plan]:
    """`bench kv` without a model, in an empty folder; the plans it was run with."""
    plans: list[Plan] = []

    async def run(model_dir: Path, lengths: Any, plan: Plan, notice: Any) -> Report:
        plans.append(plan)
        notice("measuring [nothing]")
        return Report("kv", "KV: pretended", Samples({"cache": [{"ms": 1.0}] * plan.num_repeats}))

    monkeypatch.setattr(kv, "run", run)
    monkeypatch.setattr(engine_cli, "model_dir", Path)
    monkeypatch.chdir(tmp_path)
    return plans


def test_recorded_run_puts_its_section_into_the_page_and_others_leave_it_alone(pretended: list[Plan]) -> None:
    assert bench("kv").exit_code == 0
    assert not PAGE.exists()
    assert bench("kv", "--record").exit_code == 0
    assert PAGE.read_text().count("## KV: pretended") == 1
    assert "<!-- bench:kv -->" in PAGE.read_text()
    assert pretended == [Plan(5, 1), Plan(5, 1)]


def test_progress_goes_to_stderr_and_the_json_line_is_the_last_of_stdout(pretended: list[Plan]) -> None:
    result = bench("kv", "--repeats", "2")
    assert "measuring [nothing]" in result.stderr and "measuring" not in result.stdout
    assert json.loads(result.stdout.splitlines()[-1])["repeats"] == 2
    assert pretended == [Plan(2, 1)]


def test_benchmark_that_cannot_run_is_one_line_and_exit_code_1(
    pretended: list[Plan], monkeypatch: pytest.MonkeyPatch
) -> None:
    async def run(*_: object) -> Report:
        raise BenchError("with cache [1], without [2]")

    monkeypatch.setattr(kv, "run", run)
    result = bench("kv")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "error: with cache [1], without [2]"
    assert "Traceback" not in result.stderr


def test_picture_that_cannot_be_drawn_costs_nobody_the_figures(
    pretended: list[Plan], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def plot(*_: object) -> None:
        raise BenchError("no space left")

    async def run(workload: Any, wanted: Any, plan: Plan, notice: Any) -> Report:
        return await kv.run(workload.model_dir, (), plan, notice)

    monkeypatch.setattr(engine, "run", run)
    monkeypatch.setattr(engine, "plot", plot)
    result = bench("engine", "--plot", str(tmp_path / "x.png"))
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: no space left"
    assert json.loads(result.stdout.splitlines()[-1])["repeats"] == 5


@pytest.mark.parametrize("words", [("engine",), ("policies", "--trace", __file__)])
def test_picture_that_cannot_be_drawn_is_refused_before_anything_is_measured(
    pretended: list[Plan], tmp_path: Path, words: tuple[str, ...]
) -> None:
    result = bench(*words, "--plot", str(tmp_path / "x.txt"))
    assert (result.exit_code, result.stdout, pretended) == (1, "", [])
    assert "x.txt: a plot's name ends in one of" in result.stderr


def test_stack_that_is_not_ready_in_time_is_one_line_and_leaves_nothing_behind(
    marked: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "START_S", 0.01)
    monkeypatch.setenv(MARK, marked[MARK])
    result = bench("gateway", "--quick", "--side", "warmgate")
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.splitlines()[-1] == "error: the replica r0 was not ready within 0.01 s"


def test_quick_gateway_run_measures_our_ingress_and_leaves_nothing_behind(marked: dict[str, str]) -> None:
    found = measured(marked, "gateway", "--quick", "--side", "warmgate")
    assert found["benchmark"] == "gateway"
    assert set(found["sides"]) == {"warmgate, paced", "warmgate, unpaced"}
    for figures in found["sides"].values():
        assert {"ingress µs a chunk", "ingress µs a request", "replicas µs a chunk"} <= set(figures)
        assert figures["chunks a CPU-second, all roles"]["median"] > 0
    assert found["sides"]["warmgate, paced"]["TTFT p50 ms"]["median"] > 0
    assert found["facts"]["streams at once"] == 8


def test_benchmark_told_to_stop_ends_every_process_it_began(marked: dict[str, str]) -> None:
    command = [sys.executable, "-m", "ops.cli", "bench", "gateway", "--side", "warmgate"]
    pipe = subprocess.PIPE
    running = subprocess.Popen(command, cwd=ROOT, env=marked, stdout=pipe, stderr=pipe, text=True)
    assert running.stderr is not None
    for line in running.stderr:
        if "warm-up" in line:
            break
    others = [p for p in psutil.process_iter() if _has_mark(p, marked[MARK]) and p.pid != running.pid]
    assert len(others) >= 4  # two replicas, two ingresses
    running.terminate()
    out, err = running.communicate(timeout=60)
    assert (running.returncode, out) == (1, "")
    assert err.splitlines()[-1] == "error: told to stop before the measurement was complete: no figures"


@pytest.mark.model
@pytest.mark.usefixtures("smollm2")
def test_quick_kv_run_finds_the_same_tokens_with_and_without_the_cache(marked: dict[str, str]) -> None:
    found = measured(marked, "kv", "--quick")
    assert set(found["sides"]) == {"cache", "no cache"}
    assert (found["facts"]["identical"], found["facts"]["tokens compared"]) == (True, 5)
    [ratio] = found["ratios"]
    assert (ratio["metric"], ratio["side"], ratio["against"]) == ("ms a token at 64", "no cache", "cache")
    assert ratio["median"] > 0


@pytest.mark.model
@pytest.mark.usefixtures("smollm2")
def test_quick_engine_run_gives_figures_at_each_level_and_a_picture(marked: dict[str, str], tmp_path: Path) -> None:
    picture = tmp_path / "plots" / "engine.png"
    found = measured(marked, "engine", "--quick", "--side", "warmgate", "--plot", str(picture))
    figures = found["sides"]["warmgate"]
    assert set(figures) == {f"{metric} at {level}" for metric in ("tok/s", "TTFT ms", "TPOT ms") for level in (1, 2)}
    assert all(figure["median"] > 0 for figure in figures.values())
    assert (found["ratios"], found["notes"]) == ([], [])
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = struct.unpack(">II", head[16:24])
    assert width > 400 and height > 200


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.usefixtures("smollm2")
def test_quick_stall_run_cuts_the_prompt_where_there_is_a_limit(marked: dict[str, str]) -> None:
    found = measured(marked, "stall", "--quick", "--limit-ms", "20")
    limited, unlimited = found["sides"]["limit 20 ms"], found["sides"]["no limit"]
    assert unlimited["tokens a chunk"]["median"] > 300 > limited["tokens a chunk"]["median"]
    assert limited["gap ms p50"]["median"] < unlimited["gap ms p50"]["median"]
    assert [ratio["metric"] for ratio in found["ratios"] if "goal" in ratio] == [
        "gap p99 over p50",
        "TPOT p99 over p50",
    ]


@pytest.mark.parametrize("lengths", ["a,b", "0", "1,,2", "-1", ""])
def test_numbers_of_guesses_are_numbers(lengths: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_cli, "model_dir", Path)
    result = bench("speculative", "--table", lengths)
    assert result.exit_code == 2 and "is no list of numbers of guesses like 1,2,4" in result.output
