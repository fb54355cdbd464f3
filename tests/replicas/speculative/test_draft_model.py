"""A draft model with blocks of its own: the sim model guesses for itself, and is right unless its KV is not."""

from __future__ import annotations

from typing import Any

import pytest

from replicas.contract import GenerateRequest
from replicas.engine.core import EngineCore
from replicas.engine.sequence import Plan, Sequence, StepResult
from replicas.engine.speculative.control import Fixed
from replicas.engine.speculative.draft_model import DraftLimits, DraftModelDrafter
from replicas.engine.speculative.drafter import Wish
from replicas.engine.speculative.speculator import Speculator
from replicas.sim_engine import SimOptions, build_sim
from replicas.sim_model import SimModel
from tests.replicas.engine_kit import EOS, LETTERS, VOCAB_SIZE, Kit, adapter, engine_config, make_kit, make_request

SHORT: dict[str, Any] = {"max_tokens": 24, "seed": 5}


class Watched:
    """A sim runner for the draft model, whose plans are looked at."""

    def __init__(self, num_blocks: int, alphabet: tuple[int, ...] = LETTERS) -> None:
        model = SimModel(VOCAB_SIZE, (EOS,), alphabet)
        core: EngineCore = build_sim(
            engine_config(num_blocks=num_blocks), model, "draft", SimOptions(alphabet, lambda: 0.0, lambda _: None)
        ).core
        self.inner, self.pool = core.runner, core.scheduler.pool
        self.plans: list[Plan] = []

    def execute(self, plan: Plan) -> StepResult:
        self.plans.append(plan)
        return self.inner.execute(plan)


def speculating(runner: Watched, num_drafts: int = 4, max_len: int = 500, **changes: Any) -> Kit:
    kit = make_kit(num_blocks=64, max_num_batched_tokens=64, **changes)
    drafter = DraftModelDrafter(runner, runner.pool, DraftLimits(max_len, 32))
    kit.core.speculator = Speculator(drafter, Fixed(num_drafts))
    return kit


def requests(num: int, **changes: Any) -> list[GenerateRequest]:
    return [make_request(f"r{i}", range(7 * i, 7 * i + 5 + i), **{**SHORT, **changes}) for i in range(num)]


def answer(kit: Kit, wanted: list[GenerateRequest]) -> None:
    for request in wanted:
        kit.add(request)
    kit.run()
    for request in wanted:
        assert kit.tokens(request.request_id) == kit.expected(request)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_guesses_for_itself_is_always_right(temperature: float) -> None:
    runner = Watched(64)
    kit = speculating(runner)
    answer(kit, requests(3, temperature=temperature))
    stats = kit.core.speculator.stats  # type: ignore[union-attr]
    assert stats.num_accepted_tokens == stats.num_draft_tokens > 0
    assert len(kit.runner.plans) <= 3 + 24 / 5 + 1
    assert runner.pool.num_used <= 3 * -(-40 // 4)


def test_another_model_changes_the_speed_and_not_the_tokens() -> None:
    kit = speculating(Watched(64, tuple(range(40, 60))))
    answer(kit, requests(3, temperature=1.0))
    stats = kit.core.speculator.stats  # type: ignore[union-attr]
    assert stats.num_draft_tokens > stats.num_accepted_tokens == 0


def test_after_a_wrong_guess_the_draft_model_goes_on_from_what_was_said() -> None:
    """The draft model has no adapters: with one it is always wrong, beside it always right."""
    runner = Watched(64)
    kit = speculating(runner, max_adapters=1)
    kit.core.load_adapter(adapter("x@1"))
    answer(kit, [make_request("with", range(9), adapter="x@1", **SHORT), make_request("without", range(9), **SHORT)])
    stats = kit.core.speculator.stats  # type: ignore[union-attr]
    assert 0 < stats.num_accepted_tokens < stats.num_draft_tokens
    for plan in runner.plans:
        assert all(item.num_tokens <= 16 for item in plan.items if item.samples)


def test_blocks_come_back_when_requests_end_are_preempted_or_aborted() -> None:
    runner = Watched(64)
    kit = speculating(runner)
    kit.add(make_request("a", range(6), max_tokens=200))
    kit.add(make_request("b", range(9), max_tokens=6))
    for _ in range(6):
        kit.step()
    assert kit.ended("b") and runner.pool.num_used > 0
    kit.core.abort("a")
    kit.step()
    kit.add(make_request("c", range(3), max_tokens=1))
    kit.run()
    assert runner.pool.num_used == 0
    runner.pool.check([])


def test_without_blocks_or_context_there_are_no_guesses_and_the_same_tokens() -> None:
    for kit in (speculating(Watched(2)), speculating(Watched(64), max_len=6)):
        answer(kit, requests(2))
        assert kit.core.speculator.stats.num_drafts == 0  # type: ignore[union-attr]


def test_a_long_prompt_is_caught_up_with_in_chunks_that_no_step_feels() -> None:
    runner = Watched(128)
    kit = speculating(runner, max_model_len=250)
    request = make_request("a", [i % 90 for i in range(200)], **SHORT)
    kit.add(request)
    kit.run()
    assert kit.tokens("a") == kit.expected(request)
    chunks = [item for plan in runner.plans for item in plan.items if not item.samples]
    assert sum(item.num_tokens for item in chunks) >= 190 and max(item.num_tokens for item in chunks) <= 32
    assert kit.core.speculator.stats.num_accepted_tokens > 0  # type: ignore[union-attr]


def test_blocks_of_a_request_that_does_not_run_are_free_however_many_others_do() -> None:
    runner = Watched(64)
    drafter = DraftModelDrafter(runner, runner.pool, DraftLimits(500, 32))
    drafter.draft([Wish(Sequence.from_request(make_request("a", range(9)), 0.0), 2)])
    assert runner.pool.num_free < 64
    drafter.retain(frozenset({"b", "c"}))
    assert runner.pool.num_free == 64
