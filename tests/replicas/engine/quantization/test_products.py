"""Products with quantised weights equal: dequantise, then multiply as floats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor

from replicas.engine.kernels.library import Kernels, Kind, Offset
from replicas.engine.quantization import rounding
from replicas.engine.quantization.linears import DequantisingLinear, KernelLinear, QuantisedLinears, rows_of
from replicas.engine.quantization.matrix import FP4, Quantised, rounded_inputs, stacked
from replicas.engine.quantization.pack import packed, unpacked

CPU = torch.device("cpu")
ODD = 1 << 31


def with_minimum(weight: Tensor, group: int) -> Quantised:
    """As `to_int4`, offsets given as minima: what Q4_1 has."""
    matrix = rounding.to_int4(weight, group)
    assert matrix.offset is not None
    return replace(matrix, offset_kind=Offset.MINIMUM, offset=-matrix.scale * matrix.offset)


def eight_bits_with_zeros(weight: Tensor, group: int) -> Quantised:
    torch.manual_seed(1)
    groups = -(-weight.shape[1] // group)
    codes = torch.randint(0, 256, weight.shape, dtype=torch.uint8)
    zero = torch.randint(0, 256, (weight.shape[0], groups)).float()
    return Quantised(Kind.INTEGER8, codes, torch.rand(weight.shape[0], groups), group, Offset.ZERO, zero)


def sorted_columns(weight: Tensor) -> Quantised:
    order = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(2))
    return replace(rounding.to_int4(weight[:, order], 16), order=order)


def fp4(weight: Tensor) -> Quantised:
    return replace(rounding.to_nf4(weight), table=torch.tensor(FP4))


def fp8_e5m2(weight: Tensor) -> Quantised:
    return Quantised(Kind.E5M2, weight.to(torch.float8_e5m2), torch.rand(weight.shape[0], 1), weight.shape[1])


SCHEMES: dict[str, Callable[[Tensor], Quantised]] = {
    "int8": rounding.to_int8,
    "w8a8": rounding.to_w8a8,
    "w8a8 with a fixed scale": lambda weight: replace(rounding.to_w8a8(weight), activation_scale=0.02),
    "int4 in groups of 32": partial(rounding.to_int4, group=32),
    "int4 in groups of 64": partial(rounding.to_int4, group=64),
    "int4 in groups of 128": partial(rounding.to_int4, group=128),
    "int4, one group a row": partial(rounding.to_int4, group=ODD),
    "int4 with minima": partial(with_minimum, group=32),
    "int8 in groups with zeros": partial(eight_bits_with_zeros, group=32),
    "int4, columns in another order": sorted_columns,
    "nf4": rounding.to_nf4,
    "nf4 in blocks of 128": partial(rounding.to_nf4, block=128),
    "fp4": fp4,
    "fp8": rounding.to_fp8,
    "fp8 e5m2": fp8_e5m2,
}
SHAPES = [(64, 64), (70, 48), (1, 8), (200, 100), (65, 7), (130, 576)]


def obvious(matrix: Quantised, x: Tensor, bias: Tensor | None) -> Tensor:
    y = rounded_inputs(x, matrix).double() @ matrix.dequantised().double().T
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_compiled_products_equal_dequantising_first(kernels: Kernels, scheme: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, bias = SCHEMES[scheme](torch.randn(shape)), torch.randn(shape[0])
    for num_tokens in (1, 2, 5, 7, 20):
        x = torch.randn(num_tokens, shape[1]) * torch.tensor([1.0, 30.0])[torch.arange(num_tokens) % 2, None]
        for added in (None, bias):
            exact = obvious(matrix, x, added)
            linear = QuantisedLinears(kernels, CPU).linear(matrix, added)
            assert isinstance(linear, KernelLinear)
            sizes = x.double().abs() @ matrix.dequantised().double().abs().T
            error = (linear(x) - exact).abs().amax(dim=1) / sizes.amax(dim=1)
            # Where inputs are rounded to 8 bits, one of them may fall on the other side of a half.
            assert error.max() < (1e-2 if matrix.activation_bits == 8 else 5e-5), f"{num_tokens=} {error=}"


@pytest.mark.parametrize("shape", [(70, 48), (65, 7), (1100, 40)], ids=str)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_products_without_a_compiler_equal_dequantising_first(scheme: str, shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix, bias, x = SCHEMES[scheme](torch.randn(shape)), torch.randn(shape[0]), torch.randn(5, shape[1])
    linear = QuantisedLinears(None, CPU).linear(matrix, bias)
    assert isinstance(linear, DequantisingLinear)
    exact = obvious(matrix, x, bias)
    assert (linear(x) - exact).abs().max() / exact.abs().max() < 1e-5


def test_bfloat16_activations_come_back_as_bfloat16(kernels: Kernels) -> None:
    torch.manual_seed(0)
    matrix, x = rounding.to_int8(torch.randn(30, 40)), torch.randn(3, 40).bfloat16()
    for linear in (QuantisedLinears(kernels, CPU).linear(matrix, None), DequantisingLinear(matrix, None)):
        y = linear(x)
        assert y.dtype == torch.bfloat16
        assert torch.allclose(y.double(), obvious(matrix, x.float(), None), rtol=1e-2, atol=5e-2)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_packing_keeps_every_code_and_factor(scheme: str) -> None:
    torch.manual_seed(0)
    matrix = SCHEMES[scheme](torch.randn(70, 48))
    rows = torch.tensor([69, 0, 64, 3])
    assert torch.equal(unpacked(packed(matrix, None), rows).dequantised(), matrix.take(rows).dequantised())


@pytest.mark.parametrize("scheme", SCHEMES)
def test_rows_of_a_linear_are_those_of_its_matrix(kernels: Kernels, scheme: str) -> None:
    torch.manual_seed(0)
    matrix, rows = SCHEMES[scheme](torch.randn(70, 48)), torch.tensor([5, 5, 66])
    for linears in (QuantisedLinears(kernels, CPU), QuantisedLinears(None, CPU)):
        assert torch.equal(rows_of(linears.linear(matrix, None), rows), matrix.dequantised()[rows])


def test_factors_that_half_precision_cannot_hold_stay_float32(kernels: Kernels) -> None:
    torch.manual_seed(0)
    matrix = rounding.to_int8(torch.randn(30, 40) * 1e-9)
    linear, x = QuantisedLinears(kernels, CPU).linear(matrix, None), torch.randn(2, 40)
    exact = obvious(matrix, x, None)
    assert (linear(x) - exact).abs().max() / exact.abs().max() < 1e-3


def test_groups_that_the_kernels_cannot_cut_run_without_them(kernels: Kernels) -> None:
    torch.manual_seed(0)
    matrix, x = rounding.to_int4(torch.randn(30, 40), 20), torch.randn(2, 40)
    linear = QuantisedLinears(kernels, CPU).linear(matrix, None)
    assert isinstance(linear, DequantisingLinear)
    assert torch.allclose(linear(x).double(), obvious(matrix, x, None), rtol=1e-4, atol=1e-4)


def test_a_token_of_zeros_gives_the_bias(kernels: Kernels) -> None:
    bias = torch.arange(30.0)
    for scheme in (rounding.to_int8, rounding.to_w8a8, partial(rounding.to_int4, group=32)):
        linear = QuantisedLinears(kernels, CPU).linear(scheme(torch.randn(30, 40)), bias)
        assert torch.equal(linear(torch.zeros(2, 40)), bias.expand(2, 30))


def test_a_matrix_of_zeros_stays_zero() -> None:
    for name, scheme in SCHEMES.items():
        if "zeros" not in name and name != "fp4":  # those two are drawn, not rounded
            assert not scheme(torch.zeros(4, 64)).dequantised().any(), name


def test_threads_change_nothing(kernels: Kernels) -> None:
    torch.manual_seed(0)
    x = torch.randn(9, 64)
    linears = [QuantisedLinears(kernels, CPU).linear(scheme(torch.randn(300, 64)), None) for scheme in SCHEMES.values()]
    alone = [linear(x) for linear in linears]
    torch.set_num_threads(2)
    try:
        assert all(torch.equal(linear(x), y) for linear, y in zip(linears, alone, strict=True))
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_stacked_matrices_are_their_rows_behind_one_another(scheme: str) -> None:
    torch.manual_seed(0)
    parts = [SCHEMES[scheme](torch.randn(rows, 48)) for rows in (6, 2, 4)]
    whole = stacked(parts)
    assert whole is not None
    assert torch.equal(whole.dequantised(), torch.cat([part.dequantised() for part in parts]))


def test_matrices_of_different_kinds_cannot_be_stacked() -> None:
    weight = torch.randn(8, 64)
    four, eight = rounding.to_int4(weight, 32), rounding.to_int8(weight)
    assert stacked([four, eight]) is None
    assert stacked([four, rounding.to_int4(weight, 64)]) is None
    assert stacked([sorted_columns(weight), replace(sorted_columns(weight), order=torch.arange(64))]) is None


@pytest.mark.parametrize(
    ("scheme", "most"),
    [("int8", 0.008), ("fp8", 0.03), ("int4 in groups of 32", 0.09), ("nf4", 0.1), ("int4, one group a row", 0.15)],
)
def test_rounding_loses_what_its_bits_make_it_lose(scheme: str, most: float) -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 256)
    assert (SCHEMES[scheme](weight).dequantised() - weight).norm() / weight.norm() < most


def test_rounding_again_changes_nothing() -> None:
    torch.manual_seed(0)
    for scheme in (rounding.to_int8, rounding.to_nf4, rounding.to_fp8):
        once = scheme(torch.randn(20, 128))
        assert torch.allclose(scheme(once.dequantised()).dequantised(), once.dequantised(), atol=1e-6)
