"""Keys and values in 8 bits: rounded as said, read by every kind of attention, kept through copies and preemption."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from replicas.engine.attention import Context, GatherDecode, KvCache, KvGeometry, block_bytes
from replicas.engine.drafts import Drafts
from replicas.engine.families import read_spec
from replicas.engine.kernels.attention import KernelDecode, has_decode
from replicas.engine.kernels.library import HEAD_DIMS, Kernels
from replicas.engine.kernels.pointwise import KernelPointwise
from replicas.engine.kv_rows import KvDtype, KvRows, RowKind, make_rows, row_bytes
from replicas.engine.pointwise import TorchPointwise
from replicas.engine.prefill import Chunk, SingleQueries, TiledChunk, pick_chunk
from replicas.engine.verify import GatherVerify, Queries, pick_verify, visible_keys
from tests.replicas.engine.driver import Answer, build, make_request, run
from tests.replicas.engine.quantization.quantised_kit import make_plain
from tests.replicas.engine.tiny import random_tokens

CPU = torch.device("cpu")
STORED: tuple[KvDtype, ...] = ("int8", "fp8", "fp8_e4m3", "fp8_e5m2")
SMALL: dict[str, Any] = {"block_size": 4, "max_num_batched_tokens": 24, "max_num_seqs": 6, "max_model_len": 128}


def rows_of(stored: KvDtype, kernels: Kernels | None = None, head_dim: int = 16, count: int = 8) -> KvRows:
    return make_rows((count, head_dim), RowKind(stored, torch.float32, CPU, kernels))


def meant(values: Tensor, stored: KvDtype) -> Tensor:
    """What a row is after rounding, by the definition."""
    if stored == "auto":
        return values
    if stored == "int8":
        scale = (values.abs().amax(dim=-1, keepdim=True) / 127).half().float()
        return (values / scale.clamp_min(1e-30)).round().clamp(-127, 127) * scale
    kind = torch.float8_e5m2 if stored == "fp8_e5m2" else torch.float8_e4m3fn
    most = torch.finfo(kind).max
    return values.clamp(-most, most).to(kind).float()


@pytest.mark.parametrize("size", [1.0, 1e-3, 3000.0])
@pytest.mark.parametrize("stored", ["auto", *STORED])
def test_rows_are_read_as_they_were_rounded(stored: KvDtype, size: float, kernels: Kernels) -> None:
    torch.manual_seed(0)
    values, where = torch.randn(3, 16) * size, torch.tensor([6, 0, 3])
    for compiled in (None, kernels):
        rows = rows_of(stored, compiled)
        rows.write(where, values)
        # Where a value lies on the edge between two codes, either is right.
        step = values.abs().amax(dim=1, keepdim=True) / 127 if stored == "int8" else torch.zeros(1)
        assert ((rows.read(where) - meant(values, stored)).abs() <= step * 1.01).all()
        assert (rows.read(where) == meant(values, stored)).float().mean() > 0.95
        assert not rows.read(torch.tensor([1, 2, 4, 5, 7])).any()


@pytest.mark.parametrize("stored", STORED)
def test_rows_of_zeros_and_of_ends_survive(stored: KvDtype, kernels: Kernels) -> None:
    values = torch.stack([torch.zeros(16), torch.full((16,), 1e9), torch.full((16,), -1.0)])
    for compiled in (None, kernels):
        rows = rows_of(stored, compiled)
        rows.write(torch.arange(3), values.clamp(-8e6, 8e6))
        read = rows.read(torch.arange(3))
        assert torch.isfinite(read).all()
        assert not read[0].any()
        assert torch.allclose(read[2], values[2], rtol=1e-3)


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("stored", ["auto", *STORED])
def test_compiled_attention_equals_gathering_first(stored: KvDtype, head_dim: int, kernels: Kernels) -> None:
    torch.manual_seed(0)
    geometry = KvGeometry(6, 2, head_dim, 4, torch.float32, CPU).storing(stored)
    assert has_decode(geometry)
    cache = KvCache(geometry, 1, 20, kernels).layers[0]
    cache.write(torch.arange(20 * geometry.rows_per_block), torch.randn(20 * geometry.rows_per_block, head_dim))
    blocks = torch.randperm(20)[:12].view(3, 4)
    bias = torch.zeros(3, 16)
    bias[0, 9:], bias[1, :5], bias[2, 1:] = (float("-inf"),) * 3
    q = torch.randn(3, 6, head_dim)
    context = Context(blocks, bias)
    found = KernelDecode(kernels, geometry, context)(q, cache)
    torch.testing.assert_close(found, GatherDecode(geometry, context)(q, cache), atol=1e-5, rtol=1e-4)


def test_compiled_norms_and_gates_equal_those_of_torch(kernels: Kernels) -> None:
    torch.manual_seed(0)
    compiled, plain = KernelPointwise(kernels), TorchPointwise()
    for shape in ((1, 64), (5, 7), (3, 2, 48), (4, 577)):
        x, weight = torch.randn(shape) * 3, torch.randn(shape[-1])
        torch.testing.assert_close(compiled.norm(x, weight, 1e-5), plain.norm(x, weight, 1e-5), atol=1e-6, rtol=1e-5)
    for columns in (8, 30, 129):
        x = torch.randn(5, 2 * columns) * 20
        torch.testing.assert_close(compiled.gate(x), plain.gate(x), atol=1e-5, rtol=1e-5)
    half = torch.randn(2, 64).bfloat16()
    assert torch.equal(compiled.norm(half, half[0], 1e-5), plain.norm(half, half[0], 1e-5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_plain("llama", tmp_path_factory.mktemp("plain"))


def answers_of(folder: Path, **settings: Any) -> dict[str, Answer]:
    core = build(folder, **{**SMALL, **settings}).core
    prompts = [make_request(str(n), random_tokens(n * 11, n), prompt_logprobs=0, max_tokens=24) for n in range(3, 9)]
    return run(core, prompts)


def scores(answers: dict[str, Answer]) -> Tensor:
    entries = [entry for answer in answers.values() for entry in answer.prompt_logprobs or () if entry is not None]
    return torch.tensor([entry.logprob for entry in entries])


@pytest.mark.parametrize(("stored", "most"), [("int8", 0.04), ("fp8", 0.25), ("fp8_e4m3", 0.25), ("fp8_e5m2", 0.5)])
def test_scores_are_near_those_of_a_plain_cache(stored: str, most: float, folder: Path, kernels: Kernels) -> None:
    exact = scores(answers_of(folder))
    for compiled in ("auto", "none"):
        found = scores(answers_of(folder, kv_cache_dtype=stored, kernels=compiled))
        assert 0 < (found - exact).abs().mean() < most


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_an_answer_does_not_depend_on_how_its_prompt_was_cut(stored: str, folder: Path, kernels: Kernels) -> None:
    for compiled in ("auto", "none"):
        settings: dict[str, Any] = {"kv_cache_dtype": stored, "kernels": compiled}
        whole = answers_of(folder, **settings, max_num_batched_tokens=512)
        cut = answers_of(folder, **settings, max_num_batched_tokens=7, max_num_seqs=2)
        assert {n: a.tokens for n, a in whole.items()} == {n: a.tokens for n, a in cut.items()}
        assert (scores(whole) - scores(cut)).abs().max() < 2e-2


def test_preempted_requests_resume_with_identical_tokens(folder: Path, kernels: Kernels) -> None:
    size = block_bytes(read_spec(folder), 4, torch.float32, "int8")
    settings: dict[str, Any] = {**SMALL, "kv_cache_dtype": "int8", "prefix_caching": False}
    cores = [build(folder, **settings, kv_cache_gib=blocks * size / 2**30).core for blocks in (200, 51)]
    prompts = [make_request(str(n), random_tokens(n * 5, n), temperature=1.0, max_tokens=40) for n in range(2, 12)]
    roomy, tight = (run(core, prompts) for core in cores)
    assert [core.scheduler.num_preemptions > 0 for core in cores] == [False, True]
    assert {n: a.tokens for n, a in roomy.items()} == {n: a.tokens for n, a in tight.items()}


@pytest.mark.parametrize("stored", ["int8", "fp8"])
def test_copied_and_moved_rows_keep_their_scales(stored: KvDtype) -> None:
    torch.manual_seed(0)
    geometry = KvGeometry(2, 1, 16, 4, torch.float32, CPU).storing(stored)
    cache = KvCache(geometry, 2, 6)
    for layer in cache.layers:
        layer.write(torch.arange(48), torch.randn(48, 16) * torch.arange(1, 49)[:, None])
    before = [layer.read(torch.arange(48)) for layer in cache.layers]
    cache.copy([(0, 3), (1, 5)])
    cache.move(torch.tensor([9, 10]), torch.tensor([8, 9]))
    for layer, old in zip(cache.layers, before, strict=True):
        assert torch.equal(layer.read(torch.arange(24, 32)), old[:8])
        assert torch.equal(layer.read(torch.tensor([8, 9])), old[[9, 10]])


@pytest.mark.parametrize("stored", ["auto", *STORED])
def test_a_row_takes_the_bytes_it_is_said_to_take(stored: KvDtype) -> None:
    rows = rows_of(stored, head_dim=64, count=10)
    assert sum(tensor.nbytes for tensor in rows.tensors) == 10 * row_bytes(64, stored, torch.float32)


def test_an_8_bit_cache_holds_more_tokens_in_the_same_memory(folder: Path) -> None:
    settings: dict[str, Any] = {"kv_cache_gib": 2e-4, "max_model_len": None}
    plain, small = (build(folder, **{**SMALL, **settings, "kv_cache_dtype": d}).facts for d in ("auto", "int8"))
    assert small.num_blocks / plain.num_blocks == pytest.approx(64 / 18, rel=0.05)  # 16 floats; 16 codes and a half
    assert small.kv_cache_dtype == "int8"


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("stored", ["auto", *STORED])
def test_a_small_chunk_that_gathers_nothing_equals_tiles(stored: KvDtype, window: int | None, kernels: Kernels) -> None:
    torch.manual_seed(0)
    geometry, cache = filled(stored, kernels)
    compiled = partial(KernelDecode, kernels)
    pick, qkv = pick_chunk(geometry, compiled), torch.randn(7, 10, 16)
    small = Chunk(
        range(13, 20), range(8 if window else 0, 20), window, torch.tensor([7, 3, 11, 2, 19])[-3 if window else -5 :]
    )
    found = pick(geometry, small)
    assert isinstance(found, SingleQueries)
    torch.testing.assert_close(found(qkv, cache), TiledChunk(geometry, small)(qkv, cache), atol=1e-5, rtol=1e-4)
    many = Chunk(range(7, 47), range(48), None, torch.arange(12))
    first = Chunk(range(7), range(7), None, None)
    assert all(isinstance(pick(geometry, other), TiledChunk) for other in (many, first))


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("stored", ["auto", *STORED])
def test_guesses_checked_without_gathering_are_checked_alike(
    stored: KvDtype, window: int | None, kernels: Kernels
) -> None:
    torch.manual_seed(0)
    geometry, cache = filled(stored, kernels)
    verify = pick_verify(partial(KernelDecode, kernels))
    chain, tree = Drafts((1, 2, 3), (0, 1, 2)), Drafts((1, 2, 3, 4), (0, 0, 1, 1))
    queries = Queries(
        [range(5, 9), range(9, 14)],
        torch.tensor([[7, 3, 11, 2], [5, 6, 0, 0]]),
        [visible_keys(10, chain, range(16), window), visible_keys(3, tree, range(8), window)],
    )
    q = torch.randn(9, 6, 16)
    expected = GatherVerify(geometry, queries)(q, cache)
    torch.testing.assert_close(verify(geometry, queries)(q, cache), expected, atol=1e-5, rtol=1e-4)


def filled(stored: KvDtype, kernels: Kernels) -> tuple[KvGeometry, KvRows]:
    """A layer of 20 blocks of 4 tokens, full of noise."""
    geometry = KvGeometry(6, 2, 16, 4, torch.float32, CPU).storing(stored)
    cache = KvCache(geometry, 1, 20, kernels).layers[0]
    cache.write(torch.arange(20 * geometry.rows_per_block), torch.randn(20 * geometry.rows_per_block, 16))
    return geometry, cache
