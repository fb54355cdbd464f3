"""`warmgate chat` against a gateway on loopback that answers what the test says."""

from __future__ import annotations

import io
import json
import os
import pty
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from rich.console import Console

from ops.chat import ChatClient, ChatOptions, Conversation, connect
from ops.cli import main

ROOT = Path(__file__).parents[2]


@dataclass
class Gateway:
    """Answers each chat with the events of `events`; keeps what was asked."""

    events: list[bytes] = field(default_factory=list)
    refusal: tuple[int, bytes] | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    url: str = ""
    models: bytes = b'{"object": "list", "data": [{"id": "m1"}, {"id": "m2"}]}'

    def says(self, *texts: str, finish_reason: str = "stop") -> None:
        deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}, *({"content": text} for text in texts)]
        chunks: list[dict[str, Any]] = [
            {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas
        ]
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish_reason}]})
        chunks.append(
            {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": len(texts), "total_tokens": 9}}
        )
        self.events = [b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks] + [b"data: [DONE]\n\n"]

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.keys.append(request.headers.get("authorization"))
        if request.command == "GET":
            _send(request, 200, self.models)
            return
        self.bodies.append(json.loads(request.rfile.read(int(request.headers["content-length"]))))
        if self.refusal is not None:
            _send(request, *self.refusal)
            return
        request.send_response(200)
        request.send_header("content-type", "text/event-stream")
        request.send_header("connection", "close")
        request.end_headers()
        for event in self.events:
            request.wfile.write(event)


def _send(request: BaseHTTPRequestHandler, status: int, body: bytes) -> None:
    request.send_response(status)
    request.send_header("content-length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


@pytest.fixture()
def gateway() -> Iterator[Gateway]:
    made = Gateway()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            made.answer(self)

        def do_POST(self) -> None:
            made.answer(self)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield made
    server.shutdown()
    server.server_close()
    thread.join()


def run(gateway: Gateway, *arguments: str, stdin: str = "") -> Result:
    return CliRunner().invoke(main, ["chat", "--url", gateway.url, *arguments], input=stdin)


def test_one_answer_is_printed_alone(gateway: Gateway) -> None:
    gateway.says("Par", "is", ".\nYes")
    result = run(gateway, "Capital", "of France?", "--system", "Be brief.", "--max-tokens", "5", "--temperature", "0")
    assert (result.exit_code, result.stdout) == (0, "Paris.\nYes\n")
    [body] = gateway.bodies
    assert body["model"] == "m1"
    assert (body["max_tokens"], body["temperature"], body["stream"]) == (5, 0.0, True)
    assert body["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Capital of France?"},
    ]


def test_text_on_standard_input_follows_the_prompt(gateway: Gateway) -> None:
    gateway.says("ok")
    run(gateway, "Sum up:", stdin="line one\nline two\n")
    run(gateway, stdin="only this\n")
    assert [body["messages"][-1]["content"] for body in gateway.bodies] == [
        "Sum up:\n\nline one\nline two",
        "only this",
    ]


def test_no_prompt_anywhere_is_a_usage_error(gateway: Gateway) -> None:
    assert run(gateway, stdin="").exit_code == 2


def test_key_and_url_come_from_the_environment(gateway: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    gateway.says("ok")
    monkeypatch.setenv("WARMGATE_URL", f"{gateway.url}/v1/")
    monkeypatch.setenv("WARMGATE_API_KEY", "sk-1")
    assert CliRunner().invoke(main, ["chat", "hi"]).stdout == "ok\n"
    assert gateway.keys == ["Bearer sk-1", "Bearer sk-1"]


@pytest.mark.parametrize(
    ("refusal", "expected"),
    [
        ((429, b'{"error": {"message": "too many", "type": "t"}}'), "error: the gateway answered 429: too many\n"),
        ((502, b"<html>bad</html>"), "error: the gateway answered 502: <html>bad</html>\n"),
    ],
)
def test_refusal_is_one_line_and_exit_code_1(refusal: tuple[int, bytes], expected: str, gateway: Gateway) -> None:
    gateway.refusal = refusal
    result = run(gateway, "hi")
    assert (result.exit_code, result.stderr, result.stdout) == (1, expected, "")


def test_error_event_and_cut_stream_are_errors_after_what_came(gateway: Gateway) -> None:
    gateway.says("half")
    whole = gateway.events
    gateway.events = [*whole[:2], b'data: {"error": {"message": "the replica died"}}\n\n']
    result = run(gateway, "hi")
    assert (result.exit_code, result.stdout) == (1, "half")
    assert result.stderr == "error: the answer broke off: the replica died\n"
    gateway.events = whole[:2]
    assert run(gateway, "hi").stderr == "error: the answer broke off: the connection ended in its middle\n"


def test_no_gateway_is_one_line(gateway: Gateway) -> None:
    result = CliRunner().invoke(main, ["chat", "--url", "http://127.0.0.1:1", "hi"])
    assert (result.exit_code, result.stderr) == (
        1,
        "error: no gateway at http://127.0.0.1:1; start one with: warmgate serve\n",
    )


def test_something_that_is_no_gateway_is_one_line(gateway: Gateway) -> None:
    gateway.models = b"<html>hello</html>"
    assert run(gateway, "hi").stderr == f"error: {gateway.url} does not answer like a gateway\n"
    gateway.models = b'{"object": "list", "data": []}'
    assert run(gateway, "hi").stderr == f"error: {gateway.url} lists no model\n"


@pytest.mark.parametrize("url", ["http://a:b", "ftp://127.0.0.1", "127.0.0.1:8000"])
def test_address_that_is_none_is_one_line(url: str) -> None:
    result = CliRunner().invoke(main, ["chat", "--url", url, "hi"])
    assert (result.exit_code, result.stderr.count("\n")) == (1, 1)
    assert result.stderr.startswith("error: ") and url in result.stderr


Talk = Callable[..., tuple[Conversation, str]]


@pytest.fixture()
def talk(gateway: Gateway) -> Iterator[Talk]:
    """Has a conversation of the given lines; returns it and what was shown."""
    clients = []

    def have(*lines: str) -> tuple[Conversation, str]:
        out, options = io.StringIO(), ChatOptions(gateway.url)
        pending = list(lines)

        def read(prompt: str) -> str:
            if not pending:
                raise EOFError
            return pending.pop(0)

        http = connect(options)
        clients.append(http)
        conversation = Conversation(ChatClient(options, http), Console(file=out, width=200), "m1", read=read)
        conversation.run()
        return conversation, out.getvalue()

    yield have
    for http in clients:
        http.close()


def test_conversation_sends_all_turns_and_reset_forgets_them(gateway: Gateway, talk: Talk) -> None:
    gateway.says("answer")
    talk("/system Be kind.", "one", "two", "/reset", "three", "/quit", "never sent")
    system = {"role": "system", "content": "Be kind."}
    said = {"role": "assistant", "content": "answer"}
    assert [body["messages"] for body in gateway.bodies] == [
        [system, {"role": "user", "content": "one"}],
        [system, {"role": "user", "content": "one"}, said, {"role": "user", "content": "two"}],
        [system, {"role": "user", "content": "three"}],
    ]


def test_failed_turn_is_shown_and_not_kept(gateway: Gateway, talk: Talk) -> None:
    gateway.refusal = (503, b'{"error": {"message": "nobody there"}}')
    conversation, shown = talk("hello")
    assert "error: the gateway answered 503: nobody there" in shown
    assert conversation.messages == []


def test_answer_is_followed_by_its_figures(gateway: Gateway, talk: Talk) -> None:
    gateway.says("a", "b [x]", finish_reason="length")
    _, shown = talk("hello")
    assert "ab [x]" in shown
    assert "2 tokens" in shown and "first token" in shown and "cut off at the length limit" in shown


def test_models_are_listed_and_chosen(gateway: Gateway, talk: Talk) -> None:
    gateway.says("ok")
    _, shown = talk("/model", "/model nope", "/model m2", "hi", "/help")
    assert "m1, m2" in shown
    assert "no model 'nope'; there is: m1, m2" in shown
    assert gateway.bodies[0]["model"] == "m2"
    assert "/reset" in shown


def test_stopped_answer_stays_in_the_conversation(gateway: Gateway) -> None:
    gateway.says("one", "two", "three")
    options = ChatOptions(gateway.url)

    class Interrupted(Console):
        def out(self, *objects: Any, **options: Any) -> None:
            super().out(*objects, **options)
            if "two" in objects:
                raise KeyboardInterrupt

    out = io.StringIO()
    with connect(options) as http:
        conversation = Conversation(ChatClient(options, http), Interrupted(file=out), "m1")
        conversation.turn("count")
    assert conversation.messages[-1] == {"role": "assistant", "content": "onetwo"}
    assert "(stopped)" in out.getvalue()


class Terminal:
    """A terminal with a program in it: type, and wait for what it shows."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        self.screen, self._tty = pty.openpty()
        self.process = subprocess.Popen(command, cwd=ROOT, env=env, stdin=self._tty, stdout=self._tty, stderr=self._tty)
        self._shown = ""

    def type(self, keys: bytes) -> None:
        os.write(self.screen, keys)

    def expect(self, part: str, limit_s: float = 20.0) -> None:
        """Waits until `part` is shown, after whatever was expected before."""
        end = time.monotonic() + limit_s
        while part not in self._shown:
            ready, _, _ = select.select([self.screen], [], [], max(0.0, end - time.monotonic()))
            assert ready, f"{part!r} was not shown, but {self._shown!r}"
            self._shown += os.read(self.screen, 4096).decode()
        self._shown = self._shown.partition(part)[2]

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._tty)
        os.close(self.screen)


def test_terminal_conversation_has_an_editable_history(gateway: Gateway, tmp_path: Path) -> None:
    gateway.says("fine", "ly")
    env = {**os.environ, "WARMGATE_HOME": str(tmp_path), "TERM": "xterm", "NO_COLOR": "1"}
    terminal = Terminal([sys.executable, "-m", "ops.cli", "chat", "--url", gateway.url], env)
    try:
        terminal.expect("> ")
        terminal.type(b"hello\r")
        terminal.expect("tok/s)")
        terminal.expect("> ")
        terminal.type(b"\x1b[A\x7fp\r")  # up: the last line again, its last letter replaced
        terminal.expect("tok/s)")
        terminal.expect("> ")
        terminal.type(b"\x04")
        assert terminal.process.wait(10) == 0
    finally:
        terminal.close()
    assert [body["messages"][-1]["content"] for body in gateway.bodies] == ["hello", "hellp"]
    assert (tmp_path / "chat_history").read_text().split() == ["hello", "hellp"]
