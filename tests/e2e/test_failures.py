"""What breaks, and what the client sees of it, on the real stack."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.conftest import MODEL, Stack

pytestmark = [pytest.mark.ray, pytest.mark.model]


def samples(stack: Stack, name: str) -> list[float]:
    """The values of one metric, as whichever ingress answers sees them."""
    text = httpx.get(f"{stack.url}/metrics", timeout=10).text
    return [s.value for family in text_string_to_metric_families(text) for s in family.samples if s.name == name]


def wait_until(condition: Any, limit_s: float) -> float:
    begun = time.monotonic()
    while time.monotonic() - begun < limit_s:
        if condition():
            return time.monotonic() - begun
        time.sleep(0.05)
    raise AssertionError(f"still not so after {limit_s} s")


def free_when_idle(stack: Stack) -> float:
    """KV blocks free at all replicas when nothing runs: the same in several looks, as each ingress answers with what
    it last heard."""
    seen: list[float] = []

    def settled() -> bool:
        idle = sum(samples(stack, "warmgate_replica_running")) == 0
        seen.append(sum(samples(stack, "warmgate_replica_free_kv_blocks")) if idle else -1.0)
        return len(seen) >= 12 and seen[-1] >= 0 and len(set(seen[-12:])) == 1

    wait_until(settled, 20)
    return seen[-1]


def long_stream(stack: Stack) -> dict[str, Any]:
    return {
        "url": f"{stack.url}/v1/completions",
        "json": {"model": MODEL, "prompt": "Once", "max_tokens": 2000, "ignore_eos": True, "stream": True},
        "timeout": 60,
    }


def test_a_client_that_leaves_frees_its_blocks(stack: Stack) -> None:
    free = free_when_idle(stack)
    with httpx.stream("POST", **long_stream(stack)) as response:
        lines = response.iter_lines()
        for _ in range(6):
            next(lines)
        wait_until(lambda: sum(samples(stack, "warmgate_replica_free_kv_blocks")) < free, 15)
    wait_until(lambda: sum(samples(stack, "warmgate_replica_running")) == 0, 15)
    wait_until(lambda: sum(samples(stack, "warmgate_replica_free_kv_blocks")) == free, 15)


def test_both_ingress_replicas_answer_alike(stack: Stack, client: openai.OpenAI) -> None:
    def ask(_: int) -> tuple[str | None, str]:
        raw = client.chat.completions.with_raw_response.create(
            model=MODEL, messages=[{"role": "user", "content": "What is the capital of France?"}], temperature=0
        )
        return raw.headers.get("x-warmgate-ingress"), raw.parse().choices[0].message.content or ""

    with ThreadPoolExecutor(8) as pool:
        seen = list(pool.map(ask, range(24)))
    assert {text for _, text in seen} == {"The capital of France is Paris."}
    assert len({ingress for ingress, _ in seen}) == 2


@pytest.mark.timeout(600)
def test_a_replica_killed_in_mid_stream_ends_in_an_error_event(stack: Stack) -> None:
    victims = stack.replica_pids("smollm2")
    assert len(victims) == 2
    with httpx.stream("POST", **long_stream(stack)) as response:
        replica = response.headers["x-warmgate-replica"]
        lines = (line for line in response.iter_lines() if line)
        for _ in range(6):
            next(lines)
        os.kill(pid_of(stack, replica), signal.SIGKILL)
        killed = time.monotonic()
        rest = list(lines)
    assert time.monotonic() - killed < 6.0, "its socket closed; silence would take eight seconds"
    assert rest[-1] != "data: [DONE]"
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] == "replica_lost"
    wait_until(lambda: len(set(stack.replica_pids("smollm2")) - {*victims}) >= 1, 240)
    wait_until(lambda: samples(stack, "warmgate_replicas_ready") == [2.0], 240)


def pid_of(stack: Stack, replica: str) -> int:
    text = httpx.get(f"{stack.url}/metrics", timeout=10).text
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == "warmgate_replica_info" and sample.labels["replica"] == replica:
                return int(sample.labels["pid"])
    raise AssertionError(f"{replica} is not in the metrics")


@pytest.mark.timeout(600)
def test_no_request_fails_when_a_replica_dies_before_its_first_token(stack: Stack, client: openai.OpenAI) -> None:
    wait_until(lambda: samples(stack, "warmgate_replicas_ready") == [2.0], 240)
    victim = stack.replica_pids("smollm2")[0]
    prompts = [f"{n} " + "word " * 1500 for n in range(6)]

    def ask(prompt: str) -> str:
        made = client.completions.create(model=MODEL, prompt=prompt, max_tokens=1, temperature=0)
        return made.choices[0].finish_reason

    killer = threading.Thread(target=kill_when_busy, args=(stack, victim))
    killer.start()
    with ThreadPoolExecutor(6) as pool:
        reasons = list(pool.map(ask, prompts))
    killer.join()
    assert reasons == ["length"] * 6
    wait_until(lambda: samples(stack, "warmgate_replicas_ready") == [2.0], 240)


def kill_when_busy(stack: Stack, pid: int) -> None:
    """Kills a replica once it is computing prompts: nothing it has taken can have had its first token."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        text = httpx.get(f"{stack.url}/metrics", timeout=10).text
        values = {(s.name, s.labels.get("replica")): s for f in text_string_to_metric_families(text) for s in f.samples}
        replica = next((s.labels["replica"] for s in values.values() if s.labels.get("pid") == str(pid)), None)
        waiting = values.get(("warmgate_replica_waiting_tokens", replica))
        if waiting is not None and waiting.value > 1000:
            os.kill(pid, signal.SIGKILL)
            return
        time.sleep(0.05)
    raise AssertionError("the replica never had a long prompt to compute")


@pytest.fixture()
def other(tmp_path: Any) -> Iterator[Stack]:
    from tests.e2e.conftest import start_stack

    running = start_stack("sim", tmp_path, "cluster=e2e-other")
    try:
        running.wait_ready()
        yield running
    finally:
        running.stop()


@pytest.mark.slow
def test_two_instances_live_side_by_side_and_one_stops_alone(stack: Stack, other: Stack, client: openai.OpenAI) -> None:
    with openai.OpenAI(base_url=f"{other.url}/v1", api_key="unused") as second:
        assert {m.id for m in second.models.list()} == {"sim"}
        made = second.completions.create(model="sim", prompt="hello", max_tokens=8)
        assert made.usage is not None and made.usage.completion_tokens == 8
    assert MODEL in {m.id for m in client.models.list()}
    before, gone = stack.tree(), other.tree()
    other.stop()
    assert not {pid for pid in gone if _alive(pid)}
    assert before <= stack.tree() | {pid for pid in before if not _alive(pid)}
    answer = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=2, temperature=0)
    assert answer.usage is not None and answer.usage.completion_tokens == 2


def _alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
