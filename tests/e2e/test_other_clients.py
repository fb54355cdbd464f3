"""langchain-openai, lm-eval, curl and the npm client, unmodified."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from langchain_openai import ChatOpenAI, OpenAI
from pydantic import SecretStr

from tests.e2e.conftest import MODEL, Stack
from tests.gateway.openai_schema import completion_chunk_problems, problems
from tests.gateway.sse_reader import events

pytestmark = [pytest.mark.ray, pytest.mark.model]
HERE = Path(__file__).parent
PARIS = "The capital of France is Paris."


def test_langchain_chat_streams_and_counts(stack: Stack) -> None:
    chat = ChatOpenAI(
        model=MODEL, base_url=f"{stack.url}/v1", api_key=SecretStr("unused"), temperature=0, max_completion_tokens=24
    )
    assert chat.invoke("What is the capital of France?").content == PARIS
    chunks = list(chat.stream("What is the capital of France?", stream_usage=True))
    assert "".join(str(c.content) for c in chunks) == PARIS
    assert any(c.usage_metadata for c in chunks)


def test_langchain_completions_send_prompt_lists_and_nulls(stack: Stack) -> None:
    llm = OpenAI(model=MODEL, base_url=f"{stack.url}/v1", api_key=SecretStr("unused"), temperature=0, max_tokens=8)
    answers = llm.batch(["One two three", "Monday Tuesday"])
    assert len(answers) == 2 and all(answers)


def test_lm_eval_scores_a_local_task(stack: Stack, tmp_path: Path) -> None:
    rows = [
        {"question": "The capital of France is", "choices": [" Paris", " a bicycle"], "answer": 0},
        {"question": "Two plus two equals", "choices": [" purple", " four"], "answer": 1},
        {"question": "The sun rises in the", "choices": [" east", " spoon"], "answer": 0},
        {"question": "Cats and dogs are", "choices": [" parliament", " animals"], "answer": 1},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "wg_local.yaml").write_text(
        "task: wg_local\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        "metric_list: [{metric: acc}]\nmetadata: {version: 1.0}\n"
    )
    home = Path(os.environ.get("WARMGATE_HOME", Path.home() / ".cache/warmgate"))
    arguments = (
        f"model={MODEL},base_url={stack.url}/v1/completions,tokenizer={home / 'models' / MODEL},"
        "tokenizer_backend=huggingface,num_concurrent=4,tokenized_requests=True,max_retries=1"
    )
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--model_args", arguments]
    command += ["--tasks", "wg_local", "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out")]
    environment = {
        **os.environ,
        "HF_DATASETS_CACHE": str(tmp_path / "hf"),
        "HF_HUB_OFFLINE": "1",
        "OPENAI_API_KEY": "x",
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(next((tmp_path / "out").rglob("results_*.json")).read_text())
    assert result["results"]["wg_local"]["acc,none"] == 1.0


def test_curl_sees_the_stream_of_the_documentation(stack: Stack) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Say hello."}], "max_tokens": 8, "stream": True}
    command = ["curl", "-sSN", f"{stack.url}/v1/chat/completions", "-H", "content-type: application/json"]
    done = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=True)
    *chunks, last = events(done.stdout)
    assert last == "[DONE]" and len(chunks) >= 3
    for chunk in chunks:
        assert problems(chunk, "CreateChatCompletionStreamResponse") == [], chunk
    assert chunks[0]["choices"][0]["delta"]["role"] == "assistant"
    assert chunks[-1]["choices"][0]["finish_reason"] in ("stop", "length")


def test_curl_sees_a_completions_stream_as_openai_sends_it(stack: Stack) -> None:
    body = {"model": MODEL, "prompt": "Once upon", "max_tokens": 8, "logprobs": 2, "n": 2, "stream": True}
    command = ["curl", "-sSN", f"{stack.url}/v1/completions", "-H", "content-type: application/json"]
    done = subprocess.run([*command, "-d", json.dumps(body)], capture_output=True, text=True, timeout=60, check=True)
    *chunks, last = events(done.stdout)
    assert last == "[DONE]"
    for chunk in chunks:
        assert completion_chunk_problems(chunk) == [], chunk
    finished = [choice["index"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted(finished) == [0, 1]


def test_the_npm_client_chats_and_streams(stack: Stack, tmp_path: Path) -> None:
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are not installed")
    install = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(tmp_path), "openai@7"]
    done = subprocess.run(install, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    shutil.copy(HERE / "node" / "chat.mjs", tmp_path / "chat.mjs")
    command = ["node", "chat.mjs", f"{stack.url}/v1", MODEL]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    said = json.loads(ran.stdout)
    assert said["plain"] == PARIS == said["streamed"]
    assert said["badStatus"] == 400 and said["badParam"] == "temperature"
