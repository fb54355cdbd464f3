"""`make` as the first thing a person types, and what it says on a machine that lacks something."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def make(*arguments: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    return subprocess.run(["make", *arguments], cwd=cwd, env=env, capture_output=True, text=True, check=False)


def test_make_alone_explains_every_target() -> None:
    phony = re.search(r"^\.PHONY: (.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    shown = make()
    assert shown.returncode == 0
    for target in phony[1].split():
        assert re.search(rf"^  make {target} +\S", shown.stdout, re.MULTILINE), target


@pytest.fixture()
def bare(tmp_path: Path) -> Path:
    """A checkout that was never set up."""
    for name in ("Makefile", "pyproject.toml"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    return tmp_path


def test_python_without_venv_is_told_what_to_install(bare: Path) -> None:
    python = bare / "python3"
    python.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\nexit 0\n')
    python.chmod(0o755)
    done = make("setup", f"PYTHON={python}", cwd=bare)
    assert done.returncode != 0
    assert "has no venv module: sudo apt-get install python3-venv" in done.stderr
    assert not (bare / ".venv").exists()


def test_no_suitable_python_is_told_which_versions_will_do(bare: Path) -> None:
    done = make("setup", "PYTHON=", cwd=bare)
    assert done.returncode != 0
    assert "needs Python 3.11 to 3.13" in done.stderr


def test_torch_comes_from_the_index_that_is_asked_for(bare: Path) -> None:
    plain = make("-n", "setup", cwd=bare).stdout
    assert "install  'torch==2.13.0'" in plain
    chosen = make("-n", "setup", "TORCH_INDEX=https://example.invalid/cpu", cwd=bare).stdout
    assert "install --index-url https://example.invalid/cpu 'torch==2.13.0'" in chosen


def test_setup_is_done_once_and_again_when_the_requirements_change(bare: Path) -> None:
    (bare / ".venv" / "bin").mkdir(parents=True)
    for name in ("bin/python", ".setup"):
        (bare / ".venv" / name).touch()
    os.utime(bare / "pyproject.toml", (1, 1))
    assert "install" not in make("-n", "setup", cwd=bare).stdout
    os.utime(bare / "pyproject.toml")
    os.utime(bare / ".venv" / ".setup", (1, 1))
    assert "install -e ." in make("-n", "setup", cwd=bare).stdout
