"""`warmgate adapters` against a real Valkey, as a person types it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from ops.cli import main
from ops.instance import Instance
from routing.adapter_sources import SourceBoard, SourceStatus
from routing.adapters import Adapter, AdapterRegistry
from routing.store import Store
from tests.routing import conftest as routing_conftest
from tests.routing.conftest import Valkey

valkey = routing_conftest.valkey


@pytest.fixture
def run(valkey: Valkey) -> Runner:
    return Runner(valkey)


class Runner:
    def __init__(self, valkey: Valkey) -> None:
        self.url = valkey.url

    def __call__(self, *arguments: str) -> Result:
        words = ["adapters", "--redis", self.url, "--cluster", "c", *arguments]
        return CliRunner().invoke(main, words, prog_name="warmgate")


def test_help_says_where_adapters_come_from_and_what_a_group_needs(run: Runner) -> None:
    said = run("--help").output
    assert "warmgate train-lora" in said and "engine.max_adapters" in said


def test_what_is_added_is_listed_and_what_is_removed_is_not(run: Runner) -> None:
    assert run("list").output == "no adapters were added: see warmgate adapters add --help\n"
    for version in ("1", "2"):
        added = run("add", "voice", "--base-model", "m", "--version", version, "--rank", "16", "--owner", "acme")
        assert (added.exit_code, added.output) == (0, f"voice is voice@{version} now\n")
    lines = run("list").output.splitlines()
    assert [line.split()[:3] for line in lines] == [["voice@1", "m", "rank"], ["*", "voice@2", "m"]]
    rows = json.loads(run("list", "--json").output)
    assert [(r["version"], r["current"], r["rank"], r["owner"]) for r in rows] == [
        ("1", False, 16, "acme"),
        ("2", True, 16, "acme"),
    ]
    assert run("remove", "voice@2").output == "voice@2 is removed\n"
    assert json.loads(run("list", "--json").output)[0]["current"] is True
    assert run("remove", "voice").exit_code == 0
    assert json.loads(run("list", "--json").output) == []


def checkpoint(folder: Path, **changes: Any) -> Path:
    """A folder as PEFT saves it, with weights that are none."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"], **changes}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes((2).to_bytes(8, "little") + b"{}")
    return folder


def test_a_checkpoint_that_is_here_tells_its_rank_size_and_digest(run: Runner, tmp_path: Path) -> None:
    folder = checkpoint(tmp_path / "x", rank_pattern={"q_proj": 12})
    assert run("add", "voice", "--base-model", "m", "--path", str(folder)).exit_code == 0
    (row,) = json.loads(run("list", "--json").output)
    assert (row["path"], row["rank"], row["num_bytes"]) == (str(folder), 12, 10) and len(row["digest"]) == 32
    broken = checkpoint(tmp_path / "y", use_dora=True)
    refused = run("add", "other", "--base-model", "m", "--path", str(broken))
    assert refused.exit_code == 1 and "DoRA cannot be served" in refused.output
    assert run("add", "remote", "--base-model", "m", "--path", "/on/another/machine", "--rank", "32").exit_code == 0


@pytest.mark.parametrize(
    ("words", "code", "says"),
    [
        (["add", "voice"], 2, "Missing option '--base-model'"),
        (["add", "a b", "--base-model", "m"], 2, "name"),
        (["add", "a", "--base-model", "m", "--version", "1@2"], 2, "version"),
        (["add", "a", "--base-model", "m", "--rank", "0"], 2, "rank"),
        (["remove", "nobody"], 1, "error: there is no adapter 'nobody' in the registry"),
    ],
)
def test_mistakes_are_one_line_that_names_them(run: Runner, words: list[str], code: int, says: str) -> None:
    result = run(*words)
    assert result.exit_code == code and says in result.output
    assert "Traceback" not in result.output


