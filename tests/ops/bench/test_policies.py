"""`bench policies`: which cells there are, what is kept of them, and what the tables say; on very small fleets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from ops.bench import policies
from ops.bench.harness import BenchError
from ops.bench.policies import BLIND, OURS, STALE, Findings, Grid, Key, Row, Situation, Work, Workload, near
from ops.bench.policies_plot import plot
from ops.bench.policies_report import UNBOUNDED, PoliciesReport
from ops.cli import main
from ops.simulate.trace import Trace
from tests.ops.simulate.making import conversations
from tests.ops.simulate.test_readers import mooncake, write_lines

WORKLOAD = Workload("conversation", conversations(60, 20.0))
SMALL = Grid(replicas=(2,), kv_tokens=(20_000,), policies=("warm", "round_robin"), tolerance=0.2, stale_replicas=2)


def found(grid: Grid, findings: Findings | None = None, num_workers: int = 1) -> tuple[list[Row], list[Row]]:
    """All rows, and those that were told."""
    told: list[Row] = []
    return policies.run([WORKLOAD], grid, findings or Findings(), Work(num_workers, told.append)), told


def key(policy: str = OURS, order: Any = "shortest", num_replicas: int = 8, **more: Any) -> Key:
    return Key("conversation", 100, policy, order, num_replicas, more.pop("kv_tokens", 512_000), **more)


def row(at: Key, capacity: float, of_pooled_lru: float = 0.95) -> Row:
    return Row(at, capacity, 0.3, of_pooled_lru, 0.1, 2.0, 5.0, 1.1)


def test_baselines_are_tried_in_both_orders_and_ours_in_its_own_and_with_late_news() -> None:
    keys = list(SMALL.keys(WORKLOAD, 2, ()))
    assert [(k.policy, k.order) for k in keys if k.situation == Situation()] == [
        ("round_robin", "fcfs"), ("warm", "shortest"), ("round_robin", "shortest")
    ]  # fmt: skip
    assert [k.situation for k in keys if k.situation != Situation()] == list(STALE.values())
    assert {k.policy for k in keys if k.situation != Situation()} == {OURS}
    other = Workload("agentic", WORKLOAD.trace)
    assert all(k.situation == Situation() for k in SMALL.keys(other, 2, ()))
    assert SMALL.num_cells([WORKLOAD, other]) == 7 + 3


def test_among_many_replicas_the_three_best_are_tried_one_of_them_without_events() -> None:
    capacities = {"greedy_ttft": 0.9, "overlap_cost": 0.8, "random": 0.7, "round_robin": 0.1, "chwbl": 0.2}
    grid = Grid(replicas=(16, 64), kv_tokens=(512_000,), policies=("warm", *capacities), stale_replicas=0)
    tried = len(WORKLOAD.trace.requests)
    rows = [
        row(msgspec.structs.replace(key(policy, order, replicas), num_requests=tried), capacity + replicas)
        for policy, capacity in capacities.items()
        for order in ("fcfs", "shortest")
        for replicas in (8, 16)
    ]
    keys = list(grid.keys(WORKLOAD, 64, rows))
    assert [k.policy for k in keys if k.order == "fcfs"] == ["greedy_ttft", "overlap_cost", "chwbl"]
    assert [k.policy for k in keys if k.order == "shortest"] == ["warm", "greedy_ttft", "overlap_cost", "chwbl"]
    assert len(list(grid.keys(WORKLOAD, 64, ()))) == 11, "all of them where nothing is known"


def test_a_run_that_was_ended_goes_on_where_it_was(tmp_path: Path) -> None:
    file = tmp_path / "found.jsonl"
    rows, told = found(SMALL, Findings.opened(file))
    assert len(rows) == len(told) == 7 and all(r.capacity > 0 for r in rows)
    assert len(file.read_text().splitlines()) == 7
    file.write_text("\n".join(file.read_text().splitlines()[:5]) + "\n")
    findings = Findings.opened(file)
    assert len(findings.rows) == 5
    again, told = found(SMALL, findings)
    assert again == rows and len(told) == 7
    assert len(file.read_text().splitlines()) == 7


def test_two_workers_find_the_same() -> None:
    grid = msgspec_free(SMALL)
    assert {r.key for r in found(grid, num_workers=2)[0]} == {r.key for r in found(grid)[0]}


def msgspec_free(grid: Grid) -> Grid:
    return Grid(replicas=grid.replicas, kv_tokens=grid.kv_tokens, policies=grid.policies, tolerance=0.5)


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "other.jsonl"
    file.write_text('{"a": 1}\n')
    with pytest.raises(BenchError, match=r"other\.jsonl, line 1"):
        Findings.opened(file)


def test_a_search_begins_where_the_most_similar_cell_ended() -> None:
    rows = [row(key(num_replicas=4), 1.0), row(key(num_replicas=16), 2.0), row(key(kv_tokens=4_000_000), 3.0)]
    assert near(rows, key(num_replicas=32)) == 2.0
    assert near(rows, key(num_replicas=4, kv_tokens=4_000_000)) == 3.0
    assert near(rows, key(num_replicas=4, situation=Situation(0.5, 0.5))) == 1.0
    assert near(rows, key("round_robin")) is None


def report(*rows: Row) -> PoliciesReport:
    return PoliciesReport(rows, ["warmgate", "bench", "policies"], {"tolerance": 0.01})


def test_goals_are_those_of_the_trace_and_a_missed_one_is_marked() -> None:
    rows = [row(key(), 1.0), row(key("chwbl", "fcfs"), 0.5), row(key("cache_aware", "fcfs"), 0.3),
            row(key("greedy_ttft", "fcfs"), 0.8), row(key("greedy_ttft"), 0.99), row(key("random"), 0.2)]  # fmt: skip
    ratios = {ratio.name: ratio for ratio in report(*rows).ratios()}
    column = (8, 512_000)
    assert {name: round(ratio.values[column], 3) for name, ratio in ratios.items()} == {
        "best of those without events, first come": 2.0,
        "greedy_ttft, first come": 1.25,
        "best of all, same order": 1.01,
        "hits of pooled LRU": 0.95,
    }
    assert [ratio.goals[column].met_by(ratio.values[column]) for ratio in ratios.values()] == [False, True, False, True]
    text = report(*rows).markdown()
    assert "| 2.000 ✗ |" in text and "| 1.250 |" in text and "2 of 4 goals reached." in text
    assert "| greedy_ttft | 0.8 / 0.99 |" in text and "| warm | – / 1 |" in text


def test_hits_are_asked_for_by_how_ample_the_caches_are() -> None:
    rows = [row(key(), 1.0, 0.93), row(key(kv_tokens=4_000_000), 1.0, 0.96)]
    (hits,) = [ratio for ratio in report(*rows).ratios() if ratio.name == "hits of pooled LRU"]
    assert [str(goal) for goal in hits.goals.values()] == ["≥ 0.92", "≥ 0.97"] and hits.num_reached == 1


def test_a_fleet_that_the_trace_cannot_fill_is_shown_and_not_judged() -> None:
    full = UNBOUNDED + 1
    found = report(row(key(), full), row(key("greedy_ttft", "fcfs"), full), row(key("greedy_ttft"), 17.0))
    assert "| greedy_ttft | ≥ 195 / 17 |" in found.markdown()
    assert [ratio.name for ratio in found.ratios() if ratio.goals] == ["hits of pooled LRU"]


def test_stale_knowledge_is_set_against_fresh_and_none_against_the_best_baseline() -> None:
    stale = [row(key(situation=situation), 0.9) for situation in STALE.values()]
    rows = [row(key(), 1.0), row(key("greedy_ttft", "fcfs"), 0.8), *stale]
    values = [ratio.values[8, 512_000] for ratio in report(*rows).ratios()][-4:]
    assert values == pytest.approx([0.9, 0.9, 1.125, 1.125])
    assert set(BLIND) >= {"chwbl", "round_robin"}


def test_a_picture_is_drawn(tmp_path: Path) -> None:
    plot([row(key(), 1.0), row(key("chwbl", "fcfs"), 0.5), row(key("chwbl"), 0.7)], tmp_path / "images" / "p.png")
    assert (tmp_path / "images" / "p.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    rows = [mooncake(300.0 * i, 700 + 40 * i, [0, i % 5 + 1], num_output=3) for i in range(40)]
    return write_lines(tmp_path / "small_conversation.jsonl", *rows)


def test_the_command_ends_with_one_json_object_and_records_its_section(
    trace_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = ["bench", "policies", "--trace", trace_file, "--replicas", 2, "--kv-tokens", 20_000, "--head", 30,
                 "--policy", "warm", "--policy", "chwbl", "--tolerance", 0.3, "--findings", "f.jsonl",
                 "--record"]  # fmt: skip
    done = CliRunner().invoke(main, list(map(str, arguments)))
    assert done.exit_code == 0, done.output
    line = json.loads(done.stdout.splitlines()[-1])
    assert line["benchmark"] == "policies" and len(line["rows"]) == 3
    assert line["facts"]["traces"]["conversation"]["first requests"] == 30
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page.count("<!-- bench:policies -->") == 1 and "| chwbl |" in page


@pytest.mark.parametrize(("policy", "says"), [("best", "no policy 'best'")])
def test_an_unknown_policy_is_one_line(trace_file: Path, policy: str, says: str) -> None:
    done = CliRunner().invoke(main, ["bench", "policies", "--trace", str(trace_file), "--policy", policy])
    assert done.exit_code == 1 and says in done.output and "Traceback" not in done.output


def test_a_workload_is_named_after_its_file_and_cut(trace_file: Path, tmp_path: Path) -> None:
    assert Workload.read(trace_file, 10).name == "conversation"
    assert len(Workload.read(trace_file, 10).trace.requests) == 10
    session = {"block_size": 64, "requests": [
        {"t": float(i), "in": 640 * (i + 1), "out": 5, "think_time": 1.0, "hash_rle": [[0, 10 * (i + 1)]]}
        for i in range(3)
    ]}  # fmt: skip
    read = Workload.read(write_lines(tmp_path / "agentic_sessions.jsonl", session), 100)
    assert (read.name, read.trace.block_tokens) == ("agentic", 512)
    assert isinstance(read.trace, Trace)
