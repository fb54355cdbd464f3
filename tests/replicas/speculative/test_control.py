"""Who is guessed for, step by step, on a clock: speculation must pay, or be off."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import pytest

from configs.schema import SpeculativeConfig
from replicas.engine.drafts import Drafts
from replicas.engine.speculative.control import Control, CostlyGuesses, FreeGuesses, Trials
from replicas.engine.speculative.drafter import Guess
from tests.replicas.engine_kit import Kit, make_kit, make_request

ALWAYS = 10**6


def simulate(control: Control, acceptance: float, per_draft_s: float, num_seqs: int, num_steps: int) -> float:
    """Tokens per second relative to plain decoding (steps of one second), on a noisy machine."""
    rng = random.Random(5)
    names = [f"r{i}" for i in range(num_seqs)]
    tokens = seconds = 0.0
    for _ in range(num_steps):
        asked = control.ask(names)
        guesses = {name: Guess(Drafts.chain(range(count))) for name, count in asked.items()}
        picked = control.pick(names, guesses)
        drawn = {name: _confirmed(rng, acceptance, count) for name, count in picked.items()}
        for name in guesses:
            if name in picked:
                control.observe_guess(name, 0, min(picked[name], drawn[name] + 1), drawn[name])
            else:
                control.observe_guess(name, 0, 1, int(rng.random() < acceptance))
        num_drafts = sum(picked.values())
        elapsed_s = (1.0 + per_draft_s * num_drafts) * rng.uniform(0.9, 1.1)
        control.observe_step(num_seqs, num_drafts, elapsed_s)
        tokens += num_seqs + sum(drawn.values())
        seconds += 1.0 + per_draft_s * num_drafts
    return tokens / seconds / num_seqs


def _confirmed(rng: random.Random, acceptance: float, count: int) -> int:
    return next((i for i in range(count) if rng.random() >= acceptance), count)


@pytest.mark.parametrize("control", [FreeGuesses, CostlyGuesses])
@pytest.mark.parametrize("num_seqs", [1, 4])
@pytest.mark.parametrize("acceptance", [0.0, 0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("per_draft_s", [0.02, 0.1, 0.4])
def test_speculation_never_costs_three_percent_and_gains_what_it_can(
    control: Any, num_seqs: int, acceptance: float, per_draft_s: float
) -> None:
    speedup = simulate(control(8), acceptance, per_draft_s, num_seqs, 1500)
    best = max(
        sum(acceptance**i for i in range(k + 1)) * num_seqs / (1 + per_draft_s * k * num_seqs) / num_seqs
        for k in range(9)
    )
    assert speedup >= 0.97
    assert speedup >= 0.9 * best or best < 1.05


def test_a_request_that_becomes_predictable_is_noticed() -> None:
    control = CostlyGuesses(8)
    simulate(control, 0.0, 0.1, 1, 800)
    assert simulate(control, 0.95, 0.1, 1, 3000) > 2.0


@pytest.mark.parametrize(("num_right", "step_s", "gain"), [(0.0, 1.5, 1.0), (2.0, 1.2, 2.5), (0.3, 6.0, 1.0)])
def test_trials_switch_whole_trees_on_or_off(num_right: float, step_s: float, gain: float) -> None:
    control, rng = Trials(30), random.Random(3)
    tokens = seconds = 0.0
    for _ in range(4000):
        asked: Mapping[str, int] = control.ask(["a"])
        took = step_s if asked else 1.0
        said = 1 + (rng.random() < num_right % 1) + int(num_right) if asked else 1
        if asked:
            control.observe_guess("a", 0, 3, said - 1)
        control.observe_step(1, 30 if asked else 0, took * rng.uniform(0.95, 1.05))
        tokens, seconds = tokens + said, seconds + took
    assert tokens / seconds >= max(0.97, 0.9 * gain)
    assert control.is_on == (gain > 1)


FAST: dict[str, Any] = {
    "num_blocks": 256, "step_base_s": 0.01, "step_per_sequence_s": 0.0, "step_per_draft_s": 0.001,
    "max_num_batched_tokens": 64,
}  # fmt: skip


def speculating(method: Any, draft_acceptance: float = 0.8, **changes: Any) -> Kit:
    config = SpeculativeConfig(method=method, **changes)
    return make_kit(speculative=config, draft_acceptance=draft_acceptance, **FAST)


def answer(kit: Kit, **changes: Any) -> float:
    """Seconds that one long answer takes."""
    request = make_request("a", range(20), **{"max_tokens": 800, **changes})
    kit.add(request)
    started = kit.clock.now
    kit.run()
    assert kit.tokens("a") == kit.expected(request)
    return kit.clock.now - started


@pytest.mark.parametrize(("acceptance", "least", "most"), [(0.95, 2.5, 6.0), (0.7, 1.6, 2.4), (0.0, 0.97, 1.0)])
def test_the_sim_engine_speculates_with_the_acceptance_it_is_told(acceptance: float, least: float, most: float) -> None:
    speedup = answer(make_kit(**FAST), temperature=1.0) / answer(
        speculating("draft_model", acceptance), temperature=1.0
    )
    assert least <= speedup <= most


@pytest.mark.parametrize("method", ["ngram", "lookahead"])
def test_the_sim_engine_runs_methods_without_a_model_as_they_are(method: str) -> None:
    kit = speculating(method, adaptive=False)
    answer(kit, max_tokens=100)
    assert kit.core.stats().num_drafts > 0


def test_what_was_guessed_is_in_the_stats() -> None:
    kit = speculating("mlp_speculator", adaptive=False, num_speculative_tokens=3)
    answer(kit)
    stats = kit.core.stats()
    assert stats.num_drafts < stats.num_draft_tokens <= 3 * stats.num_drafts
    assert stats.num_accepted_tokens == sum(stats.num_accepted_by_position)
    assert stats.num_accepted_by_position[0] / stats.num_drafts == pytest.approx(0.8, abs=0.06)
    assert list(stats.num_accepted_by_position) == sorted(stats.num_accepted_by_position, reverse=True)
