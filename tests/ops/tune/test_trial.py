"""Where a trial's replicas run, and what is sent to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.schema import EngineConfig, GroupConfig, ResourcesConfig, VllmConfig
from configs.tokenizer import load_model_files
from ops.tune.errors import TrialError
from ops.tune.trial import replica_environment
from ops.tune.workload import Workload

SIX = {"CUDA_VISIBLE_DEVICES": "2,3,4,5,6,7"}


def cards(group: GroupConfig, number: int) -> str:
    return replica_environment(group, number, SIX)["CUDA_VISIBLE_DEVICES"]


def group(num_gpus: float, **vllm: int) -> GroupConfig:
    engine = EngineConfig(kind="vllm", threads=3, vllm=VllmConfig(**vllm))  # type: ignore[arg-type]
    return GroupConfig(name="g", model="m", replicas=3, engine=engine, resources=ResourcesConfig(num_gpus=num_gpus))


def test_every_replica_has_gpus_of_its_own() -> None:
    assert [cards(group(1), i) for i in range(3)] == ["2", "3", "4"]
    assert [cards(group(1, tensor_parallel_size=2), i) for i in range(3)] == ["2,3", "4,5", "6,7"]
    assert [cards(group(0.5), i) for i in range(3)] == ["2", "2", "3"]
    assert [cards(group(0.4), i) for i in range(3)] == ["2", "2", "3"], "no part of a replica fits"
    with pytest.raises(TrialError, match="replica 2 of 3 needs a GPU more than the 6 that are here"):
        cards(group(1, tensor_parallel_size=4), 1)


def test_a_replica_without_gpus_sees_none_and_has_the_profiles_threads() -> None:
    environment = replica_environment(group(0), 0, SIX)
    assert environment["CUDA_VISIBLE_DEVICES"] == ""
    assert environment["OMP_NUM_THREADS"] == "3"


def test_prompts_share_exactly_what_was_asked_and_runs_share_no_more() -> None:
    tokenizer = load_model_files("sim:bytes", Path("/nowhere")).tokenizer
    workload = Workload(input_tokens=50, shared_tokens=20, output_tokens=4, num_requests=6)
    prompts, others = workload.prompts(tokenizer, "rate 2"), workload.prompts(tokenizer, "rate 4")
    assert {len(prompt) for prompt in (*prompts, *others)} == {50}
    assert len({prompt[:20] for prompt in (*prompts, *others)}) == 1
    assert len({prompt[20:] for prompt in (*prompts, *others)}) == 12
    assert prompts == workload.prompts(tokenizer, "rate 2")
