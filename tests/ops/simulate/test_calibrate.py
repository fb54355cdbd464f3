"""Step costs from a live server's streams."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from click.testing import CliRunner

from ops.bench.asgi import Exchange, Receive, Scope, Send, serve_asgi
from ops.cli import main
from ops.simulate.calibrate import Answer, Measuring, calibrate_live, fit
from ops.simulate.calibration import Calibration, load_calibration, save_calibration
from ops.simulate.errors import SimulationError

COSTS = Calibration(prefill_tokens_per_s=5000.0, step_base_s=0.01, step_per_sequence_s=0.0005)
MEASURING = Measuring("m", max_num_batched_tokens=512)


def prompt(num_tokens: int, noise_s: float = 0.0) -> Answer:
    """One after chunked prefill; a constant for the way there and back."""
    steps = [min(512, num_tokens - begin) for begin in range(0, num_tokens, 512)]
    return Answer(num_tokens, 0.003 + noise_s + sum(COSTS.step_s(1, n) for n in steps), ())


def decode(num_sequences: int) -> Answer:
    return Answer(10, 0.1, (COSTS.step_s(num_sequences, 0),) * 40 + (0.3,))


def test_step_costs_are_found_again_from_what_they_cause() -> None:
    prompts = [[prompt(512, 0.05), prompt(512)], [prompt(2048), prompt(2048, 0.2)]]
    found = fit(MEASURING, prompts, (decode(1), [decode(8)] * 8))
    assert found.prefill_tokens_per_s == pytest.approx(5000.0, rel=1e-6)
    assert found.step_base_s == pytest.approx(0.01)
    assert found.step_per_sequence_s == pytest.approx(0.0005)
    assert found.overhead_s == pytest.approx(0.028), "3 ms, and the usual disturbance: half of one in two"


def test_answers_of_several_replicas_share_steps_only_with_those_beside_them() -> None:
    prompts = [[prompt(512)], [prompt(2048)]]
    spread = [replace(decode(num), replica=name) for num, name in ((3, "r0"), (2, "r1")) for _ in range(num)]
    found = fit(MEASURING, prompts, (decode(1), spread))
    assert found.step_base_s == pytest.approx(0.01)
    assert found.step_per_sequence_s == pytest.approx(0.0005)
    assert found.prefill_tokens_per_s == pytest.approx(5000.0, rel=1e-6)
    lonely = [replace(decode(1), replica=f"r{i}") for i in range(4)]
    assert fit(MEASURING, prompts, (decode(1), lonely)).step_per_sequence_s == 0.0


def test_answers_that_tell_nothing_are_refused() -> None:
    with pytest.raises(SimulationError, match="an answer had 3 tokens"):
        fit(MEASURING, [[prompt(512)], [prompt(2048)]], (Answer(9, 0.1, (0.1, 0.1)), [decode(8)] * 8))
    with pytest.raises(SimulationError, match="no prefill rate can be told"):
        fit(MEASURING, [[prompt(2048)], [prompt(2048)]], (decode(1), [decode(8)] * 8))


def test_a_calibration_file_comes_back_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "c.json"
    save_calibration(path, COSTS)
    assert load_calibration(path) == COSTS
    path.write_text(json.dumps({"prefill_tokens_per_s": 100.0, "speed": 3}))
    with pytest.raises(SimulationError, match=r"c\.json.*speed"):
        load_calibration(path)
    path.write_text(json.dumps({"prefill_tokens_per_s": -1.0}))
    with pytest.raises(SimulationError, match="must be positive"):
        load_calibration(path)
    with pytest.raises(SimulationError, match="nowhere"):
        save_calibration(tmp_path / "nowhere" / "c.json", COSTS)


class Server:
    """Streams completions; a token a word of the prompt."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.status = 200

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        exchange = Exchange(scope, receive, send)
        body = json.loads(await exchange.body())
        self.bodies.append(body)
        if self.status != 200:
            await exchange.answer(self.status, b'{"error": {"message": "no such model"}}')
            return
        num_tokens = len(body["prompt"].split())
        await exchange.begin(200, b"text/event-stream")
        await asyncio.sleep(num_tokens * 0.0005)
        for _ in range(body["max_tokens"]):
            await exchange.write(event(choices=[{"text": "x"}]))
            await asyncio.sleep(0.001)
        usage = {"prompt_tokens": num_tokens, "completion_tokens": body["max_tokens"]}
        await exchange.write(event(choices=[], usage=usage) + b"data: [DONE]\n\n", last=True)


def event(**fields: Any) -> bytes:
    return b"data: " + msgspec.json.encode(fields) + b"\n\n"


SMALL = Measuring("m", prompt_tokens=512, sequences=3, num_output=10, repeats=2)


async def test_a_live_server_is_asked_with_prompts_no_cache_knows() -> None:
    server = Server()
    async with serve_asgi(server) as served:
        found = await calibrate_live(served.url + "/v1", SMALL)
    assert found.prefill_tokens_per_s > 0 and found.step_base_s > 0
    prompts = [body["prompt"] for body in server.bodies]
    assert len(set(prompts)) == len(prompts)
    assert {len(p.split()) for p in prompts} == {32, 128, 512, 4}
    assert all(body["stream"] and body["stream_options"] == {"include_usage": True} for body in server.bodies)


async def test_a_server_that_refuses_is_named_with_what_it_said() -> None:
    server = Server()
    server.status = 404
    async with serve_asgi(server) as served:
        with pytest.raises(SimulationError, match=r"404 .*no such model"):
            await calibrate_live(served.url, SMALL)
    with pytest.raises(SimulationError, match=r"127\.0\.0\.1"):
        await calibrate_live(served.url, SMALL)


def test_the_command_says_in_one_line_that_nobody_answers() -> None:
    result = CliRunner().invoke(main, ["simulate", "calibrate", "http://127.0.0.1:9", "--model", "m"])
    assert result.exit_code == 1 and result.output.startswith("error: http://127.0.0.1:9")
