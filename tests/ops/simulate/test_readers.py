"""Every format, read from a file the test writes; and what is wrong with one, by file and line."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from ops.simulate.bounds import infinite_cache_hit
from ops.simulate.errors import TraceError
from ops.simulate.formats import load_trace
from ops.simulate.readers import SessionOptions, read_sessions
from ops.simulate.servegen import ServeGenOptions, read_servegen
from ops.simulate.trace import Trace


def write_lines(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def mooncake(at_ms: float, num_prompt: int, ids: list[int], num_output: int = 7) -> dict[str, Any]:
    return {"timestamp": at_ms, "input_length": num_prompt, "output_length": num_output, "hash_ids": ids}


def test_mooncake_lines_become_requests_with_chained_blocks(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "t.jsonl", mooncake(0, 1100, [0, 1, 2]), mooncake(500, 1500, [0, 1, 3]), mooncake(2500, 600, [9, 1])
    )
    trace = load_trace(path)
    assert trace.block_tokens == 512
    assert [r.arrival_s for r in trace.requests] == [0.0, 0.5, 2.5]
    assert [(r.num_prompt, r.num_output) for r in trace.requests] == [(1100, 7), (1500, 7), (600, 7)]
    first, second, third = (r.blocks for r in trace.requests)
    assert first[:2] == second[:2] and first[2] != second[2]
    assert third[1] != first[1], "the same block after another prefix is another block"


def test_equal_time_stamps_are_spread_to_the_next_one(tmp_path: Path) -> None:
    rows = [mooncake(at, 512, [n]) for n, at in enumerate([0, 0, 0, 3000, 3000, 6000])]
    trace = load_trace(write_lines(tmp_path / "t.jsonl", *rows))
    times = [r.arrival_s for r in trace.requests]
    assert times == sorted(times) and len(set(times)) == 6
    assert all(0 <= t < 3 for t in times[:3]) and all(3 <= t < 6 for t in times[3:5]) and times[5] == 6
    assert trace.notes == ("equal time stamps are spread over their tick",)


def session(*requests: dict[str, Any], block_size: int = 64) -> dict[str, Any]:
    return {"id": "s", "block_size": block_size, "requests": list(requests)}


def turn(t: float, num_prompt: int, runs: list[list[int]], **more: Any) -> dict[str, Any]:
    return {"t": t, "type": "n", "in": num_prompt, "out": 5, "think_time": 2.0, "hash_rle": runs, **more}


def test_a_turn_of_a_session_follows_the_one_before_and_shares_its_prompt(tmp_path: Path) -> None:
    path = tmp_path / "s.jsonl.gz"
    with gzip.open(path, "wt") as lines:
        turns = (turn(0, 520, [[1, 8]]), turn(9, 800, [[1, 7], [30, 5]], think_time=500.0), turn(20, 1100, [[1, 17]]))
        lines.write(json.dumps(session(*turns)) + "\n")
        lines.write(json.dumps(session(turn(0, 300, [[1, 4]]))) + "\n")
    trace = read_sessions(path, SessionOptions(block_tokens=128, max_think_s=60.0))
    of_first = [r for r in trace.requests if r.num_prompt != 300]
    other = next(r for r in trace.requests if r.num_prompt == 300)
    assert [None if r.after is None else trace.requests[r.after].num_prompt for r in of_first] == [None, 520, 800]
    assert [r.think_s for r in of_first] == [0.0, 60.0, 2.0]
    assert [len(r.blocks) for r in of_first] == [4, 6, 8]
    assert of_first[1].blocks[:3] == of_first[0].blocks[:3] and of_first[1].blocks[3] != of_first[0].blocks[3]
    assert of_first[2].blocks[:4] == of_first[0].blocks
    assert not set(other.blocks) & {b for r in of_first for b in r.blocks}, "ids are local to a session"


def test_runs_cut_elsewhere_are_still_the_same_blocks(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "s.jsonl", session(turn(0, 512, [[1, 8]]), turn(1, 512, [[1, 3], [4, 5]]), turn(2, 512, [[1, 8]]))
    )
    trace = read_sessions(path, SessionOptions(block_tokens=128))
    assert len({r.blocks for r in trace.requests}) == 1


def test_a_pause_the_trace_does_not_tell_is_the_gap_without_the_answer(tmp_path: Path) -> None:
    second = turn(30, 128, [[1, 2]])
    del second["think_time"]
    path = write_lines(tmp_path / "s.jsonl", session(turn(0, 64, [[1, 1]], api_time=12.0), second))
    assert read_sessions(path).requests[1].think_s == 18.0


def test_runs_of_sub_agents_are_left_out(tmp_path: Path) -> None:
    agent = {"t": 3.0, "type": "subagent", "requests": [turn(0, 64, [[5, 1]])]}
    trace = load_trace(write_lines(tmp_path / "s.jsonl", session(turn(0, 64, [[1, 1]]), agent, turn(9, 64, [[1, 1]]))))
    assert len(trace.requests) == 2 and "1 runs of sub-agents left out" in trace.notes


def test_azure_rows_have_lengths_and_times_to_the_tenth_of_a_microsecond(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(
        "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:16:00,10,1\n"
    )
    first, second = load_trace(path).requests
    assert (first.num_prompt, first.num_output, first.blocks) == (374, 44, ())
    assert second.arrival_s - first.arrival_s == pytest.approx(13.31941, abs=1e-6)


def servegen(path: Path, **files: str) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, text in files.items():
            member = tarfile.TarInfo(f"data/x/chunk-{name.replace('__', '.').replace('_', '-', 1)}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return path


LENGTHS = json.dumps({"0": {"input_tokens": "{100: 0.5, 300: 0.5}", "output_tokens": "{9: 1.0}"}})


def test_servegen_clients_become_tenants_that_ask_at_their_rates(tmp_path: Path) -> None:
    path = servegen(
        tmp_path / "g.tar.gz",
        **{
            "0_trace__csv": "0,0,0,,0,0\n600,2.0,1.0,Gamma,0.5,1.0\n1200,0.1,1,Gamma,1,1\n",
            "0_dataset__json": LENGTHS,
            "7_trace__csv": "0,1.0,0.9,Weibull,1.2,1.0\n600,6.0,0.9,Weibull,1.2,0.3\n",
            "7_dataset__json": LENGTHS,
        },
    )
    trace = load_trace(path)
    by_tenant = {t: sum(r.tenant == t for r in trace.requests) for t in ("client-0", "client-7")}
    assert by_tenant["client-0"] == pytest.approx(1200, rel=0.15)
    assert by_tenant["client-7"] == pytest.approx(3600, rel=0.05)
    assert {r.num_prompt for r in trace.requests} == {100, 300} and {r.num_output for r in trace.requests} == {9}
    assert trace.duration_s == pytest.approx(600, abs=5)
    assert read_servegen(path, ServeGenOptions(begin_s=600.0)).requests == trace.requests, "the busiest, same draws"
    assert read_servegen(path, ServeGenOptions(seed=1)).requests != trace.requests


def usage(time: float, num_prompt: int, num_cached: int, **more: Any) -> dict[str, Any]:
    return {
        "time": time, "request_id": "r", "client_request_id": None, "tenant": "acme", "model": "m", "route": "/v1/chat",
        "stream": True, "outcome": "ok", "status": 200, "code": None, "user": None, "num_choices": 1,
        "num_prompt_tokens": num_prompt, "num_cached_tokens": num_cached, "num_completion_tokens": 20, "ttft_s": 0.1,
        "duration_s": 1.0, "inter_token_s": 0.02, **more,
    }  # fmt: skip


def test_the_gateways_own_log_can_be_played_again_with_as_much_to_share_as_was(tmp_path: Path) -> None:
    path = write_lines(
        tmp_path / "usage.jsonl",
        usage(100.0, 640, 0, user="ann"),
        usage(101.0, 640, 0, user="bob"),
        usage(104.0, 1280, 640, user="ann"),
        usage(105.0, 640, 320, tenant="other"),
        usage(106.0, 900, 0, model="another"),
        usage(107.0, 900, 0, outcome="refused", num_completion_tokens=0),
    )
    trace = load_trace(path)
    ann, bob, ann_again, other = trace.requests
    assert [r.arrival_s - 100 for r in trace.requests] == [0, 1, 4, 5]
    assert ann_again.blocks[:10] == ann.blocks and len(ann_again.blocks) == 20
    assert not set(bob.blocks) & set(ann.blocks) and not set(other.blocks) & set(ann.blocks)
    assert other.tenant == "other"
    assert infinite_cache_hit(trace.requests, trace.block_tokens) == pytest.approx(639 / 3200, abs=0.001)
    assert any("2 records" in note for note in trace.notes)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("t.jsonl", '{"hash_ids": [1]}\n', r"t\.jsonl, line 1: no 'input_length'"),
        ("t.jsonl", json.dumps(mooncake(0, 600, [1])) + "\n{oops\n", r"t\.jsonl, line 2: not JSON"),
        ("t.jsonl", json.dumps(mooncake(0, 600, [1, 2, 3])) + "\n", r"line 1: 3 hash_ids for 600 tokens"),
        ("t.jsonl", json.dumps(mooncake(0, -5, [])) + "\n", r"line 1: 'input_length' is -5"),
        ("t.jsonl", json.dumps(mooncake(float("nan"), 5, [])) + "\n", r"line 1: 'timestamp' is nan"),
        ("t.jsonl", "[]\n", r"line 1: not a JSON object"),
        ("t.jsonl", "", r"there are no requests in it"),
        ("t.jsonl", '{"a": 1}\n', r"line 1: no format of ours has these keys: a"),
        ("s.jsonl", json.dumps(session(turn(0, 9, [[1]]))) + "\n", r"s\.jsonl, line 1: 'hash_rle'"),
        ("s.jsonl", json.dumps(session(turn(0, 9, []), block_size=100)) + "\n", r"256 tokens cannot be made of 100"),
        ("s.jsonl.gz", "not gzip", r"s\.jsonl\.gz"),
        ("a.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\nsoon,1,1\n", r"a\.csv, line 2: 'TIMESTAMP' is no time"),
        ("a.csv", "a,b\n1,2\n", r"a\.csv, line 2: 'TIMESTAMP'"),
        ("g.tar.gz", "no tar", r"g\.tar\.gz"),
        ("u.jsonl", '{"num_completion_tokens": 1}\n', r"u\.jsonl, line 1: no usage record"),
    ],
)
def test_what_is_wrong_with_a_trace_is_said_with_file_and_line(tmp_path: Path, name: str, text: str, says: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError, match=says):
        load_trace(tmp_path / name)


def test_bad_histograms_and_laws_are_named_with_their_member(tmp_path: Path) -> None:
    path = servegen(tmp_path / "g.tar.gz", **{"0_trace__csv": "0,1,1,Pareto,1,1\n", "0_dataset__json": LENGTHS})
    with pytest.raises(TraceError, match=r"chunk-0-trace\.csv, line 1: unknown law 'Pareto'"):
        load_trace(path)
    path = servegen(tmp_path / "h.tar.gz", **{"0_trace__csv": "0,1,1,Gamma,1,1\n", "0_dataset__json": "{}x"})
    with pytest.raises(TraceError, match=r"chunk-0-dataset\.json: no histograms"):
        load_trace(path)


def test_a_request_too_long_for_a_replica_is_left_out_and_its_followers_follow_what_it_followed(tmp_path: Path) -> None:
    turns = (turn(0, 64, [[1, 1]]), turn(5, 6400, [[1, 100]]), turn(9, 128, [[1, 2]], think_time=3.0))
    trace = read_sessions(write_lines(tmp_path / "s.jsonl", session(*turns)))
    fitting: Trace = trace.only_fitting(1000)
    assert [(r.num_prompt, r.after, r.think_s) for r in fitting.requests] == [(64, None, 0.0), (128, 0, 5.0)]
    assert fitting.notes[-1] == "1 requests of more than 1000 tokens left out"
    assert trace.only_fitting(10_000) is trace
