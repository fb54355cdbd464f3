"""Checks across sections, on configurations whose single values are valid."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from configs.check import broken_adapters, missing_models, problems
from configs.errors import show_key
from configs.schema import Config

BASE: dict[str, Any] = {
    "models": [{"id": "m", "source": "sim:bytes", "aliases": ["alias"]}],
    "groups": [{"name": "g", "model": "m", "engine": {"kind": "sim"}}],
    "tenants": [{"id": "t", "anonymous": True}],
}


def found(**changes: Any) -> list[tuple[str, str]]:
    config = msgspec.convert({**BASE, **changes}, Config)
    return [(show_key(problem.key), problem.reason) for problem in problems(config)]


def test_a_good_configuration_has_no_problem() -> None:
    assert found() == []


@pytest.mark.parametrize(
    ("changes", "key", "part"),
    [
        (
            {"models": [*BASE["models"], {"id": "alias", "source": "sim:bytes"}]},
            "models[1].id",
            "first given at models[0].aliases[0]",
        ),
        (
            {"models": [*BASE["models"], {"id": "n", "source": "sim:bytes"}]},
            "models[1].id",
            "no group serves model 'n'",
        ),
        ({"groups": [{"name": "g", "model": "m"}]}, "groups[0].engine", "sim:bytes has no weights"),
        (
            {"groups": [{"name": "g", "model": "m", "engine": {"kind": "sim", "block_size": 48}}]},
            "groups[0].engine.block_size",
            "must divide the model's route_block_tokens (64), got 48",
        ),
        (
            {"groups": [{"name": "g", "model": "m", "engine": {"kind": "sim", "max_num_batched_tokens": 8}}]},
            "groups[0].engine.max_num_batched_tokens",
            "must be at least max_num_seqs (32), got 8",
        ),
        ({"tenants": [{"id": "t"}]}, "tenants[0]", "nobody could use it"),
        ({"tenants": [*BASE["tenants"], {"id": "t", "keys": ["k"]}]}, "tenants[1].id", "duplicate tenant id 't'"),
        ({"tenants": [*BASE["tenants"], {"id": "u", "anonymous": True}]}, "tenants[1].anonymous", "only one tenant"),
        ({"tenants": [{"id": "t", "keys": ["k"], "models": ["x"]}]}, "tenants[0].models[0]", "no model 'x'"),
        ({"tenants": [{"id": "t", "keys": ["k"], "models": ["alias"]}]}, "tenants[0].models[0]", "write its id 'm'"),
        ({"redis": {"url": "rediss://:hunter2@cache:99999"}}, "redis.url", "got 'rediss://***@cache:99999'"),
        ({"redis": {"url": "http://localhost"}}, "redis.url", "expected embedded, redis://"),
        ({"redis": {"url": "redis://localhost:x"}}, "redis.url", "the port must be 1 to 65535"),
        ({"http": {"port": 6379}, "redis": {"url": "redis://localhost"}}, "redis.url", "duplicate port '6379'"),
        ({"channel": {"heartbeat_s": 1.0, "dead_after_s": 1.5}}, "channel.dead_after_s", "at least twice"),
    ],
)
def test_contradiction_is_found_at_its_key(changes: dict[str, Any], key: str, part: str) -> None:
    found_key, reason = found(**changes)[0]
    assert found_key == key
    assert part in reason


SLOTS = {"name": "g", "model": "m", "engine": {"kind": "sim", "sim": {"max_adapters": 2}}}


@pytest.mark.parametrize(
    ("adapter", "key", "part"),
    [
        ({"name": "a", "base_model": "n"}, "adapters[1].base_model", "no model 'n' in this profile; there is: m"),
        ({"name": "alias", "base_model": "m"}, "adapters[1].name", "'alias' is a name of model 'm'"),
        ({"name": "a", "base_model": "m", "owner": "x"}, "adapters[1].owner", "no tenant 'x'"),
        ({"name": "first", "base_model": "m"}, "adapters[1]", "duplicate adapter version 'first@1'"),
    ],
)
def test_an_adapter_needs_a_model_an_owner_and_a_name_of_its_own(adapter: dict[str, Any], key: str, part: str) -> None:
    first = {"name": "first", "base_model": "m", "owner": "t"}
    assert found(groups=[SLOTS], adapters=[first, {"name": "first", "base_model": "m", "version": "2"}]) == []
    ((at, reason),) = found(groups=[SLOTS], adapters=[first, adapter])
    assert at == key and part in reason


def test_an_adapter_of_a_model_whose_replicas_have_no_slots_is_found() -> None:
    ((at, reason),) = found(adapters=[{"name": "a", "base_model": "m"}])
    assert (at, reason) == ("adapters[0].base_model", "no group of model 'm' has adapter slots")


@pytest.mark.parametrize(
    ("section", "key", "part"),
    [
        ({"url": "file:///a", "base_model": "n"}, "adapter_sources[0].base_model", "no model 'n'"),
        ({"url": "file:///a", "base_model": "m", "owner": "x"}, "adapter_sources[0].owner", "no tenant 'x'"),
        ({"url": "/a", "base_model": "m"}, "adapter_sources[0].url", "expected a URL, of this folder file:///a"),
        ({"url": "file:///a/", "base_model": "m"}, "adapter_sources[0].url", "write it as file:///a"),
        ({"url": "http://h/a", "base_model": "m"}, "adapter_sources[0].url", "http:// cannot be read"),
        ({"url": "s3://k:secret@b", "base_model": "m"}, "adapter_sources[0].url", "neither password nor port"),
    ],
)
def test_a_source_needs_a_url_of_a_folder_and_a_model_with_slots(section: dict[str, Any], key: str, part: str) -> None:
    ((at, reason),) = found(groups=[SLOTS], adapter_sources=[section])
    assert at == key and part in reason and "secret" not in reason


def test_sources_differ_and_roots_are_places() -> None:
    good = {"url": "s3://b/x", "base_model": "m"}
    assert found(groups=[SLOTS], adapter_sources=[good], adapter_files={"roots": ["/a", "s3://b"]}) == []
    ((at, reason),) = found(groups=[SLOTS], adapter_sources=[good, good])
    assert at == "adapter_sources[1].url" and "duplicate source" in reason
    ((at, reason),) = found(adapter_files={"roots": ["a"]})
    assert at == "adapter_files.roots[0]" and "needs an absolute path" in reason


NATIVE = {"name": "g", "model": "m", "engine": {"kind": "native", "max_adapters": 2, "max_lora_rank": 16}}


def broken(tmp_path: Path, found_rank: int, **adapter: Any) -> list[tuple[str, str]]:
    """What is wrong with a profile's adapter whose checkpoint has a rank."""
    folder = tmp_path / "a"
    folder.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": found_rank, "lora_alpha": 8, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    declared = {"name": "a", "base_model": "m", "path": str(folder), **adapter}
    content = {**BASE, "models": [{"id": "m", "source": str(tmp_path)}], "groups": [NATIVE], "adapters": [declared]}
    config = msgspec.convert(content, Config)
    assert problems(config) == []
    return [(show_key(problem.key), problem.reason) for problem in broken_adapters(config)]


