"""Prompts that are warm somewhere go there: two real replicas behind two ingresses, over HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from tests.e2e.conftest import MODEL, Stack

pytestmark = [pytest.mark.ray, pytest.mark.model]

FACTS = "The gate at the {name} harbour is warm, the water is {name} and the ships wait for the tide. " * 12
QUESTIONS = ("Where do the ships wait?", "And what is warm there?", "Say it again in three words.")
BLOCK_TOKENS = 64
"""Routing blocks of the quickstart profile; the last partial one of a turn is computed again."""


@pytest.fixture()
def http(stack: Stack) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=stack.url, timeout=120) as made:
        yield made


@dataclass
class Conversation:
    """A chat that grows by a question and the model's own answer each turn."""

    name: str
    messages: list[dict[str, str]] = field(default_factory=list)
    replicas: list[str] = field(default_factory=list)
    usages: list[dict[str, Any]] = field(default_factory=list)

    def turn(self, http: httpx.Client, question: str) -> None:
        words = question if self.messages else f"{self.name}. {FACTS.format(name=self.name)} {question}"
        self.messages.append({"role": "user", "content": words})
        body = {"model": MODEL, "messages": self.messages, "temperature": 0, "max_tokens": 12}
        answer = http.post("/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        found = answer.json()
        self.messages.append({"role": "assistant", "content": found["choices"][0]["message"]["content"]})
        self.replicas.append(answer.headers["x-warmgate-replica"])
        self.usages.append(found["usage"])
        told = int(answer.headers["x-warmgate-cached-tokens"])
        assert told <= found["usage"]["prompt_tokens"], f"the router expected {told} tokens to be cached"


def test_every_turn_of_a_chat_finds_what_the_turns_before_it_left(http: httpx.Client) -> None:
    chats = [Conversation(name) for name in ("northern", "southern", "eastern", "western", "upper", "lower")]
    for question in QUESTIONS:
        with ThreadPoolExecutor(len(chats)) as pool:
            list(pool.map(lambda chat, words=question: chat.turn(http, words), chats))
        time.sleep(0.3)  # the replicas' word reaches both ingresses
    assert len({replica for chat in chats for replica in chat.replicas}) == 2, "strangers spread over both replicas"
    for chat in chats:
        assert len(set(chat.replicas)) == 1, f"{chat.name} moved: {chat.replicas}"
        for before, after in zip(chat.usages, chat.usages[1:], strict=False):
            cached = after["prompt_tokens_details"]["cached_tokens"]
            assert cached >= before["prompt_tokens"] - BLOCK_TOKENS, f"{chat.name}: {chat.usages}"


def prompt_of(http: httpx.Client, name: str, num_tokens: int) -> list[int]:
    """So many tokens, of which a prompt with another name shares next to none."""
    words = {"model": MODEL, "prompt": f"{name} " + " ".join(f"{name} is at {i} by the gate," for i in range(200))}
    tokens: list[int] = http.post("/tokenize", json=words).json()["tokens"]
    assert len(tokens) >= num_tokens
    return tokens[:num_tokens]


def ttft_s(http: httpx.Client, prompt: list[int]) -> tuple[float, int]:
    """Seconds to the first token of a streamed completion, and how much of the prompt was cached."""
    body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "temperature": 0, "stream": True}
    body["stream_options"] = {"include_usage": True}
    first_s, cached, began = 0.0, 0, time.perf_counter()
    with http.stream("POST", "/v1/completions", json=body) as answer:
        assert answer.status_code == 200
        for line in answer.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            if event["choices"] and not first_s:
                first_s = time.perf_counter() - began
            if event.get("usage"):
                cached = event["usage"]["prompt_tokens_details"]["cached_tokens"]
    return first_s, cached


def test_the_first_token_of_a_warm_prompt_comes_in_a_fifth_of_the_time_of_a_cold_one(http: httpx.Client) -> None:
    """The best of several pairs: whatever else the machine does only adds, to the short time as much as to the long."""
    ratios = []
    for name in ("Ada", "Grace", "Edsger", "Barbara", "Donald"):
        prompt = prompt_of(http, name, 1024)
        cold_s, none = ttft_s(http, prompt)
        time.sleep(0.3)
        warm_s, cached = min(ttft_s(http, prompt) for _ in range(3))
        assert none <= BLOCK_TOKENS, "a stranger's prompt was cached"
        assert cached >= 1024 - BLOCK_TOKENS
        ratios.append(warm_s / cold_s)
        if ratios[-1] <= 1 / 5:
            return
    pytest.fail(f"warm over cold: {ratios}")
