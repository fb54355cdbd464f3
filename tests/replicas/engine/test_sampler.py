"""The sampler against a slow, obvious one, field by field; and that a draw depends on its own request alone."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from replicas.engine.noise import hash_tokens
from replicas.engine.sampler import Sampler, prompt_logprobs
from replicas.engine.sequence import SamplePoint, Sequence
from tests.replicas.engine.tiny import make_sequence

VOCAB = 40
EOS = (2, 3)
DRAWS = 6000
SAMPLER = Sampler(hash_tokens(VOCAB, torch.device("cpu")), EOS)
LOGITS = torch.randn(VOCAB, generator=torch.Generator().manual_seed(8)) * 2
PROMPT = [5, 6, 7, 7]


def sequence(output: tuple[int, ...] = (), **sampling: Any) -> Sequence:
    seq = make_sequence(PROMPT, **{"temperature": 1.0, **sampling})
    seq.tokens.extend(output)
    return seq


def draw(logits: torch.Tensor, *seqs: Sequence) -> list[int]:
    return [
        sampled.token_id
        for sampled in SAMPLER.sample(logits.expand(len(seqs), -1).clone(), [SamplePoint(seq) for seq in seqs])
    ]


def obvious_distribution(output: tuple[int, ...], sampling: dict[str, Any]) -> np.ndarray:
    """Probabilities by the book, in float64, one token at a time."""
    x = LOGITS.double().numpy().copy()
    for token_id, bias in sampling.get("logit_bias", {}).items():
        x[token_id] += bias
    if len(output) < sampling.get("min_tokens", 0):
        for token_id in (*EOS, *sampling.get("stop_token_ids", ())):
            x[token_id] = -math.inf
    for token_id in set(PROMPT) | set(output):
        penalty = sampling.get("repetition_penalty", 1.0)
        x[token_id] = x[token_id] / penalty if x[token_id] > 0 else x[token_id] * penalty
    for token_id in set(output):
        x[token_id] -= sampling.get("presence_penalty", 0.0)
        x[token_id] -= sampling.get("frequency_penalty", 0.0) * output.count(token_id)
    x /= sampling.get("temperature", 1.0)
    p = np.exp(x - x.max())
    p[p < sampling.get("min_p", 0.0) * p.max()] = 0
    ranking = sorted(range(VOCAB), key=lambda i: -p[i])
    for token_id in ranking[sampling.get("top_k") or VOCAB :]:
        p[token_id] = 0
    p /= p.sum()
    before = 0.0
    for token_id in ranking:
        if before and before >= sampling.get("top_p", 1.0):  # the likeliest always stays
            p[token_id] = 0
        before += p[token_id]
    return p / p.sum()


FIELDS: list[tuple[tuple[int, ...], dict[str, Any]]] = [
    ((), {}),
    ((), {"temperature": 0.3}),
    ((), {"temperature": 1.9}),
    ((), {"top_k": 1}),
    ((), {"top_k": 5}),
    ((), {"top_k": VOCAB + 10}),
    ((), {"top_p": 0.5}),
    ((), {"top_p": 0.95}),
    ((), {"top_p": 1e-6}),
    ((), {"top_p": 0.0}),
    ((), {"min_p": 0.1}),
    ((), {"temperature": 1.5, "min_p": 0.02, "top_k": 12, "top_p": 0.8}),
    ((), {"logit_bias": {9: 100.0, 10: 99.0}}),
    ((), {"logit_bias": {int(LOGITS.argmax()): -100.0}}),
    ((), {"min_tokens": 1, "logit_bias": {2: 5.0, 3: 5.0, 4: 5.0}, "stop_token_ids": (4,)}),
    ((8, 8), {"min_tokens": 2, "logit_bias": {2: 2.0}}),
    ((8, 8, 8, 11), {"presence_penalty": 1.5}),
    ((8, 8, 8, 11), {"frequency_penalty": 0.7}),
    ((8, 8, 8, 11), {"frequency_penalty": -0.4, "presence_penalty": 0.3}),
    ((8, 8, 8, 11), {"repetition_penalty": 1.8}),
    ((), {"repetition_penalty": 0.6}),
    ((8, 9), {"repetition_penalty": 1.2, "presence_penalty": 0.5, "temperature": 0.8, "top_p": 0.9, "min_p": 0.01}),
]


@pytest.mark.parametrize(("output", "sampling"), FIELDS)
def test_draws_follow_the_obvious_distribution(output: tuple[int, ...], sampling: dict[str, Any]) -> None:
    expected = obvious_distribution(output, sampling) * DRAWS
    drawn = draw(LOGITS, *(sequence(output, seed=seed, **sampling) for seed in range(DRAWS)))
    counts = np.bincount(drawn, minlength=VOCAB)
    assert counts[expected == 0].sum() == 0
    # Rare tokens are counted together, so that chi-square's approximation holds.
    rare = expected < 8
    pairs = [(counts[i], expected[i]) for i in np.flatnonzero(~rare)] + [(counts[rare].sum(), expected[rare].sum())]
    statistic = sum((seen - due) ** 2 / due for seen, due in pairs if due > 0)
    freedom = sum(due > 0 for _, due in pairs) - 1
    assert statistic < freedom + 5 * math.sqrt(2 * max(freedom, 1))


def test_draws_follow_the_distribution_over_the_positions_of_one_request() -> None:
    seq = sequence(seed=77)
    drawn = []
    for _ in range(DRAWS):
        drawn += draw(LOGITS, seq)
        seq.tokens.append(1)
    expected = obvious_distribution((), {}) * DRAWS
    counts = np.bincount(drawn, minlength=VOCAB)
    common = expected >= 8
    statistic = ((counts - expected) ** 2 / expected)[common].sum()
    assert statistic < common.sum() + 5 * math.sqrt(2 * common.sum())


def test_temperature_zero_takes_the_likeliest_after_penalties_and_bias() -> None:
    best = int(LOGITS.argmax())
    assert draw(LOGITS, sequence(temperature=0.0)) == [best]
    assert draw(LOGITS, sequence(temperature=1e-6)) == [best]
    assert draw(LOGITS, sequence(temperature=0.0, logit_bias={9: 100.0})) == [9]
    assert draw(LOGITS, sequence((best,), temperature=0.0, presence_penalty=2.0, frequency_penalty=2.0)) != [best]


def test_a_draw_does_not_depend_on_the_rest_of_the_batch() -> None:
    settings = [
        {"seed": 1},
        {"seed": 2**63 - 1, "top_p": 0.9},
        {"seed": 3, "temperature": 0.0},
        {"seed": 4, "presence_penalty": 1.0, "logprobs": 3},
        {"seed": 5, "top_k": 7, "min_p": 0.01, "min_tokens": 9},
    ]
    seqs = [sequence((8, 9), **setting) for setting in settings]
    alone = [draw(LOGITS, seq)[0] for seq in seqs]
    assert draw(LOGITS, *seqs) == alone
    assert draw(LOGITS, *reversed(seqs)) == alone[::-1]


def test_a_resumed_request_draws_what_it_would_have_drawn() -> None:
    sampling: dict[str, Any] = {
        "seed": 2**62 + 1,
        "temperature": 1.3,
        "frequency_penalty": 0.5,
        "repetition_penalty": 1.3,
        "min_tokens": 6,
    }
    whole = sequence(**sampling)
    for _ in range(30):
        whole.tokens.append(draw(LOGITS, whole)[0])
    produced = tuple(whole.tokens[len(PROMPT) :])
    for done in (1, 5, 17, 29):
        assert draw(LOGITS, sequence(produced[:done], **sampling)) == [produced[done]]


def test_logprobs_are_those_of_the_raw_distribution_most_likely_first() -> None:
    seq = sequence(seed=3, temperature=0.7, logprobs=4, logit_bias={9: 100.0}, top_k=3)
    plain = sequence(seed=3)
    (sampled, other) = SAMPLER.sample(LOGITS.expand(2, -1).clone(), [SamplePoint(seq), SamplePoint(plain)])
    raw = torch.log_softmax(LOGITS.double(), dim=0)
    assert sampled.logprob is not None and other.logprob is None
    assert sampled.token_id == sampled.logprob.token_id == 9
    assert sampled.logprob.logprob == pytest.approx(raw[9].item(), abs=1e-5)
    best = raw.sort(descending=True)
    assert [token_id for token_id, _ in sampled.logprob.top] == best.indices[:4].tolist()
    assert [value for _, value in sampled.logprob.top] == pytest.approx(best.values[:4].tolist(), abs=1e-5)


def test_logprobs_zero_gives_the_sampled_token_alone() -> None:
    (sampled,) = SAMPLER.sample(LOGITS[None].clone(), [SamplePoint(sequence(temperature=0.0, logprobs=0))])
    assert sampled.logprob is not None and sampled.logprob.top == ()


def test_prompt_logprobs_score_given_tokens() -> None:
    logits = torch.stack([LOGITS, LOGITS.flip(0)])
    first, second = prompt_logprobs(logits, [4, 5], 2)
    raw = torch.log_softmax(logits, dim=-1)
    assert (first.token_id, second.token_id) == (4, 5)
    assert first.logprob == pytest.approx(raw[0, 4].item()) and second.logprob == pytest.approx(raw[1, 5].item())
    assert [token_id for token_id, _ in second.top] == raw[1].topk(2).indices.tolist()


@pytest.mark.parametrize("top_p", [0.2, 0.9, 0.999])
@pytest.mark.parametrize("scale", [0.001, 1.0, 5.0])
def test_top_p_over_a_large_vocabulary_keeps_the_smallest_set(top_p: float, scale: float) -> None:
    logits = torch.randn(5000, generator=torch.Generator().manual_seed(1)) * scale
    sampler = Sampler(hash_tokens(5000, torch.device("cpu")), EOS)
    ranked = torch.softmax(logits.double(), dim=0).sort(descending=True)
    size = int((ranked.values.cumsum(0) < top_p).sum()) + 1
    allowed = set(ranked.indices[:size].tolist())
    drawn = set()
    for seed in range(300):
        (sampled,) = sampler.sample(logits[None].clone(), [SamplePoint(sequence(seed=seed, top_p=top_p))])
        drawn.add(sampled.token_id)
    # One token at the border may fall either way by rounding.
    assert len(drawn - allowed) <= 1 and drawn - allowed <= set(ranked.indices[: size + 2].tolist())
    assert len(drawn) > min(size, 300) // 8
