"""What a pull shows while it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO

import pytest
from rich.console import Console

from ops.pull_progress import PullProgress


def shown(env: Mapping[str, str], *, terminal: bool) -> str:
    """All that a pull halfway through its second stage has written."""
    written = StringIO()
    console = Console(file=written, force_terminal=terminal, width=100, _environ=env)
    with PullProgress(console, "m") as progress:
        for stage, done in (("downloading", 0), ("downloading", 100), ("converting", 0), ("converting", 50)):
            progress.report(stage, done, 100)
    return written.getvalue()


def test_a_pull_shows_a_bar_on_a_terminal_and_takes_it_away_at_the_end() -> None:
    written = shown({"TERM": "xterm"}, terminal=True)
    assert "m: converting" in written and "━━━" in written and "50/100 bytes" in written
    assert written.endswith("\x1b[1A\x1b[2K")  # up a line, and that line cleared


@pytest.mark.parametrize(
    ("env", "terminal"),
    [({"TERM": "xterm"}, False), ({"TERM": "xterm", "NO_COLOR": "1"}, True), ({"TERM": "dumb"}, True)],
    ids=["a pipe", "NO_COLOR", "a dumb terminal"],
)
def test_a_pull_writes_one_plain_line_for_each_stage_elsewhere(env: Mapping[str, str], terminal: bool) -> None:
    assert shown(env, terminal=terminal) == "m: downloading\nm: converting\n"


def test_a_total_that_nobody_knows_is_no_error() -> None:
    written = StringIO()
    with PullProgress(Console(file=written, force_terminal=True, width=100, _environ={"TERM": "xterm"}), "m") as pull:
        pull.report("downloading", 5, 0)
    assert "5/? bytes" in written.getvalue()
