"""Speculation on tiny models: whatever is guessed, in chains or trees, the tokens are those of plain decoding."""

from __future__ import annotations

import random
from collections.abc import Mapping
from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import Any

import pytest

from configs.schema import SpeculativeConfig
from replicas.contract import GenerateRequest, pack_tokens
from replicas.engine.drafts import Drafts
from replicas.engine.sequence import Plan, StepResult
from replicas.engine.speculative.control import Fixed
from replicas.engine.speculative.drafter import Guess, Wish
from replicas.engine.speculative.speculator import Speculator
from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.driver import Answer, build, make_request, run
from tests.replicas.engine.tiny import VOCAB, random_tokens

LENGTHS = [1, 2, 5, 16, 17, 40, 100]
SMALL: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 48, "max_num_seqs": 6, "max_model_len": 200}
SAMPLED = {"temperature": 1.0, "top_p": 0.95, "frequency_penalty": 0.4, "repetition_penalty": 1.1}


@dataclass
class KnowingDrafter:
    """Has the answers, by request; says them and other things, in trees."""

    answers: Mapping[str, list[int]]
    rng: random.Random
    share_right: float = 0.7
    chains: bool = False
    num_moved: int = 0

    def draft(self, wishes: Rows[Wish]) -> Mapping[str, Guess]:
        return {wish.seq.request_id: Guess(self._tree(wish)) for wish in wishes}

    def _tree(self, wish: Wish) -> Drafts:
        known, tree = self.answers[wish.seq.request_id][wish.seq.num_output :], Drafts()
        for row in range(self.rng.randint(1, wish.max_drafts)):
            parent = row if self.chains else self.rng.randint(max(0, row - 2), row)
            depth = len(tree.path(parent))
            right = depth < len(known) and self.rng.random() < self.share_right
            token_id = known[depth] if right else self.rng.randrange(VOCAB)
            tree = Drafts((*tree.token_ids, token_id), (*tree.parents, parent))
        return tree

    def observe(self, plan: Plan, result: StepResult) -> None:
        for item in plan.items:
            if item.samples and not item.drafts.is_chain:
                rows = item.drafts.accepted(result.draws[item.seq.request_id])
                self.num_moved += any(row != depth for depth, row in enumerate(rows, 1))

    @property
    def is_settled(self) -> bool:
        return True

    def retain(self, running: frozenset[str]) -> None: ...


def requests(**changes: Any) -> list[GenerateRequest]:
    return [make_request(str(n), random_tokens(n, seed=n), seed=n, **{"max_tokens": 30, **changes}) for n in LENGTHS]


def speculate(folder: Any, wanted: list[GenerateRequest], drafter: Any, **changes: Any) -> dict[str, Answer]:
    core = build(folder, **{**SMALL, **changes}).core
    core.speculator = Speculator(drafter, Fixed(6))
    answers = run(core, wanted)
    assert core.scheduler.pool.num_used == 0
    assert core.speculator.stats.num_accepted_tokens > 0
    return answers


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["llama", "mistral with window", "qwen2 with some windows"])
def test_checked_trees_never_change_the_tokens(name: str, sampling: dict[str, Any], tiny_model: TinyModels) -> None:
    folder, _ = tiny_model(name)
    plain = run(build(folder, **SMALL).core, requests(**sampling))
    drafter = KnowingDrafter({name: a.tokens for name, a in plain.items()}, random.Random(2))
    guessed = speculate(folder, requests(**sampling), drafter)
    assert {name: a.tokens for name, a in guessed.items()} == {name: a.tokens for name, a in plain.items()}
    assert drafter.num_moved > 10, "no branch but the first was ever taken"


def test_logprobs_and_ends_are_those_of_plain_decoding(tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("llama")
    for sampling in ({}, {**SAMPLED, "min_tokens": 6}):
        free = {name: a.tokens for name, a in run(build(folder, **SMALL).core, requests(**sampling)).items()}
        stops = tuple(sorted({tokens[11] for tokens in free.values()}))
        changes = {"logprobs": 3, "stop_token_ids": stops, **sampling}
        plain = run(build(folder, **SMALL).core, requests(**changes))
        guessed = speculate(folder, requests(**changes), KnowingDrafter(free, random.Random(3), 0.9))
        assert any(len(answer.tokens) < 30 for answer in plain.values())
        for name, expected in plain.items():
            answer = guessed[name]
            assert (answer.tokens, answer.finish_reason) == (expected.tokens, expected.finish_reason)
            assert [lp.token_id for lp in answer.logprobs] == answer.tokens
            for given, wanted in zip(answer.logprobs, expected.logprobs, strict=True):
                assert given.logprob == pytest.approx(wanted.logprob, abs=1e-4)
                assert [i for i, _ in given.top] == [i for i, _ in wanted.top]


def test_prompt_logprobs_come_with_guesses_in_the_same_batch(tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("llama")
    wanted = requests(prompt_logprobs=1)
    plain = run(build(folder, **SMALL).core, wanted)
    guessed = speculate(folder, wanted, KnowingDrafter({n: a.tokens for n, a in plain.items()}, random.Random(5)))
    for name, answer in guessed.items():
        expected = plain[name].prompt_logprobs
        assert answer.tokens == plain[name].tokens and answer.prompt_logprobs is not None and expected is not None
        for given, wanted_one in zip(answer.prompt_logprobs[1:], expected[1:], strict=True):
            assert given is not None and wanted_one is not None
            assert given.logprob == pytest.approx(wanted_one.logprob, abs=1e-4)


def test_preempted_and_resumed_requests_say_the_same_with_guesses(tiny_model: TinyModels) -> None:
    folder, _ = tiny_model("llama")
    plain = run(build(folder, **SMALL).core, requests(**SAMPLED))
    said = {name: answer.tokens for name, answer in plain.items()}
    block_bytes = 3 * 4 * 2 * 2 * 16 * 4
    tight = build(
        folder, **{**SMALL, "max_model_len": 132}, prefix_caching=False, kv_cache_gib=34 * block_bytes / 2**30
    )
    tight.core.speculator = Speculator(KnowingDrafter(said, random.Random(7)), Fixed(6))
    answers = run(tight.core, requests(**SAMPLED))
    assert tight.core.scheduler.num_preemptions > 0
    assert {name: answer.tokens for name, answer in answers.items()} == said
    for done in (1, 13, 25):
        again = [
            make_request(str(n), random_tokens(n, seed=n), seed=n, max_tokens=30,
                         produced=pack_tokens(said[str(n)][:done]), **SAMPLED) for n in LENGTHS
        ]  # fmt: skip
        rest = speculate(folder, again, KnowingDrafter(said, random.Random(done)), **{"max_num_seqs": 3})
        assert {name: said[name][:done] + answer.tokens for name, answer in rest.items()} == said


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("method", ["ngram", "lookahead"])
def test_methods_without_files_never_change_the_tokens(
    method: Any, sampling: dict[str, Any], tiny_model: TinyModels
) -> None:
    folder, _ = tiny_model("qwen2")
    changes = {"max_tokens": 80, **sampling}
    plain = run(build(folder, **SMALL).core, requests(**changes))
    for adaptive in (False, True):
        asked = SpeculativeConfig(method=method, adaptive=adaptive, prompt_lookup_min=1)
        core = build(folder, **SMALL, speculative=asked).core
        guessed = run(core, requests(**changes))
        assert {name: a.tokens for name, a in guessed.items()} == {name: a.tokens for name, a in plain.items()}
        assert adaptive or core.stats().num_accepted_tokens > 0
