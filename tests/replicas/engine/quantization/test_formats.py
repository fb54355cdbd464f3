"""Checkpoints of each format, written here by hand or by the format's own library, mean what their authors say."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from replicas.contract import EngineError
from replicas.engine.quantization import rounding
from replicas.engine.quantization.formats import awq, bitsandbytes, compressed_tensors, format_of, gptq
from replicas.engine.quantization.matrix import Quantised
from replicas.engine.quantization.methods.gptq import fitted_grid

ROWS, COLUMNS = 24, 64


@dataclass
class Named:
    """Tensors of a checkpoint that lies nowhere."""

    tensors: dict[str, Tensor]
    where: str = "somewhere"

    def get(self, name: str) -> Tensor:
        if name not in self.tensors:
            raise EngineError(f"the checkpoint {self.where} has no tensor {name!r}")
        return self.tensors[name]

    def __contains__(self, name: str) -> bool:
        return name in self.tensors


def read(config: dict[str, Any], tensors: dict[str, Tensor], shape: tuple[int, int] = (ROWS, COLUMNS)) -> Quantised:
    found = format_of({"quantization_config": config}, "model/config.json")
    assert found is not None
    matrix = found.matrix(Named({f"m.{name}": tensor for name, tensor in tensors.items()}), "m", shape)
    assert matrix is not None
    return matrix


def put(codes: list[int], bits: int) -> int:
    """Codes in a word, the first in the lowest bits; as int32 has it."""
    word = sum(code << bits * i for i, code in enumerate(codes))
    return word - 2**32 if word >= 2**31 else word


@dataclass
class Plain:
    """Codes with scales and zero points, and what they mean by the definition, element by element."""

    codes: Tensor  # [rows, columns]
    scale: Tensor  # [rows, groups]
    zero: Tensor
    group_of: Tensor  # [columns]

    @classmethod
    def drawn(cls, bits: int, group: int, seed: int = 0, low_zero: int = 0) -> Plain:
        draw = torch.Generator().manual_seed(seed)
        groups = COLUMNS // group
        return cls(
            torch.randint(0, 2**bits, (ROWS, COLUMNS), generator=draw),
            (torch.rand(ROWS, groups, generator=draw) + 0.1).half().float(),
            torch.randint(low_zero, 2**bits, (ROWS, groups), generator=draw),
            torch.arange(COLUMNS) // group,
        )

    def weight(self) -> Tensor:
        g = self.group_of
        return (self.codes - self.zero[:, g]) * self.scale[:, g]


def gptq_tensors(plain: Plain, bits: int, stored_zero: Tensor) -> dict[str, Tensor]:
    per_word = 32 // bits
    columns, rows = plain.codes.t().tolist(), stored_zero.t().tolist()
    qweight = [
        [put([columns[i + k][row] for k in range(per_word)], bits) for row in range(ROWS)]
        for i in range(0, COLUMNS, per_word)
    ]
    qzeros = [[put(zeros[i : i + per_word], bits) for i in range(0, ROWS, per_word)] for zeros in rows]
    return {
        "qweight": torch.tensor(qweight, dtype=torch.int32),
        "qzeros": torch.tensor(qzeros, dtype=torch.int32),
        "scales": plain.scale.t().half(),
        "g_idx": plain.group_of.int(),
    }


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [16, 32, COLUMNS])
def test_gptq_zero_points_are_stored_one_less(bits: int, group: int) -> None:
    plain = Plain.drawn(bits, group, low_zero=1)
    config = {**GPTQ, "bits": bits, "group_size": -1 if group == COLUMNS else group}
    assert torch.equal(read(config, gptq_tensors(plain, bits, plain.zero - 1)).dequantised(), plain.weight())


def test_gptq_v2_stores_zero_points_as_they_are() -> None:
    plain = Plain.drawn(4, 16)
    config = {**GPTQ, "checkpoint_format": "gptq_v2"}
    assert torch.equal(read(config, gptq_tensors(plain, 4, plain.zero)).dequantised(), plain.weight())


def test_gptq_symmetric_zero_points_need_no_offsets() -> None:
    plain = Plain.drawn(4, 16)
    plain.zero = torch.full_like(plain.zero, 8)
    matrix = read({**GPTQ, "sym": True}, gptq_tensors(plain, 4, plain.zero - 1))
    assert matrix.offset is None
    assert torch.equal(matrix.dequantised(), plain.weight())


def test_gptq_groups_in_the_order_of_importance_are_put_right() -> None:
    plain = Plain.drawn(4, 16, low_zero=1)
    plain.group_of = plain.group_of[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(5))]
    matrix = read({**GPTQ, "desc_act": True}, gptq_tensors(plain, 4, plain.zero - 1))
    assert matrix.order is not None
    assert torch.equal(matrix.dequantised(), plain.weight())


def test_gptq_rules_give_modules_settings_of_their_own() -> None:
    plain = Plain.drawn(8, 32, low_zero=1)
    config = {**GPTQ, "dynamic": {"+:^m$": {"bits": 8, "group_size": 32}, "-:other": {}}}
    assert torch.equal(read(config, gptq_tensors(plain, 8, plain.zero - 1)).dequantised(), plain.weight())


def test_gptq_groups_of_uneven_size_are_refused() -> None:
    plain = Plain.drawn(4, 16)
    plain.group_of = torch.zeros(COLUMNS, dtype=torch.int64)
    with pytest.raises(EngineError, match=r"somewhere: m\.g_idx does not cut 64 columns into groups of 16"):
        read(GPTQ, gptq_tensors(plain, 4, plain.zero))


AWQ = {"quant_method": "awq", "bits": 4, "group_size": 16, "zero_point": True, "version": "gemm"}


def awq_tensors(plain: Plain) -> dict[str, Tensor]:
    """Eight outputs a word: 0, 2, 4, 6, 1, 3, 5, 7 from the lowest bits on."""
    order = (0, 2, 4, 6, 1, 3, 5, 7)

    def words(rows: list[list[int]]) -> Tensor:
        packed = [[put([row[i + k] for k in order], 4) for i in range(0, ROWS, 8)] for row in rows]
        return torch.tensor(packed, dtype=torch.int32)

    return {
        "qweight": words(plain.codes.t().tolist()),
        "qzeros": words(plain.zero.t().tolist()),
        "scales": plain.scale.t().half(),
    }


@pytest.mark.parametrize("group", [16, 32, COLUMNS])
def test_awq_outputs_are_interleaved(group: int) -> None:
    plain = Plain.drawn(4, group)
    config = {**AWQ, "group_size": -1 if group == COLUMNS else group}
    assert torch.equal(read(config, awq_tensors(plain)).dequantised(), plain.weight())


def test_awq_in_its_authors_own_words_is_understood() -> None:
    plain = Plain.drawn(4, 16)
    config = {"quant_method": "awq", "w_bit": 4, "q_group_size": 16, "version": "GEMM"}
    assert torch.equal(read(config, awq_tensors(plain)).dequantised(), plain.weight())


@pytest.mark.parametrize("form", [gptq, awq])
def test_what_is_written_is_read_again(form: Any) -> None:
    weight = torch.randn(ROWS, COLUMNS)
    matrix = rounding.to_int4(weight, 16)
    assert matrix.offset is not None
    matrix.offset.clamp_(1, 15)
    config = gptq.settings_of(16, False) if form is gptq else awq.settings_of(16)
    assert torch.equal(read(config, form.stored(matrix)).dequantised(), matrix.dequantised())


def test_gptq_order_survives_writing() -> None:
    from dataclasses import replace

    order = torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(1))
    matrix = replace(rounding.to_int4(torch.randn(ROWS, COLUMNS), 16), order=order)
    assert matrix.offset is not None
    matrix.offset.clamp_(1, 15)
    again = read(gptq.settings_of(16, True), gptq.stored(matrix))
    assert torch.equal(again.dequantised(), matrix.dequantised())


def compressed(weights: dict[str, Any], inputs: dict[str, Any] | None = None) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, "ignore": ["lm_head"]}


INT8 = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}


def test_compressed_int8_with_activations_by_token() -> None:
    codes, scale = torch.randint(-128, 128, (ROWS, COLUMNS), dtype=torch.int8), torch.rand(ROWS, 1)
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    matrix = read(compressed(INT8, inputs), {"weight": codes, "weight_scale": scale})
    assert (matrix.activation_bits, matrix.activation_scale) == (8, 0.0)
    assert torch.equal(matrix.dequantised(), codes * scale)


def test_compressed_int8_with_a_fixed_activation_scale() -> None:
    inputs = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "tensor", "dynamic": False}
    tensors = {
        "weight": torch.ones(ROWS, COLUMNS, dtype=torch.int8),
        "weight_scale": torch.ones(1),
        "input_scale": torch.tensor([0.25]),
    }
    assert read(compressed(INT8, inputs), tensors).activation_scale == 0.25


@pytest.mark.parametrize("scale", [torch.rand(ROWS, 1), torch.rand(1)], ids=["rows", "tensor"])
def test_compressed_fp8(scale: Tensor) -> None:
    codes = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    weights = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "channel"}
    matrix = read(compressed(weights), {"weight": codes, "weight_scale": scale})
    assert torch.equal(matrix.dequantised(), codes.float() * scale)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_packed_integers_as_their_own_library_packs_them(bits: int, symmetric: bool) -> None:
    pack_to_int32 = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers").pack_to_int32
    codes = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (ROWS, COLUMNS), dtype=torch.int8)
    zero = torch.randint(-(2 ** (bits - 1)), 2 ** (bits - 1), (ROWS, COLUMNS // 16), dtype=torch.int8)
    scale = torch.rand(ROWS, COLUMNS // 16)
    tensors = {"weight_packed": pack_to_int32(codes, bits), "weight_scale": scale}
    if not symmetric:
        tensors["weight_zero_point"] = pack_to_int32(zero, bits, packed_dim=0)
    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "strategy": "group", "group_size": 16}
    shift = 0 if symmetric else zero.repeat_interleave(16, dim=1).int()
    expected = (codes.int() - shift) * scale.repeat_interleave(16, dim=1)
    assert torch.allclose(read(compressed(weights), tensors).dequantised(), expected, rtol=1e-6)


def test_compressed_groups_are_found_by_target() -> None:
    config = compressed(INT8)
    config["config_groups"] = {
        "odd": {"targets": ["re:.*down_proj$"], "weights": INT8},
        "rest": {"targets": ["m"], "weights": {**INT8, "num_bits": 4}},
    }
    tensors = {"weight_packed": torch.zeros(ROWS, COLUMNS // 8, dtype=torch.int32), "weight_scale": torch.rand(ROWS, 1)}
    assert read(config, tensors).values().unique().tolist() == [-8.0]


def test_fp8_blocks_share_a_scale() -> None:
    codes, scale = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn), torch.rand(2, 4)
    matrix = read({"quant_method": "fp8", "weight_block_size": [16, 16]}, {"weight": codes, "weight_scale_inv": scale})
    expected = codes.float() * scale.repeat_interleave(16, 0)[:ROWS].repeat_interleave(16, 1)
    assert torch.equal(matrix.dequantised(), expected)


def test_bitsandbytes_int8_scales_are_largest_values() -> None:
    codes, largest = torch.randint(-127, 128, (ROWS, COLUMNS), dtype=torch.int8), torch.rand(ROWS)
    config = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    matrix = read(config, {"weight": codes, "SCB": largest})
    assert torch.allclose(matrix.dequantised(), codes * largest[:, None] / 127, rtol=1e-6)


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def test_nf4_first_codes_are_in_the_high_half() -> None:
    codes = torch.randint(0, 16, (ROWS * COLUMNS,))
    absmax, table = torch.rand(ROWS * COLUMNS // 64), torch.randn(16)
    state = json.dumps({"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [ROWS, COLUMNS]})
    matrix = read(
        NF4,
        {
            "weight": (codes[0::2] * 16 + codes[1::2]).to(torch.uint8).unsqueeze(1),
            "weight.absmax": absmax,
            "weight.quant_map": table,
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(state.encode()), dtype=torch.uint8),
        },
    )
    expected = (table[codes] * absmax.repeat_interleave(64)).view(ROWS, COLUMNS)
    assert torch.equal(matrix.dequantised(), expected)


@pytest.mark.parametrize("double", [False, True])
def test_nf4_is_read_as_written(double: bool) -> None:
    torch.manual_seed(0)
    matrix = rounding.to_nf4(torch.randn(ROWS, COLUMNS))
    again = read(bitsandbytes.settings_of_nf4(double), bitsandbytes.stored_nf4(matrix, double))
    assert torch.equal(again.codes, matrix.codes)
    assert torch.allclose(again.scale, matrix.scale, rtol=0.02 if double else 0)


def test_the_dynamic_map_has_every_code_once() -> None:
    table = bitsandbytes.dynamic_map()
    assert len(table) == 256 and len(table.unique()) == 256
    assert table.max() == 1.0 and 0.0 in table.tolist() and table.min() < -0.98


def test_a_module_that_is_stored_plainly_is_left_to_others() -> None:
    for config in (GPTQ, AWQ, compressed(INT8), {"quant_method": "fp8"}, NF4):
        found = format_of({"quantization_config": config}, "config.json")
        assert found is not None and found.matrix(Named({"m.weight": torch.zeros(2, 2)}), "m", (2, 2)) is None


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "aqlm"}, r"model/config\.json: quantization_config\.quant_method: unknown method 'aqlm'"),
        ({**GPTQ, "bits": 3}, r"quantization_config\.bits: 3 bits are unknown"),
        ({"quant_method": "gptq", "bits": 4}, r"quantization_config\.group_size: is missing"),
        ({**GPTQ, "group_size": 0}, r"quantization_config\.group_size: expected -1 or a positive number, got 0"),
        ({**GPTQ, "group_size": "16"}, r"quantization_config\.group_size: expected a whole number, got '16'"),
        ({**GPTQ, "checkpoint_format": "marlin"}, r"checkpoint_format: unknown layout 'marlin'"),
        ({**AWQ, "version": "gemv"}, r"quantization_config\.version: unknown layout 'gemv'"),
        ({**AWQ, "bits": 8}, r"quantization_config\.bits: 8 bits are unknown: AWQ has 4"),
        ({"quant_method": "compressed-tensors"}, r"quantization_config\.config_groups: is missing"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size: expected two positive numbers"),
        ({"quant_method": "bitsandbytes"}, r"load_in_4bit: neither it nor load_in_8bit is true"),
    ],
)
def test_settings_that_are_not_known_are_named_with_their_file(config: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        format_of({"quantization_config": config}, "model/config.json")


GROUPS = {"quant_method": "compressed-tensors", "config_groups": {"g": {"targets": ["Linear"]}}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ("awq", r"quantization_config: expected an object, got 'awq'"),
        ([1], r"quantization_config: expected an object, got \[1\]"),
        ({"quant_method": ["awq"]}, r"quantization_config\.quant_method: unknown method \['awq'\]"),
        ({**GROUPS, "config_groups": [1]}, r"quantization_config\.config_groups: expected an object, got \[1\]"),
        ({**GROUPS, "config_groups": {"g": None}}, r"config_groups\.g: expected an object, got None"),
        ({**GROUPS, "config_groups": {"g": {"targets": "Linear"}}}, r"config_groups\.g\.targets: expected names"),
        ({**GROUPS, "config_groups": {"g": {"targets": [None]}}}, r"config_groups\.g\.targets: expected names"),
        ({**GROUPS, "config_groups": {"g": {"weights": 8}}}, r"config_groups\.g\.weights: expected an object, got 8"),
        ({**GROUPS, "config_groups": {"g": {"input_activations": [8]}}}, r"g\.input_activations: expected an object"),
    ],
)
def test_settings_of_another_shape_are_named_with_their_file(config: Any, words: str) -> None:
    with pytest.raises(EngineError, match=rf"model/config\.json: .*{words}"):
        format_of({"quantization_config": config}, "model/config.json")


@pytest.mark.parametrize(
    ("dynamic", "words"),
    [
        ([1], r"quantization_config\.dynamic: expected an object, got \[1\]"),
        ({"+:m": 8}, r"quantization_config\.dynamic\.\+:m: expected an object, got 8"),
        ({"+:(": {}}, r"quantization_config\.dynamic: '\(' is no pattern"),
        ({"+:(x|xx)+$(?<!x)": {}}, r"quantization_config\.dynamic: the pattern .* takes too long over 'x+'"),
    ],
)
def test_gptq_rules_that_are_none_are_named(dynamic: Any, words: str) -> None:
    found = format_of({"quantization_config": {**GPTQ, "dynamic": dynamic}}, "model/config.json")
    module = "x" * 40 if "takes too long" in words else "m"
    tensors = {f"{module}.qweight": torch.zeros(1)}
    with pytest.raises(EngineError, match=rf"model/config\.json: {words}"):
        assert found is not None and found.matrix(Named(tensors), module, (ROWS, COLUMNS))


@pytest.mark.parametrize(
    ("pattern", "words"), [("re:(", "is no pattern"), ("re:(x|xx)+$(?<!x)", "takes too long over 'x+'")]
)
def test_targets_that_are_no_patterns_are_named(pattern: str, words: str) -> None:
    config = {**GROUPS, "config_groups": {"g": {"targets": [pattern]}}}
    found = format_of({"quantization_config": config}, "model/config.json")
    module = "x" * 40
    with pytest.raises(EngineError, match=rf"quantization_config\.config_groups\.g\.targets: .*{words}"):
        assert found is not None and found.matrix(
            Named({f"{module}.weight_scale": torch.ones(1)}), module, (ROWS, COLUMNS)
        )


@pytest.mark.parametrize("config", [GPTQ, AWQ])
def test_another_group_size_than_the_tensors_have_is_named(config: dict[str, Any]) -> None:
    plain = Plain.drawn(4, 16)
    tensors = gptq_tensors(plain, 4, plain.zero) if config is GPTQ else awq_tensors(plain)
    words = r"somewhere: m\.\w+ has shape \(4, \d+\), group_size 32.* implies \(2, \d+\)"
    with pytest.raises(EngineError, match=words):
        read({**config, "group_size": 32}, tensors)


@pytest.mark.parametrize("lost", ["qzeros", "scales"])
def test_a_missing_tensor_is_named(lost: str) -> None:
    tensors = awq_tensors(Plain.drawn(4, 16))
    del tensors[lost]
    with pytest.raises(EngineError, match=rf"the checkpoint somewhere has no tensor 'm\.{lost}'"):
        read(AWQ, tensors)


def test_activations_that_are_not_known_are_refused() -> None:
    inputs = {"num_bits": 4, "type": "int", "dynamic": True}
    tensors = {"weight": torch.zeros(ROWS, COLUMNS, dtype=torch.int8), "weight_scale": torch.ones(ROWS, 1)}
    with pytest.raises(EngineError, match=r"config_groups\.group_0\.input_activations: unknown activations"):
        read(compressed(INT8, inputs), tensors)


def test_the_written_int8_layout_names_what_it_is() -> None:
    matrix = rounding.to_w8a8(torch.randn(ROWS, COLUMNS))
    stored = compressed_tensors.stored_int8(matrix)
    assert torch.equal(stored["weight"].float() * stored["weight_scale"], matrix.dequantised())
    again = read(compressed_tensors.settings_of_w8a8(), stored)
    assert again.activation_bits == 8
    assert torch.equal(again.dequantised(), matrix.dequantised())


def test_grids_are_fitted_at_least_as_well_as_by_their_ends() -> None:
    torch.manual_seed(0)
    weight = torch.randn(40, 32)
    scale, zero = fitted_grid(weight)
    fitted = ((weight / scale[:, None] + zero[:, None]).round().clamp(0, 15) - zero[:, None]) * scale[:, None]
    plain = rounding.to_int4(weight, 32).dequantised()
    assert (fitted - weight).norm() < (plain - weight).norm()
