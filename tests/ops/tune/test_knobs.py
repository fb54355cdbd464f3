"""Which settings are swept, over which values, and how they get into a profile."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from configs.schema import EngineConfig, GroupConfig, ResourcesConfig, VllmConfig
from ops.memory import GIB
from ops.tune.findings import Values
from ops.tune.knobs import Asked, Room, knobs_of, merged, parse_sweep, space_of
from ops.tune.subject import Subject
from ops.tune.workload import Slo, Workload
from tests.ops.tune.profiles import write_profile

PLENTY = Room(bytes_per_token=1 << 20, free_bytes=100 * GIB)


def group(num_gpus: float = 0.0, **engine: Any) -> GroupConfig:
    return GroupConfig(name="g", model="m", engine=EngineConfig(**engine), resources=ResourcesConfig(num_gpus=num_gpus))


def asked(of: GroupConfig, room: Room = PLENTY, **workload: Any) -> Asked:
    return Asked(of, Workload(**workload), Slo(tpot_s=0.1), room)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (group(kind="native"), ("max_num_seqs", "max_num_batched_tokens", "max_prefill_stall_s", "kv_cache_gib")),
        (group(kind="sim"), ("max_num_seqs", "max_num_batched_tokens", "max_prefill_stall_s")),
        (
            group(kind="vllm"),
            ("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold", "kv_cache_gib"),
        ),
        (
            group(kind="vllm", num_gpus=1),
            ("max_num_seqs", "max_num_batched_tokens", "long_prefill_token_threshold", "gpu_memory_utilization"),
        ),
    ],
)
def test_each_engine_has_the_knobs_it_looks_at(of: GroupConfig, expected: tuple[str, ...]) -> None:
    assert tuple(knob.name for knob in knobs_of(of)) == expected


@pytest.mark.parametrize("kind", ["native", "vllm", "sim"])
@pytest.mark.parametrize("num_gpus", [0, 1])
@pytest.mark.parametrize("max_num_seqs", [1, 32, 512])
@pytest.mark.parametrize("num_requests", [1, 8, 1000])
def test_the_profiles_value_comes_first_and_others_are_possible(
    kind: str, num_gpus: int, max_num_seqs: int, num_requests: int, tmp_path: Path
) -> None:
    of = group(num_gpus, kind=kind, max_num_seqs=max_num_seqs, max_num_batched_tokens=512)
    space = space_of(asked(of, num_requests=num_requests, input_tokens=300), {})
    engine = {"kind": kind, "max_num_seqs": max_num_seqs, "max_num_batched_tokens": 512}
    source = "sim:bytes" if kind == "sim" else "smollm2-135m"
    path = write_profile(tmp_path / "p.yaml", engine, source=source, resources={"num_gpus": num_gpus})
    subject = Subject(str(path), 0)
    for knob in knobs_of(of):
        values = space[knob.name]
        assert values[0] == knob.of(of.engine) and len(set(values)) == len(values)
        if knob.name == "max_num_seqs":  # beyond max_num_batched_tokens the sweep leaves a candidate out
            continue
        for value in values:
            candidate: Values = {name: values[0] for name, values in space.items()} | {knob.name: value}
            subject.load(candidate)  # raises ConfigError where it is impossible


def test_cache_sizes_that_could_change_nothing_are_left_out() -> None:
    of = group(kind="native", kv_cache_gib=4.0, max_num_seqs=4)
    a_token = 1 << 20
    small = asked(of, Room(a_token, 100 * GIB), input_tokens=100, output_tokens=28)  # 8 x 128 tokens fill 1 GiB
    assert space_of(small, {})["kv_cache_gib"] == (4.0,)
    large = asked(of, Room(a_token, 100 * GIB), input_tokens=1000, output_tokens=24)
    assert space_of(large, {})["kv_cache_gib"] == (4.0, 2.0, 8.0)
    long = asked(of, Room(a_token, 100 * GIB, longest_tokens=3000), input_tokens=1000, output_tokens=24)
    assert space_of(long, {})["kv_cache_gib"] == (4.0, 8.0)
    poor = asked(of, Room(a_token, 6 * GIB), input_tokens=1000, output_tokens=24)
    assert space_of(poor, {})["kv_cache_gib"] == (4.0, 2.0)


def test_asked_for_values_join_the_profiles_own_and_leave_other_knobs_alone() -> None:
    sweeps = merged([parse_sweep("max_num_seqs=8,16"), parse_sweep("engine.max_num_seqs=16,64")])
    space = space_of(asked(group(kind="native")), sweeps)
    assert space["max_num_seqs"] == (32, 8, 16, 64)
    assert all(len(values) == 1 for name, values in space.items() if name != "max_num_seqs")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("max_num_seqs", "--sweep max_num_seqs: expected KNOB=VALUE,VALUE like max_num_seqs=8,16,32"),
        ("max_num_seqs=", "--sweep max_num_seqs=: expected KNOB=VALUE,VALUE like max_num_seqs=8,16,32"),
        ("max_seqs=8", "--sweep max_seqs=8: unknown knob 'max_seqs'; did you mean 'max_num_seqs'?"),
        ("max_num_seqs=0", "--sweep max_num_seqs=0: max_num_seqs: expected int >= 1, got 0"),
        ("max_num_seqs=8,x", "--sweep max_num_seqs=8,x: max_num_seqs: expected int, got x"),
        ("kv_cache_gib=-1", "--sweep kv_cache_gib=-1: kv_cache_gib: expected float > 0.0, got -1"),
        (
            "gpu_memory_utilization=1.5",
            "--sweep gpu_memory_utilization=1.5: vllm.gpu_memory_utilization: expected float <= 1.0, got 1.5",
        ),
        (
            "long_prefill_token_threshold=-1",
            "--sweep long_prefill_token_threshold=-1: vllm.arguments.long_prefill_token_threshold: "
            "expected int >= 0, got -1",
        ),
    ],
)
def test_a_wrong_value_is_one_line_that_names_the_key(text: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_sweep(text)
    assert str(caught.value) == expected


def test_off_is_a_value() -> None:
    assert parse_sweep("max_prefill_stall_s=none,0.05")[1] == (None, 0.05)
    assert parse_sweep("long_prefill_token_threshold=off,64")[1] == (0, 64)


def test_the_other_engine_gets_what_means_the_same_there(tmp_path: Path) -> None:
    engine = {
        "kind": "vllm",
        "threads": 2,
        "max_num_seqs": 7,
        "kv_cache_gib": 0.25,
        "vllm": {"enforce_eager": False, "arguments": {"long_prefill_token_threshold": 64}},
    }
    subject = Subject(str(write_profile(tmp_path / "p.yaml", engine, source="smollm2-135m")), 0)
    assert [knob.of(subject.group.engine) for knob in knobs_of(subject.group)] == [7, 512, 64, 0.25]
    moved = subject.on("native").group.engine
    assert (moved.kind, moved.threads, moved.max_num_seqs, moved.kv_cache_gib) == ("native", 2, 7, 0.25)
    assert moved.vllm == VllmConfig()
    assert subject.on("native").alone({"max_num_seqs": 9}).groups[0].engine.max_num_seqs == 9


def test_a_trial_runs_the_group_alone_and_writes_no_usage(tmp_path: Path) -> None:
    path = write_profile(tmp_path / "p.yaml", {"kind": "sim"}, telemetry={"usage_log": str(tmp_path / "usage")})
    config = Subject(str(path), 0).alone({"max_num_seqs": 3, "max_prefill_stall_s": 0.5})
    engine = config.groups[0].engine
    assert (engine.max_num_seqs, engine.max_prefill_stall_s) == (3, 0.5)
    assert config.telemetry.usage_log is None
    assert [tenant.anonymous for tenant in config.tenants] == [True]


def test_a_knob_that_is_not_turned_is_not_written(tmp_path: Path) -> None:
    path = write_profile(tmp_path / "p.yaml", {"kind": "sim", "max_num_seqs": 8})
    subject = Subject(str(path), 0)
    tree = subject.tree({"max_num_seqs": 16, "max_num_batched_tokens": 512, "max_prefill_stall_s": None})
    assert tree["groups"][0]["engine"] == {"kind": "sim", "max_num_seqs": 16}


def test_what_the_environment_sets_is_measured_and_not_written(tmp_path: Path) -> None:
    path = write_profile(tmp_path / "p.yaml", {"kind": "sim"})
    env = {"WARMGATE_REDIS__URL": "redis://:secret@127.0.0.1:7000", "WARMGATE_GROUPS__0__ENGINE__MAX_WAITING": "7"}
    subject = Subject(str(path), 0, (), env)
    assert subject.alone().groups[0].engine.max_waiting == 7
    assert "redis" not in subject.tree({})
    assert subject.tree({})["groups"][0]["engine"] == {"kind": "sim"}
