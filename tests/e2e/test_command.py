"""The command beside a running stack: status, doctor, chat, and the files a pull left."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.e2e.conftest import MODEL, Stack

pytestmark = [pytest.mark.ray, pytest.mark.model]


def warmgate(*arguments: str, said: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "ops.cli", *arguments]
    return subprocess.run(command, input=said, capture_output=True, text=True, timeout=90)


def test_status_shows_the_instance_and_both_replicas(stack: Stack) -> None:
    done = warmgate("status", "--json")
    assert done.returncode == 0, done.stderr
    (mine,) = [instance for instance in json.loads(done.stdout) if instance["url"] == stack.url]
    assert mine["ready"] and not mine["problem"]
    assert sorted(r["pid"] for r in mine["replicas"]) == stack.replica_pids("smollm2")
    assert all(r["num_free_blocks"] > 0 for r in mine["replicas"])
    table = warmgate("status")
    assert stack.url in table.stdout and mine["replicas"][0]["replica_id"] in table.stdout


def test_chat_answers_one_question_from_the_command_line(stack: Stack) -> None:
    done = warmgate("chat", "--url", stack.url, "--temperature", "0", "What is the capital of France?")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "The capital of France is Paris."


def test_models_list_knows_what_is_here(stack: Stack) -> None:
    rows = json.loads(warmgate("models", "list", "--json").stdout)
    assert next(row for row in rows if row["name"] == MODEL)["state"] == "ready"
