"""Many simulations at once, and what is printed of them."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console

from ops.cli import main
from ops.simulate.binding import Binder, Bound
from ops.simulate.cells import Cell, Crew, Finding, find, find_all
from ops.simulate.errors import SimulationError
from ops.simulate.fleet import FleetSpec
from ops.simulate.plot import plot, say_plainly
from ops.simulate.replica import ReplicaSpec
from ops.simulate.report import Report
from routing.policies import POLICIES
from tests.ops.simulate.making import conversations
from tests.ops.simulate.test_readers import mooncake, write_lines

FLEET = FleetSpec(num_replicas=2, replica=ReplicaSpec(kv_tokens=20_000, max_num_batched_tokens=256))
TRACE = conversations(120, 20.0)


def test_workers_find_what_one_process_finds_in_the_order_asked() -> None:
    cells = [Cell(policy, FLEET, load) for policy in ("warm", "round_robin") for load in (0.3, 0.9, None)]
    told: list[Finding] = []
    alone = find_all(TRACE, cells, Crew(1, told.append))
    assert told == alone
    together = find_all(TRACE, cells, Crew(2, told.append))
    assert together == alone and len(told) == 12
    assert [f.cell for f in together] == cells


def test_a_cells_error_arrives_whole() -> None:
    cells = [Cell("warm", FLEET, 0.3), Cell("nobody", FLEET, 0.3)]
    with pytest.raises(SimulationError, match="no policy 'nobody'"):
        find_all(TRACE, cells, Crew(2, lambda finding: None))


def test_a_worker_that_dies_is_noticed() -> None:
    def killed(binder: Binder) -> Bound | None:
        os.kill(os.getpid(), signal.SIGKILL)
        return None

    cells = [Cell("warm", replace(FLEET, binding=killed), 0.3)] * 2
    with pytest.raises(SimulationError, match="a simulating process died"):
        find_all(TRACE, cells, Crew(2, lambda finding: None))


def test_hits_are_set_against_one_pooled_cache() -> None:
    finding = find(TRACE, Cell("warm", FLEET, 0.1))
    assert 0.5 < finding.summary["hit_of_pooled_lru"] <= 1.01
    assert len(finding.cdf_s) == 200 and list(finding.cdf_s) == sorted(finding.cdf_s)


@pytest.mark.parametrize(
    ("values", "ticks"),
    [
        ((0.8,), ["0.5", "1"]),
        ((0.33, 0.5, 1.2), ["0.5", "1"]),
        ((0.18, 0.9, 2.5), ["0.2", "0.5", "1", "2"]),
        ((0.0, 12.0), ["0.001", "0.01", "0.1", "1", "10"]),
    ],
)
def test_ticks_of_a_logarithmic_axis_are_plain_numbers_and_at_least_two(
    values: tuple[float, ...], ticks: list[str]
) -> None:
    figure = Figure()
    FigureCanvasAgg(figure).draw()
    axes = figure.subplots()
    axes.set_xscale("log")
    say_plainly(axes, values)
    figure.draw_without_rendering()
    low, high = axes.get_xlim()
    assert low < min(v or low * 2 for v in values) and max(values) < high
    seen = [t.get_text() for t in axes.get_xticklabels() if low <= t.get_position()[0] <= high]
    assert seen == ticks
    assert not any(t.get_text() for t in axes.get_xticklabels(minor=True))


@pytest.mark.parametrize("loads", [(0.4,), (None,)])
def test_plots_are_drawn_with_one_load_and_with_many(tmp_path: Path, loads: tuple[float | None, ...]) -> None:
    findings = [find(TRACE, Cell(policy, FLEET, loads[0])) for policy in ("warm", "round_robin")]
    plot(findings, tmp_path / "plot.png", "title")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SimulationError, match="nowhere"):
        plot(findings, tmp_path / "nowhere" / "plot.png", "title")


def test_a_plot_that_cannot_be_drawn_is_refused_before_anything_is_simulated(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(*_: object) -> None:
        raise AssertionError("simulated in vain")

    monkeypatch.setattr("ops.simulate.cells.find_all", nothing)

    def refused(name: str) -> str:
        done = CliRunner().invoke(main, ["simulate", str(path), "--plot", str(path.parent / name)])
        assert (done.exit_code, done.stdout, done.stderr.count("\n")) == (1, "", 1)
        return done.stderr

    assert "a plot's name ends in one of" in refused("plot.txt")
    assert "trace.jsonl" in refused("trace.jsonl/plot.png")
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    assert refused("plot.png") == f"error: a plot needs matplotlib: {sys.executable} -m pip install matplotlib\n"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    rows = [mooncake(300.0 * i, 700 + 40 * i, [0, i % 5 + 1], num_output=3) for i in range(60)]
    return write_lines(tmp_path / "trace.jsonl", *rows)


def simulated(*args: str | Path) -> tuple[str, dict[str, Any]]:
    result = CliRunner().invoke(main, ["simulate", *map(str, args)])
    assert result.exit_code == 0, result.output
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return result.stdout, found


def test_the_command_prints_a_table_and_ends_with_one_json_object(path: Path) -> None:
    output, found = simulated(path, "--policy", "round_robin", "--policy", "warm", "--load", "0.5", "--workers", 1)
    assert "round_robin" in output and "warm" in output and "trace.jsonl: 60 requests" in output
    assert [cell["policy"] for cell in found["cells"]] == ["round_robin", "warm"]
    assert found["requests"] == 60 and found["cells"][0]["load"] == 0.5
    assert 0 < found["infinite_cache_hit"] < 1


def test_every_combination_is_a_cell_and_json_alone_is_one_line(path: Path) -> None:
    output, found = simulated(
        path, "--replicas", 2, "--replicas", 3, "--order", "fcfs", "--order", "shortest", "--json", "--workers", 2
    )
    assert len(output.splitlines()) == 1
    assert [(c["replicas"], c["order"]) for c in found["cells"]] == [
        (2, "fcfs"), (2, "shortest"), (3, "fcfs"), (3, "shortest")
    ]  # fmt: skip


def test_each_policy_runs_in_the_order_it_ships_with_unless_one_is_given(path: Path) -> None:
    policies = (path, "--policy", "warm", "--policy", "chwbl", "--json")
    _, found = simulated(*policies)
    assert [(c["policy"], c["order"]) for c in found["cells"]] == [("warm", "shortest"), ("chwbl", "fcfs")]
    _, found = simulated(*policies, "--order", "fcfs")
    assert [c["order"] for c in found["cells"]] == ["fcfs", "fcfs"]


def shown(width: int, *policies: str, load: float | None = 0.4) -> str:
    findings = [find(TRACE, Cell(policy, FLEET, load)) for policy in policies]
    out = io.StringIO()
    Report(TRACE, FLEET, findings, 1.0).show(Console(file=out, width=width))
    return out.getvalue()


def test_a_table_that_is_too_wide_is_turned_round_and_then_split_but_never_cut() -> None:
    policies = ("warm", "round_robin", "prefix_affinity_balanced")
    upright, turned, split = (shown(width, *policies).splitlines() for width in (200, 80, 50))
    assert [line.split()[1] for line in upright if line.startswith("│")] == list(policies)
    (heads,) = [line.split() for line in turned if "policy" in line]
    assert [head for head in heads if head != "┃"] == ["policy", *policies]
    assert sum("policy" in line for line in split) == 2, "two runs fit, the third stands below"
    figures = {word for line in upright if line.startswith("│") for word in line.split() if word[0].isdigit()}
    for lines in (turned, split):
        assert figures <= set(" ".join(lines).split())
        assert max(len(line) for line in lines if line[0] in "┏│") <= (80 if lines is turned else 50)
    assert not any("…" in line for line in (*upright, *turned, *split))
    assert "prefix_affinity_balanced" in shown(20, *policies), "lines longer than the terminal, but whole"


def test_the_legend_explains_capacity_where_it_is_shown() -> None:
    assert "capacity:" not in shown(200, "warm")
    assert "capacity: the largest load" in shown(200, "warm", load=None)


def test_on_a_terminal_json_is_printed_only_when_asked_for(path: Path) -> None:
    def printed(*more: str) -> str:
        ours, theirs = pty.openpty()
        command = [sys.executable, "-m", "ops.cli", "simulate", str(path), "--workers", "1", *more]
        with subprocess.Popen(command, stdout=theirs, stderr=subprocess.DEVNULL):
            os.close(theirs)
            chunks = []
            while chunk := _read(ours):
                chunks.append(chunk)
        os.close(ours)
        return b"".join(chunks).decode()

    assert "policy" in printed() and '{"simulation"' not in printed()
    assert printed("--json").startswith('{"simulation"')


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65536)
    except OSError:  # what Linux says when the other side is closed
        return b""


def test_two_runs_print_the_same_but_for_the_seconds_they_took(path: Path) -> None:
    args = (path, "--policy", "random", "--policy", "power_of_two", "--json", "--seed", 7)
    (_, first), (_, second) = simulated(*args), simulated(*args)
    first.pop("seconds"), second.pop("seconds")
    assert first == second


def test_capacity_is_found_from_the_command_line(path: Path) -> None:
    _, found = simulated(path, "--capacity", "--replicas", 2, "--json")
    cell = found["cells"][0]
    assert cell["capacity"] == cell["load"] > 0.1 and cell["curve"][-1][0] == cell["load"]


def test_options_reach_the_fleet(path: Path) -> None:
    _, found = simulated(
        path, "--stale-ms", 500, "--events-ms", "never", "--ingresses", 2, "--max-ahead", 4, "--adapters", 6,
        "--adapter-slots", 2, "--tenants", 3, "--head", 40, "--repeat", 2, "--json",
    )  # fmt: skip
    assert (found["stats_delay_s"], found["events_delay_s"], found["requests"]) == (0.5, None, 80)
    cell = found["cells"][0]
    assert (cell["ingresses"], cell["max_ahead"]) == (2, 4)
    assert cell["adapter_loads"] > 0 and cell["swaps_of_pooled_lru"] > 0
    assert any("6 adapters" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (["--policy", "best"], 1, "error: no policy 'best'"),
        (["--capacity", "--load", "1"], 2, "leave out --load"),
        (["--order", "priority"], 2, "Invalid value for '--order'"),
        (["--load", "0"], 2, "Invalid value for '--load'"),
        (["--format", "azure"], 1, "error: "),
    ],
)
def test_wrong_options_are_one_line(path: Path, args: list[str], code: int, says: str) -> None:
    result = CliRunner().invoke(main, ["simulate", str(path), *args])
    assert result.exit_code == code and says in result.output and "Traceback" not in result.output


def test_help_is_that_of_the_group_and_of_its_verbs() -> None:
    runner = CliRunner()
    assert "calibrate" in runner.invoke(main, ["simulate", "--help"]).output
    of_trace = runner.invoke(main, ["simulate", "trace", "--help"]).output
    assert "--kv-tokens" in of_trace and all(name in of_trace for name in POLICIES)
    assert "  simulate" in runner.invoke(main, ["--help"]).output