def test_what_replicas_on_this_machine_could_never_load_is_refused(
    valkey: Valkey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Instance(
        pid=1, started=0.0, instance="quickstart-8000", url="http://127.0.0.1:8000", models=("smollm2-135m",),
        run_dir=str(tmp_path), logs="", redis_url=valkey.url, cluster="c", local_models=("smollm2-135m",),
    )  # fmt: skip
    monkeypatch.setattr("ops.adapters.find_instances", lambda folder: [here])
    folder = checkpoint(tmp_path / "x")

    def add(model: str, path: str) -> Result:
        words = ["adapters", "add", "voice", "--base-model", model, "--path", path]
        return CliRunner().invoke(main, words, prog_name="warmgate")

    assert add("nope", str(folder)).output == "error: quickstart-8000 serves no model 'nope'; it serves smollm2-135m\n"
    missing = add("smollm2-135m", str(tmp_path / "y"))
    assert missing.exit_code == 1 and f"there is no folder {tmp_path / 'y'}" in missing.output
    assert add("smollm2-135m", str(folder)).output == "voice is voice@1 now\n"


def test_other_weights_need_another_version(run: Runner) -> None:
    assert run("add", "a", "--base-model", "m", "--path", "/one").exit_code == 0
    refused = run("add", "a", "--base-model", "m", "--path", "/two")
    assert refused.exit_code == 1 and "give it a new version" in refused.output


def test_a_registry_that_does_not_answer_is_an_error_of_one_line() -> None:
    words = ["adapters", "--redis", "unix:///nowhere/v.sock", "--cluster", "c", "list"]
    result = CliRunner().invoke(main, words, prog_name="warmgate")
    assert result.exit_code == 1 and result.output.startswith("error: Redis:") and result.output.count("\n") == 1
    odd = CliRunner().invoke(main, ["adapters", "--redis", "http://x", "list"], prog_name="warmgate")
    assert odd.exit_code == 1 and odd.output.startswith("error: ")


def test_a_checkpoint_at_a_url_is_fetched_and_looked_at_first(
    run: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WARMGATE_HOME", str(tmp_path / "home"))
    folder = checkpoint(tmp_path / "x")
    added = run("add", "voice", "--base-model", "m", "--path", f"file://{folder}/")
    assert added.exit_code == 0, added.output
    (row,) = json.loads(run("list", "--json").output)
    assert (row["path"], row["rank"], row["source"]) == (f"file://{folder}", 4, "")
    assert (tmp_path / "home" / "adapters" / row["digest"] / "adapter_model.safetensors").is_file()
    for url, words in (
        (f"file://{tmp_path}/nowhere", "adapter_config.json is missing"),
        ("http://host/x", "http:// cannot be read"),
    ):
        refused = run("add", "other", "--base-model", "m", "--path", url)
        assert refused.exit_code == 1 and words in refused.output


def test_sources_are_shown_as_they_were_last_seen(run: Runner) -> None:
    assert "a profile names them under adapter_sources" in run("sources").output

    async def tell(store: Store) -> None:
        board = SourceBoard(store)
        seen = SourceStatus(url="s3://b/x", base_model="m", looked_at=1.0, num_adapters=3, failed={"bad": "why"})
        await board.tell(seen)
        await board.tell(SourceStatus(url="file:///y", base_model="m", error="it is gone", num_waiting=2))
        await AdapterRegistry(store).add(Adapter(name="v", base_model="m", path="s3://b/x/v", source="s3://b/x"))
        await store.close()

    asyncio.run(tell(Store(run.url, "c")))
    said = run("sources").output
    for words in (
        "s3://b/x  m  3 adapters, seen 19",
        "  bad: why",
        "file:///y  m  0 adapters, seen never",
        "it is gone",
    ):
        assert words in said
    assert [row["url"] for row in json.loads(run("sources", "--json").output)] == ["s3://b/x", "file:///y"]
    assert "s3://b/x/v  (of a source)" in run("list").output
