"""`warmgate tune` as a person calls it: real replicas that pretend, a real ingress, real load."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from configs.load import load_config
from ops.cli import main
from ops.tune.findings import Findings
from tests.ops.tiny_llama import write_tiny_llama
from tests.ops.tune.profiles import write_profile

ROOT = Path(__file__).parents[3]
ENGINE = {"kind": "sim", "max_num_seqs": 2, "max_num_batched_tokens": 256, "sim": {"step_base_s": 0.02}}
"""A step takes 20 ms whatever is in it: twice the sequences, twice the throughput."""

SLOW = {"kind": "sim", "max_num_seqs": 1, "max_num_batched_tokens": 256, "sim": {"step_base_s": 0.05}}
"""Five requests a second, and forty with eight sequences: far apart beside what a pause of the machine takes away."""

LOAD = ["--input-tokens", "96", "--shared-tokens", "64", "--output-tokens", "4", "--requests", "12"]
SLO = ["--ttft-ms", "400", "--tpot-ms", "200"]


def tune(*words: str) -> Result:
    return CliRunner().invoke(main, ["tune", *words], prog_name="warmgate")


def last_line(result: Result) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def test_the_best_profile_is_the_best_of_the_findings_and_loads(tmp_path: Path) -> None:
    profile, out = write_profile(tmp_path / "mine.yaml", SLOW), tmp_path / "out"
    words = [
        str(profile),
        *LOAD,
        *("--requests", "20", "--ttft-ms", "2000", "--tpot-ms", "1000"),
        "--sweep",
        "max_num_seqs=8",
        "--minutes",
        "10",
        "--out",
        str(out),
    ]
    result = tune(*words)
    assert result.exit_code == 0, result.output
    said = last_line(result)
    (engine,) = said["engines"]
    assert (engine["engine"], engine["candidates"], engine["failed"]) == ("sim", 2, 0)
    assert engine["finished"] and said["stopped"] is None
    assert engine["values"]["max_num_seqs"] == 8
    written = load_config(out / "best.yaml", {})
    assert (out / "best.yaml").stat().st_mode & 0o777 == 0o600, "profiles can hold keys"
    assert written.groups[0].engine.max_num_seqs == 8
    assert written.groups[0].engine.sim.step_base_s == 0.05
    found = [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]
    (again,) = (run for run in found if run["repeat"])
    assert (again["values"]["max_num_seqs"], again["rate"]) == (1, engine["best"]["requests_per_s"])
    assert engine["profile_again_in_time"] < 0.95, "eight times the sequences is no chance"
    runs = [run for run in found if not run["repeat"]]
    assert Counter(run["values"]["max_num_seqs"] for run in runs if run["rate"] is None) == {1: 1, 8: 1}
    in_time = {
        run["rate"]: run["values"]["max_num_seqs"]
        for run in runs
        if run["rate"] and sum(t is not None and t[0] <= 2.0 for t in run["timings"]) >= 0.95 * len(run["timings"])
    }
    assert in_time[max(in_time)] == 8 and max(in_time) == engine["best"]["requests_per_s"]
    assert all(run["num_prompt_tokens"] == 20 * 96 and run["num_output_tokens"] == 20 * 4 for run in runs)
    report = (out / "report.md").read_text()
    assert "a difference, as far as one look tells" in report
    assert "max_num_seqs=8" in report and "counted by the replicas: 96.0 tokens a prompt" in report
    assert "native is left out: sim:bytes has no weights" in report
    for picture in ("latency.png", "throughput.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG") and f"]({picture})" in report
    assert str(tmp_path) not in report

    before = (out / "findings.jsonl").read_bytes()
    again = tune(*words)
    assert again.exit_code == 0, again.output
    assert (out / "findings.jsonl").read_bytes() == before, "nothing was measured twice"
    assert last_line(again)["engines"] == said["engines"]


@pytest.mark.slow
def test_an_interrupted_sweep_keeps_what_it_found_and_goes_on(tmp_path: Path) -> None:
    profile, out = write_profile(tmp_path / "mine.yaml", ENGINE), tmp_path / "out"
    words = [*LOAD, *SLO, "--rate", "5", "--sweep", "max_num_seqs=4,8", "--minutes", "3", "--out", str(out)]
    command = [sys.executable, "-m", "ops.cli", "tune", str(profile), *words]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env={**os.environ}
    )
    assert process.stderr is not None
    while not process.stderr.readline().startswith("ok"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    said = json.loads(stdout.splitlines()[-1])
    assert said["stopped"] == "interrupted"
    assert "stopping: what was found is kept" in stderr and "Traceback" not in stderr
    assert load_config(out / "best.yaml", {}).groups[0].engine.max_num_seqs == 2
    assert "Interrupted before everything was tried" in (out / "report.md").read_text()
    found = (out / "findings.jsonl").read_bytes()

    again = tune(str(profile), *words)
    assert again.exit_code == 0, again.output
    assert last_line(again)["engines"][0]["candidates"] == 3
    assert (out / "findings.jsonl").read_bytes().startswith(found)
    lines = [json.loads(line) for line in (out / "findings.jsonl").read_text().splitlines()]
    measured = Counter((line["values"]["max_num_seqs"], line["rate"]) for line in lines)
    assert set(measured.values()) == {1}, "nothing was measured twice"


def test_the_time_is_bounded_and_the_report_says_so(tmp_path: Path) -> None:
    profile, out = write_profile(tmp_path / "mine.yaml", ENGINE), tmp_path / "out"
    began = time.monotonic()
    result = tune(str(profile), *LOAD, *SLO, "--rate", "0.5", "--minutes", "0.1", "--out", str(out))
    assert time.monotonic() - began < 40
    assert result.exit_code == 1
    assert result.stderr.splitlines()[-1] == "error: no candidate could be measured: it was stopped too early"
    assert "The 0.1 minutes were over" in (out / "report.md").read_text()


@pytest.mark.slow
def test_a_candidate_that_cannot_start_is_a_line_with_its_reason(tmp_path: Path) -> None:
    """A cache of a kilobyte holds no block: the in-house engine says so, and the sweep goes on."""
    model = write_tiny_llama(tmp_path / "tiny")
    engine = {"kind": "native", "max_num_seqs": 4, "kv_cache_gib": 0.01, "kernels": "none", "structured": False}
    profile, out = write_profile(tmp_path / "mine.yaml", engine, source=str(model)), tmp_path / "out"
    words = [*LOAD, *SLO, "--rate", "4", "--sweep", "kv_cache_gib=0.000001", "--minutes", "4", "--out", str(out)]
    result = tune(str(profile), *words)
    assert result.exit_code == 0, result.output
    said = last_line(result)
    assert [(e["engine"], e["candidates"], e["failed"]) for e in said["engines"]] == [("native", 2, 1)]
    assert said["engines"][0]["values"]["kv_cache_gib"] == 0.01
    report = (out / "report.md").read_text()
    assert "failed: the replica r0 did not start: EngineError: the KV cache holds 0 tokens" in report
    assert len(list(out.glob("failed-native-*.log"))) == 1
    assert any(line.startswith("failed") and "kv_cache_gib=1e-06" in line for line in result.stderr.splitlines())
    assert Findings(out / "findings.jsonl").num_found == 3
    assert "Nothing is compared: the profile's own engine is native" in report


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["mixed"], "groups: there are native, vllm, pretended: choose one with --group"),
        (["mixed", "--group", "vlm"], "groups: no group 'vlm'; there is: native, vllm, pretended"),
        (["sim", "--sweep", "seqs=1"], "error: --sweep seqs=1: unknown knob 'seqs'; there are max_num_seqs, "),
        (["sim", "--sweep", "max_num_seqs=0"], "error: --sweep max_num_seqs=0: max_num_seqs: expected int >= 1, got 0"),
        (
            ["sim", "--sweep", "gpu_memory_utilization=0.5"],
            "error: --sweep gpu_memory_utilization: sim here has no such knob; there is max_num_seqs, ",
        ),
        (["sim", "--shared-tokens", "600"], "error: --shared-tokens 600 is more than --input-tokens 512"),
        (
            ["sim", "--input-tokens", "8192"],
            "error: --input-tokens 8192 and --output-tokens 64 are beyond the context of 8192 tokens",
        ),
        (["simm"], "error: simm: no such profile or file; did you mean 'sim'?"),
        (["quickstart"], "models[0].source: model 'smollm2-135m' is not at "),
        (["sim", "--set", "http.prot=1"], "error: --set http.prot: http.prot: unknown key; did you mean 'port'?"),
    ],
)
def test_a_mistake_is_one_line(
    words: list[str], expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMGATE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    result = tune(*words)
    assert result.exit_code in (1, 2)
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: "), result.stderr
    assert expected in result.stderr


def test_a_server_that_runs_already_cannot_be_tuned(tmp_path: Path) -> None:
    engine = {"kind": "openai", "upstream": {"url": "http://127.0.0.1:9"}}
    result = tune(str(write_profile(tmp_path / "up.yaml", engine)), "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert "group one is a server that runs already: tune it where it is started" in result.stderr


def test_without_vllm_or_matplotlib_it_says_how_to_get_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_tiny_llama(tmp_path / "tiny")
    profile = write_profile(tmp_path / "v.yaml", {"kind": "vllm"}, source=str(model))
    monkeypatch.setattr("replicas.vllm.versions.TRIED", ("0.1",))
    result = tune(str(profile), *LOAD, "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: vLLM ") and result.stderr.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    result = tune("sim", "--out", str(tmp_path / "out"))
    assert result.exit_code == 1
    assert result.stderr.startswith("error: a plot needs matplotlib: ")


@pytest.mark.slow
@pytest.mark.model
def test_a_real_model_on_the_in_house_engine_is_tuned_and_its_best_profile_loads(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["quickstart", "--set", "groups.0.replicas=1", "--set", "groups.0.engine.kv_cache_gib=0.1", *LOAD]
    result = tune(*words, "--ttft-ms", "8000", "--tpot-ms", "2000", "--sweep", "max_num_seqs=2", "--out", str(out))
    assert result.exit_code == 0, result.output
    (engine,) = last_line(result)["engines"]
    assert (engine["engine"], engine["candidates"], engine["failed"], engine["finished"]) == ("native", 2, 0, True)
    written = load_config(out / "best.yaml", {}).groups[0]
    assert (written.replicas, written.engine.kv_cache_gib) == (1, 0.1)
    assert written.engine.max_num_seqs == engine["values"]["max_num_seqs"]
    assert engine["best"]["ttft_ms"]["p99"] <= 8000
