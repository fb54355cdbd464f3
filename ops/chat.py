"""A terminal chat against a gateway: streaming, several turns, over plain HTTP as any OpenAI client would do it."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import httpx
from rich.console import Console

from configs.runtime import home_dir
from ops.errors import OperationError

Message: TypeAlias = dict[str, str]

HELP = """/reset         forget the conversation
/system TEXT   set the system message (and forget the conversation)
/model NAME    ask another model; without NAME: list them
/quit          leave (also Ctrl-D); Ctrl-C stops an answer"""


class ChatError(OperationError):
    """The gateway cannot be reached, refused, or broke off. One line."""


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """Whom to ask and how. `model` None = the first one the gateway lists."""

    url: str
    key: str | None = None
    model: str | None = None
    system: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None


@dataclass(slots=True)
class Answer:
    """What is known of an answer besides its text, complete when its stream has ended. Times in seconds."""

    ttft_s: float | None = None
    total_s: float = 0.0
    num_tokens: int | None = None
    finish_reason: str | None = None

    def summary(self) -> str:
        parts = [] if self.ttft_s is None else [f"first token {self.ttft_s:.2f} s"]
        if self.num_tokens and self.ttft_s is not None and self.total_s > self.ttft_s:
            rate = (self.num_tokens - 1) / (self.total_s - self.ttft_s)
            parts.append(f"{self.num_tokens} tokens, {rate:.0f} tok/s")
        if self.finish_reason == "length":
            parts.append("cut off at the length limit")
        return "; ".join(parts)


@dataclass(slots=True)
class ChatClient:
    """Asks one gateway. Raises ChatError for everything the network or the gateway can do wrong."""

    options: ChatOptions
    http: httpx.Client
    clock: Callable[[], float] = time.monotonic

    def models(self) -> list[str]:
        try:
            response = self.http.get("/v1/models")
            if response.status_code != 200:
                raise ChatError(_refusal(response.status_code, response.content))
            return [model["id"] for model in response.json()["data"]]
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        except (ValueError, KeyError, TypeError) as error:
            raise ChatError(f"{self.options.url} does not answer like a gateway") from error

    def first_model(self) -> str:
        found = self.models()
        if not found:
            raise ChatError(f"{self.options.url} lists no model")
        return found[0]

    def ask(self, model: str, messages: list[Message], answer: Answer) -> Generator[str, None, None]:
        """Pieces of the answer's text as they come; fills `answer`. Closing the iterator stops the answer."""
        body: dict[str, Any] = {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        limits = {"max_tokens": self.options.max_tokens, "temperature": self.options.temperature}
        body |= {name: value for name, value in limits.items() if value is not None}
        begin = self.clock()
        try:
            with self.http.stream("POST", "/v1/chat/completions", json=body) as response:
                if response.status_code != 200:
                    raise ChatError(_refusal(response.status_code, response.read()))
                for event in _events(response.iter_lines()):
                    text = _note(event, answer)
                    if text:
                        answer.ttft_s = self.clock() - begin if answer.ttft_s is None else answer.ttft_s
                        yield text
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        finally:
            answer.total_s = self.clock() - begin

    def _unreachable(self, error: httpx.HTTPError) -> ChatError:
        if isinstance(error, httpx.ConnectError):
            return ChatError(f"no gateway at {self.options.url}; start one with: warmgate serve")
        if isinstance(error, httpx.UnsupportedProtocol):
            return ChatError(f"not an address like http://127.0.0.1:8000: {self.options.url}")
        return ChatError(f"the connection to {self.options.url} broke: {error or type(error).__name__}")


def connect(options: ChatOptions) -> httpx.Client:
    """A client for the gateway's address, with or without a trailing /v1."""
    base = options.url.rstrip("/").removesuffix("/v1")
    headers = {"authorization": f"Bearer {options.key}"} if options.key else {}
    try:
        return httpx.Client(base_url=base, headers=headers, timeout=httpx.Timeout(600.0, connect=5.0))
    except httpx.InvalidURL as error:
        raise ChatError(f"not a URL: {options.url}") from error


def _events(lines: Iterator[str]) -> Iterator[dict[str, Any]]:
    """The JSON of each SSE event up to `[DONE]`. Raises ChatError for an error event, and when `[DONE]` never comes."""
    for line in lines:
        if not line.startswith("data:"):
            continue
        data = line.removeprefix("data:").strip()
        if data == "[DONE]":
            return
        event: dict[str, Any] = json.loads(data)
        if "error" in event:
            raise ChatError(f"the answer broke off: {event['error'].get('message')}")
        yield event
    raise ChatError("the answer broke off: the connection ended in its middle")


def _note(event: Mapping[str, Any], answer: Answer) -> str:
    """Files away what an event says besides text; returns the text."""
    usage = event.get("usage")
    if usage:
        answer.num_tokens = usage["completion_tokens"]
    text = ""
    for choice in event["choices"]:
        answer.finish_reason = choice.get("finish_reason") or answer.finish_reason
        text += choice["delta"].get("content") or ""
    return text


def _refusal(status: int, body: bytes) -> str:
    with suppress(ValueError, KeyError, TypeError):
        return f"the gateway answered {status}: {json.loads(body)['error']['message']}"
    return f"the gateway answered {status}: {body[:200].decode(errors='replace')}"


def one_answer(options: ChatOptions, prompt: str) -> None:
    """Prints the answer to one prompt on stdout, nothing else. Raises ChatError."""
    with connect(options) as http:
        client = ChatClient(options, http)
        messages = [*_opening(options.system), {"role": "user", "content": prompt}]
        for text in client.ask(options.model or client.first_model(), messages, Answer()):
            sys.stdout.write(text)
            sys.stdout.flush()
    print()


def converse(options: ChatOptions, console: Console) -> None:
    """A conversation in the terminal, until /quit or Ctrl-D. Raises ChatError when there is no gateway at its start."""
    with connect(options) as http:
        client = ChatClient(options, http)
        model = options.model or client.first_model()
        conversation = Conversation(client, console, model, _opening(options.system))
        console.print(f"[dim]{options.url}, model {model}. /help lists commands, /quit leaves.[/dim]")
        with _line_history(home_dir(os.environ) / "chat_history"):
            conversation.run()


def _opening(system: str | None) -> list[Message]:
    return [{"role": "system", "content": system}] if system else []


@dataclass(slots=True)
class Conversation:
    """The turns so far, and the loop that adds to them. `read` returns a line or raises EOFError."""

    client: ChatClient
    console: Console
    model: str
    messages: list[Message] = field(default_factory=list)
    read: Callable[[str], str] = input

    def run(self) -> None:
        while True:
            try:
                line = self.read("> ").strip()
            except EOFError:
                self.console.print()
                return
            except KeyboardInterrupt:  # on an empty prompt it only clears the line
                self.console.print()
                continue
            if line == "/quit":
                return
            if line.startswith("/"):
                self.command(line)
            elif line:
                self.turn(line)

    def turn(self, line: str) -> None:
        """Asks, prints as it comes. A stopped answer stays in the conversation; a failed question does not."""
        self.messages.append({"role": "user", "content": line})
        answer, pieces = Answer(), []
        stream = self.client.ask(self.model, self.messages, answer)
        try:
            for text in stream:
                pieces.append(text)
                self.console.out(text, end="", highlight=False)
            note = answer.summary()
        except KeyboardInterrupt:
            stream.close()
            note = "stopped"
            if not pieces:
                self.messages.pop()
                self.console.print(f"({note})", style="dim")
                return
        except ChatError as error:
            self.messages.pop()
            self.console.print(f"{'' if not pieces else chr(10)}error: {error}", style="red", markup=False)
            return
        self.messages.append({"role": "assistant", "content": "".join(pieces)})
        self.console.print(f"\n({note})", style="dim", markup=False)

    def command(self, line: str) -> None:
        verb, _, rest = line.partition(" ")
        rest = rest.strip()
        if verb == "/reset":
            self.messages = [m for m in self.messages if m["role"] == "system"]
            said = "forgotten"
        elif verb == "/system":
            self.messages = _opening(rest)
            said = "a new conversation, " + ("with that system message" if rest else "without a system message")
        elif verb == "/model":
            said = self._choose(rest)
        else:
            said = HELP
        self.console.print(said, style="dim", markup=False)

    def _choose(self, name: str) -> str:
        try:
            known = self.client.models()
        except ChatError as error:
            return f"error: {error}"
        if name and name not in known:
            return f"no model {name!r}; there is: {', '.join(known)}"
        self.model = name or self.model
        return f"model {self.model}" if name else ", ".join(known)


@contextmanager
def _line_history(path: Path, max_lines: int = 1000) -> Iterator[None]:
    """Line editing and a history kept between runs, where readline is built in."""
    try:
        import readline
    except ImportError:
        yield
        return
    readline.set_history_length(max_lines)
    with suppress(OSError):
        readline.read_history_file(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)
            path.chmod(0o600)