def test_a_profile_s_adapters_are_looked_at_before_anything_starts(tmp_path: Path) -> None:
    assert broken(tmp_path / "x", 8) == []
    assert broken(tmp_path / "x", 12) == [("adapters[0].rank", "its checkpoint has rank 12, got 8")]
    ((key, reason),) = broken(tmp_path / "x", 32, rank=32)
    assert key == "adapters[0].path" and "beyond engine.max_lora_rank (16)" in reason
    ((key, reason),) = broken(tmp_path / "x", 8, path=str(tmp_path / "nowhere"))
    assert key == "adapters[0].path" and "adapter_config.json is missing" in reason
    assert broken(tmp_path / "x", 8, path="s3://bucket/a") == [], "looked at when it is loaded"
    ((key, reason),) = broken(tmp_path / "x", 8, path="adapters/a")
    assert key == "adapters[0].path" and "needs an absolute path" in reason


def test_an_anonymous_tenant_is_no_administrator() -> None:
    found_ = found(tenants=[{"id": "t", "anonymous": True, "admin": True}])
    assert found_ == [("tenants[0].admin", "tenant 't' is anonymous: everybody would be an administrator")]


def test_a_key_given_to_two_tenants_is_found_without_being_shown() -> None:
    digest = "2c70e12b7a0646f92279f427c7b38e7334d8e5389cff167a1dc30e73f826b683"  # SHA-256 of "key"
    tenants = [{"id": "t", "keys": ["key"]}, {"id": "u", "key_sha256": [digest]}]
    assert found(tenants=tenants) == [("tenants[1].key_sha256[0]", "the same key as tenants[0].keys[0]")]


def test_models_served_elsewhere_may_share_a_port_number() -> None:
    assert found(http={"port": 6379}, redis={"url": "redis://store.internal:6379"}) == []


def test_missing_model_files_name_the_command_that_gets_them(tmp_path: Path) -> None:
    models = [
        {"id": "m", "source": "smollm2-135m"},
        {"id": "n", "source": "org/name"},
        {"id": "s", "source": "sim:bytes"},
    ]
    config = msgspec.convert({**BASE, "models": models}, Config)
    reasons = {show_key(problem.key): problem.reason for problem in missing_models(config, tmp_path)}
    assert set(reasons) == {"models[0].source", "models[1].source"}
    assert reasons["models[0].source"].endswith("run: warmgate models pull smollm2-135m")
    assert reasons["models[1].source"].endswith("run: warmgate models pull org/name")


@pytest.mark.parametrize(
    ("speculative", "key", "part"),
    [
        ({"method": "draft_model"}, "", "method draft_model needs a model"),
        ({"method": "mlp_speculator"}, "", "method mlp_speculator needs a model"),
        ({"method": "ngram", "model": "m"}, ".model", "method ngram takes no model"),
        (
            {"method": "ngram", "prompt_lookup_min": 4, "prompt_lookup_max": 3},
            ".prompt_lookup_min",
            "must be at most prompt_lookup_max (3), got 4",
        ),
    ],
)
def test_speculation_that_lacks_what_it_needs_is_found(speculative: dict[str, Any], key: str, part: str) -> None:
    models = [{"id": "m", "source": "smollm2-135m"}]
    assert found(models=models, groups=[{"name": "g", "model": "m", "engine": {"speculative": speculative}}]) == [
        (f"groups[0].engine.speculative{key}", part)
    ]


def test_the_sim_engine_pretends_a_model_for_its_guesses() -> None:
    engine = {"kind": "sim", "speculative": {"method": "draft_model"}}
    assert found(groups=[{"name": "g", "model": "m", "engine": engine}]) == []
