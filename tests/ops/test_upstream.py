"""`warmgate serve --upstream`: the gateway in front of servers that run already."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import httpx
import pytest

from configs.load import load_config
from ops.errors import OperationError
from ops.upstream import make_profile
from tests.ops.ray_stack import eventually, start, stop


@contextlib.contextmanager
def mock(**behaviour: object) -> Iterator[str]:
    """A mock server in a process of its own; its URL."""
    command = [sys.executable, "-m", "ops.bench.mock_vllm", "--behaviour", json.dumps(behaviour)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield str(json.loads(process.stdout.readline())["url"])
        finally:
            process.kill()


def test_a_profile_has_a_group_for_each_server(tmp_path: Path) -> None:
    with mock(max_model_len=2048) as one, mock(max_model_len=2048) as two:
        path = make_profile([one, two], "sim:bytes", tmp_path)
    config = load_config(path, {})
    assert [group.engine.upstream.url for group in config.groups if group.engine.upstream] == [one, two]
    assert {group.model for group in config.groups} == {config.models[0].id} == {"mock"}
    assert config.groups[0].engine.max_model_len == 2048


def test_what_keeps_a_profile_from_being_made_is_said(tmp_path: Path) -> None:
    with mock() as one, mock(model="other") as two:
        with pytest.raises(OperationError, match="different models, mock and other"):
            make_profile([one, two], "sim:bytes", tmp_path)
        with pytest.raises(OperationError, match="tokenizer and chat template of mock"):
            make_profile([one], None, tmp_path)
        with pytest.raises(OperationError, match="twice"):
            make_profile([one, one], "sim:bytes", tmp_path)
    with pytest.raises(OperationError, match="/v1/models"):
        make_profile([one], "sim:bytes", tmp_path)


def test_what_clients_call_base_url_will_do_too(tmp_path: Path) -> None:
    with mock() as one:
        path = make_profile([f"{one}/v1/"], "sim:bytes", tmp_path)
        assert f"url: {one}\n" in path.read_text()
        with pytest.raises(OperationError, match="twice"):
            make_profile([one, f"{one}/v1"], "sim:bytes", tmp_path)


@pytest.mark.parametrize(
    ("status", "body", "words"),
    [(401, b"", "wants a key: .*api_key_env"), (404, b"", "answered 404"), (200, b"<html>", "no JSON")],
)
def test_a_server_that_is_none_is_told_in_a_line(tmp_path: Path, status: int, body: bytes, words: str) -> None:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            with pytest.raises(OperationError, match=words) as caught:
                make_profile([f"http://127.0.0.1:{server.server_port}"], "sim:bytes", tmp_path)
        finally:
            server.shutdown()
            thread.join()
    assert "mozilla" not in str(caught.value)


@pytest.mark.ray
@pytest.mark.timeout(240)
def test_the_gateway_serves_both_servers_and_outlives_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also: what fails before the first byte is tried on the other server, and nobody sees it."""
    with mock(worker_id="a") as one, contextlib.ExitStack() as second:
        two = second.enter_context(mock(worker_id="b"))
        monkeypatch.setenv("WARMGATE_HOME", str(tmp_path))
        options = ["--upstream", one, "--upstream", two, "--model", "sim:bytes"]
        stack = start(tmp_path / "log", options=options)
        second.callback(stop, stack)
        stack.wait_ready()
        with httpx.Client(base_url=stack.url, timeout=30) as client:
            ask = {"model": "mock", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}

            def answer() -> str:
                reply = client.post("/v1/chat/completions", json=ask)
                assert reply.status_code == 200, reply.text
                return str(reply.json()["choices"][0]["message"]["content"])

            def seen(url: str) -> int:
                return int(httpx.get(f"{url}/mock/counts").json()["requests"])

            assert eventually(lambda: answer() == " t0 t1 t2 t3" and min(seen(one), seen(two)) > 0, 60), "one is idle"
            httpx.post(f"{one}/mock/behaviour", json={"fail_first": seen(one) + 1})
            assert {answer() for _ in range(6)} == {" t0 t1 t2 t3"}
            httpx.post(f"{one}/mock/behaviour", json={"fail_first": 0})
            httpx.post(f"{two}/mock/behaviour", json={"healthy": False, "status": 500})
            assert {answer() for _ in range(10)} == {" t0 t1 t2 t3"}
