"""Findings on disk: kept at once, read again, and harmless where they are broken."""

from __future__ import annotations

from pathlib import Path

import pytest

from ops.bench.load_spec import Timing
from ops.tune.findings import Failure, Findings, key_of
from ops.tune.workload import Slo
from tests.ops.tune.made_up import made_run


def test_what_was_added_is_found_again_by_another_call(tmp_path: Path) -> None:
    path = tmp_path / "findings.jsonl"
    run = made_run({"a": 1, "b": None, "c": 0.5}, 2.0, 10.0, 15.0)
    failure = Failure(situation="made up", engine="e", values={"a": 9}, reason="no memory")
    first = Findings(path)
    first.add(run)
    first.add(failure)
    again = Findings(path)
    assert again.num_found == 2
    assert again.run("made up", {"c": 0.5, "b": None, "a": 1}, 2.0) == run
    assert again.failure("made up", {"a": 9}) == failure
    assert again.run("made up", {"c": 0.5, "b": None, "a": 1}, None) is None
    assert again.run("another profile", {"c": 0.5, "b": None, "a": 1}, 2.0) is None
    assert Findings(path, retry=True).failure("made up", {"a": 9}) is None


def test_a_line_that_was_cut_off_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "findings.jsonl"
    Findings(path).add(made_run({"a": 1}, None, 10.0, 15.0))
    with path.open("ab") as file:
        file.write(b'{"type":"run","situa')
    assert Findings(path).num_found == 1
    Findings(path).add(made_run({"a": 2}, None, 10.0, 15.0))
    assert Findings(path).num_found == 2, "what comes after it begins a line of its own"


def test_candidates_are_the_same_however_their_numbers_were_written() -> None:
    assert key_of({"b": 1.0, "a": 2}) == key_of({"a": 2, "b": 1.0}) == "a=2,b=1"
    assert key_of({"a": None}) != key_of({"a": 0})


def test_the_slo_is_applied_when_findings_are_read() -> None:
    run = made_run({"a": 1}, 5.0, 10.0, 15.0)  # TTFT 0.75 s, TPOT 0.05 s
    assert run.meets(Slo(ttft_s=0.75, tpot_s=0.05))
    assert not run.meets(Slo(ttft_s=0.7, tpot_s=0.05)) and not run.meets(Slo(ttft_s=0.75, tpot_s=0.04))
    assert not Slo().in_time(None)
    assert Slo().in_time(Timing(1.0, 0.1))


def test_how_many_requests_were_under_way_follows_from_their_times() -> None:
    run = made_run({"a": 1}, 5.0, 10.0, 15.0)  # 20 answers of 8 tokens, 1.1 s each, in 4 s
    assert run.mean_under_way == pytest.approx(5.5)
