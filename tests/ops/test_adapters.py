"""`warmgate adapters` against a real Valkey, as a person types it."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner, Result

from ops.cli import main
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
