"""Every family computes what transformers computes: in one pass, in chunks, token by token, beside others."""

from __future__ import annotations

import copy

import pytest
import torch

from tests.replicas.engine.conftest import TinyModels
from tests.replicas.engine.tiny import (
    FAMILIES,
    GATHERED,
    IN_PLACE,
    ByHand,
    Kernels,
    make_sequence,
    oracle_logits,
    random_tokens,
    scattered_tables,
)

KERNELS = [pytest.param(IN_PLACE, id="in place"), pytest.param(GATHERED, id="gathered")]
TOLERANCE = 1e-4


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_one_pass_equal_transformers(name: str, tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model(name)
    tokens = random_tokens(50, seed=1)
    seq = make_sequence(tokens)
    scattered_tables(seq, capacity=50)
    (logits,) = ByHand.load(folder, IN_PLACE).step((seq, 0, 50))
    close(logits, oracle_logits(oracle, tokens))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_of_chunks_and_single_tokens_equal_transformers(
    name: str, kernels: Kernels, tiny_model: TinyModels
) -> None:
    folder, oracle = tiny_model(name)
    tokens = random_tokens(60, seed=2)
    seq = make_sequence(tokens)
    scattered_tables(seq, capacity=60)
    model = ByHand.load(folder, kernels)
    ends = [1, 2, 9, 10, 25, 28, 41, *range(42, 61)]
    parts = [model.step((seq, start, end))[0] for start, end in zip([0, *ends], ends, strict=False)]
    close(torch.cat(parts), oracle_logits(oracle, tokens))


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["llama", "mistral with window", "qwen2 with some windows"])
def test_sequences_in_one_step_do_not_see_each_other(name: str, kernels: Kernels, tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model(name)
    lengths = [3, 120, 17, 44, 90, 5, 16]
    seqs = [make_sequence(random_tokens(n + 6, seed=n), str(n)) for n in lengths]
    scattered_tables(*seqs, capacity=126)
    model = ByHand.load(folder, kernels)
    parts: list[list[torch.Tensor]] = [[] for _ in seqs]
    for step in range(8):
        # Sequence i starts in step i // 3, in two chunks; later steps mix chunks with single tokens.
        work = []
        for i, (seq, n) in enumerate(zip(seqs, lengths, strict=True)):
            age = step - i // 3
            spans = [(0, n // 2), (n // 2, n), *((n + k, n + k + 1) for k in range(6))]
            if 0 <= age < len(spans):
                work.append((i, seq, *spans[age]))
        for (i, *_), logits in zip(work, model.step(*(item[1:] for item in work)), strict=True):
            parts[i].append(logits)
    for seq, mine in zip(seqs, parts, strict=True):
        ours = torch.cat(mine)
        close(ours, oracle_logits(oracle, seq.tokens)[: len(ours)])
        assert len(ours) >= 6


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", ["llama", "llama without GQA", "mistral with window"])
def test_chunks_of_several_tiles_equal_transformers(name: str, kernels: Kernels, tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model(name)
    tokens = random_tokens(256, seed=3)
    whole, halves = make_sequence(tokens, "a"), make_sequence(tokens, "b")
    scattered_tables(whole, halves, capacity=256)
    model = ByHand.load(folder, kernels)
    model.step((halves, 0, 101))
    (one_pass, rest) = model.step((whole, 0, 256), (halves, 101, 256))
    expected = oracle_logits(oracle, tokens)
    close(one_pass, expected)
    close(rest, expected[101:])


def test_dynamic_rope_beyond_the_trained_length_equals_transformers_token_by_token(tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model("dynamic rope")
    tokens = random_tokens(280, seed=4)  # trained for 256
    seq = make_sequence(tokens)
    scattered_tables(seq, capacity=280)
    model = ByHand.load(folder, IN_PLACE)
    ours = [model.step((seq, 0, 250))[0][-1]]
    with torch.no_grad():
        first = oracle(torch.tensor([tokens[:250]]), use_cache=True)
        theirs, cache = [first.logits[0, -1]], first.past_key_values
        for i in range(250, 280):
            ours.append(model.step((seq, i, i + 1))[0][0])
            more = oracle(torch.tensor([[tokens[i]]]), past_key_values=cache, use_cache=True)
            theirs.append(more.logits[0, -1])
    close(torch.stack(ours), torch.stack(theirs))


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral with window"])
def test_bfloat16_is_as_near_to_float32_as_transformers_bfloat16(name: str, tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model(name)
    tokens = random_tokens(50, seed=6)
    seq = make_sequence(tokens)
    scattered_tables(seq, capacity=50)
    model = ByHand.load(folder, GATHERED, torch.bfloat16)
    ours = torch.cat([model.step((seq, start, end))[0] for start, end in ((0, 20), (20, 48), (48, 49), (49, 50))])
    exact = oracle_logits(oracle, tokens)
    theirs = oracle_logits(copy.deepcopy(oracle).to(torch.bfloat16), tokens).float()
    assert (ours - exact).std() < 1.2 * (theirs - exact).std()


def test_copied_blocks_hold_what_their_sources_held(tiny_model: TinyModels) -> None:
    folder, oracle = tiny_model("llama")
    tokens = random_tokens(20, seed=7)
    first, second = make_sequence(tokens, "a"), make_sequence([*tokens[:18], 5, 6], "b")
    scattered_tables(first, second, capacity=20)
    model = ByHand.load(folder, IN_PLACE)
    model.step((first, 0, 20))
    second.block_ids[:4] = first.block_ids[:4]
    model.cache.copy([(first.block_ids[4], second.block_ids[4])])
    (logits,) = model.step((second, 18, 20))
    close(logits, oracle_logits(oracle, second.tokens)[18:])
    (again,) = model.step((first, 19, 20))
    close(again, oracle_logits(oracle, tokens)[19:])
