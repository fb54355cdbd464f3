"""Every way to multiply low-rank matrices against the sum written out, for mixed ranks, rows and types."""

from __future__ import annotations

import os
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from configs.runtime import home_dir
from replicas.engine.kernels.build import find_compiler, load_kernels
from replicas.engine.lora.compiled import Compiled, agrees
from replicas.engine.lora.layout import Part, TargetShape
from replicas.engine.lora.pool import LoraPool, PoolLayer, PoolPlan
from replicas.engine.lora.product import DenseSegment, Gathered, InPlace, LoraProduct, Segment, ShortProducts

CPU = torch.device("cpu")
NUM_ROWS, NUM_PAGES = 40, 90
SHAPES = {
    "fused": TargetShape(37, (Part("q", slice(0, 48)), Part("k", slice(48, 65)), Part("v", slice(65, 82)))),
    "two parts": TargetShape(16, (Part("gate", slice(0, 33)), Part("up", slice(33, 66)))),
    "plain": TargetShape(96, (Part("o", slice(0, 40)),)),
}
TYPES = (torch.float32, torch.bfloat16, torch.float16)


def compiled(dtype: torch.dtype = torch.float32, kept: torch.dtype = torch.float32) -> ShortProducts:
    if find_compiler(os.environ) is None:
        pytest.skip("no C++ compiler here")
    kernels = load_kernels(home_dir(os.environ) / "kernels", os.environ)
    assert kernels is not None
    return Compiled(kernels, dtype, kept)


def filled(shape: TargetShape, dtype: torch.dtype) -> PoolLayer:
    """A layer of random pages, the one of zeros excepted."""
    pool = LoraPool({"qkv": shape}, PoolPlan(1, NUM_PAGES, dtype, CPU))
    generator = torch.Generator().manual_seed(1)
    layer = pool.layers["qkv"][0]
    for matrix in layer.matrices:
        matrix[1:] = torch.randn(matrix[1:].shape, generator=generator).to(dtype)
    return layer


def written_out(x: Tensor, layer: PoolLayer, segments: list[Segment], shape: TargetShape) -> Tensor:
    """The sum over rows, pages and parts, in float64, added to ones."""
    y = torch.ones(NUM_ROWS, shape.out_features, dtype=torch.float64)
    for segment in segments:
        for row in segment.rows:
            for i, part in enumerate(shape.parts):
                for page in segment.pages:
                    factor = layer.a[page, i].double() @ x[row].double()
                    y[row, part.columns] += factor * layer.b[i][page].double()
    return y


@st.composite
def batches(draw: st.DrawFn) -> list[Segment]:
    """Some rows in no order, cut into segments; pages that no two adapters share; ranks of 1 to 20."""
    rows = draw(st.lists(st.integers(0, NUM_ROWS - 1), unique=True, min_size=1, max_size=NUM_ROWS))
    pages = iter(draw(st.permutations(range(1, NUM_PAGES))))
    segments = []
    while rows:
        count = draw(st.integers(1, len(rows)))
        rank = draw(st.sampled_from([1, 2, 4, 7, 8, 9, 16, 20]))
        own = [page for page, _ in zip(pages, range(rank), strict=False)]
        if not own:
            break
        segments.append(Segment(sorted(rows[:count]), own))
        rows = rows[count:]
    return segments


def multiplied(kind: str, segments: list[Segment], shape: TargetShape, layer: PoolLayer, x: Tensor) -> Tensor:
    """The same by one of our ways."""
    y = torch.ones(NUM_ROWS, shape.out_features, dtype=x.dtype)
    if kind == "dense":
        for segment in segments:
            DenseSegment(segment, shape, CPU)(y, x, layer)
        return y
    short: ShortProducts = InPlace() if kind == "in place" else Gathered(CPU)
    if kind == "compiled":
        short = compiled(x.dtype, layer.a.dtype)
    short.make(segments, shape)(y, x, layer)
    return y


@pytest.mark.parametrize("kind", ["dense", "in place", "gathered", "compiled"])
@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=15, deadline=None)
@given(segments=batches())
def test_every_way_equals_the_sum_written_out(kind: str, name: str, segments: list[Segment]) -> None:
    shape = SHAPES[name]
    layer, x = filled(shape, torch.float32), torch.randn(NUM_ROWS, shape.in_features)
    expected = written_out(x, layer, segments, shape)
    torch.testing.assert_close(multiplied(kind, segments, shape, layer, x).double(), expected, atol=1e-3, rtol=1e-5)


@pytest.mark.parametrize("kept", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("kind", ["dense", "gathered", "compiled"])
def test_types_may_differ_between_activations_and_pool(kind: str, dtype: torch.dtype, kept: torch.dtype) -> None:
    shape = SHAPES["fused"]
    layer, x = filled(shape, kept), torch.randn(NUM_ROWS, shape.in_features).to(dtype)
    segments = [Segment([3], range(1, 9)), Segment([0, 2, 7, 8, 9, 11, 30], range(20, 36)), Segment([4, 5], [9])]
    expected = written_out(x, layer, segments, shape)
    tolerance = 1e-3 if dtype == torch.float32 else 0.02 * expected.abs().max().item()
    found = multiplied(kind, segments, shape, layer, x)
    torch.testing.assert_close(found.double(), expected, atol=tolerance, rtol=0.02)


class OffByOne:
    """A kernel that reads a wrong page."""

    def takes(self, segment: Segment) -> bool:
        return True

    def make(self, segments: Sequence[Segment], shape: TargetShape) -> LoraProduct:
        return Gathered(CPU).make([Segment(s.rows, [page + 1 for page in s.pages]) for s in segments], shape)


@pytest.mark.parametrize("kept", TYPES, ids=str)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_a_kernel_is_only_trusted_when_it_agrees_with_torch(dtype: torch.dtype, kept: torch.dtype) -> None:
    assert agrees(Gathered(CPU), dtype, kept) and agrees(compiled(dtype, kept), dtype, kept)
    assert not agrees(OffByOne(), dtype, kept)


def test_rows_without_an_adapter_stay_as_they_are() -> None:
    shape = SHAPES["fused"]
    layer, x = filled(shape, torch.float32), torch.randn(NUM_ROWS, shape.in_features)
    segments = [Segment([5, 9], [4, 3]), Segment([7], [1, 2, 6, 8, 10])]
    for kind in ("dense", "in place", "gathered", "compiled"):
        y = multiplied(kind, segments, shape, layer, x)
        untouched = [row for row in range(NUM_ROWS) if row not in (5, 7, 9)]
        assert (y[untouched] == 1).all() and (y[[5, 7, 9]] != 1).any(), kind


@pytest.mark.parametrize("threads", [1, 2])
def test_the_compiled_kernel_takes_as_many_threads_as_it_is_given(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        shape = SHAPES["two parts"]
        layer, x = filled(shape, torch.float32), torch.randn(NUM_ROWS, shape.in_features)
        segments = [Segment([row], [2 * row + 1, 2 * row + 2]) for row in range(NUM_ROWS)]
        expected = written_out(x, layer, segments, shape)
        found = multiplied("compiled", segments, shape, layer, x)
        torch.testing.assert_close(found.double(), expected, atol=1e-3, rtol=1e-5)
    finally:
        torch.set_num_threads(before)
