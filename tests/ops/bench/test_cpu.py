"""The operating system's accounting, on processes whose use of the CPU is known."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from ops.bench.cpu import CpuMeter, ProcessGoneError, process_cpu_s, tree_cpu_s

SPIN = """
import pathlib, subprocess, sys, time

# What may confuse a reader of /proc/<pid>/stat.
pathlib.Path("/proc/self/comm").write_text("a) b (7 8 9")

def spin(until_s):
    began = time.process_time()
    while time.process_time() - began < until_s:
        pass

print("up", flush=True)
for line in sys.stdin:
    match line.split():
        case ["spin", seconds]:
            spin(float(seconds))
        case ["child", seconds]:
            code = "import time\\nwhile time.process_time() < " + seconds + ": pass"
            subprocess.run([sys.executable, "-c", code], check=True)
        case ["keep"]:
            code = "import sys, time\\nwhile time.process_time() < 0.3: pass\\nprint('', flush=True); sys.stdin.read()"
            kept = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            kept.stdout.readline()
        case ["reap"]:
            kept.stdin.close()
            kept.wait()
    print("done", flush=True)
"""


class Spinner:
    """A process that uses CPU when told to."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", SPIN]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.process.pid
        self._hear("up")

    def do(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        self.process.stdin.flush()
        self._hear("done")

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait(10)

    def _hear(self, word: str) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == word + "\n"


def started() -> Iterator[Spinner]:
    made = Spinner()
    yield made
    made.end()


spinner = pytest.fixture(started, name="spinner")
other = pytest.fixture(started, name="other")


def test_cpu_of_a_spinning_process_is_accounted_and_waiting_is_not(spinner: Spinner, other: Spinner) -> None:
    meter = CpuMeter({"spinning": (spinner.pid,), "waiting": (other.pid,)})
    before = meter.read()
    spinner.do("spin 0.3")
    after = meter.read()
    used = after.since(before)
    assert used["spinning"] == pytest.approx(0.3, rel=0.25)
    assert used["waiting"] < 0.05
    assert after.at_s - before.at_s >= 0.28


def test_children_count_while_they_live_and_after_they_were_reaped(spinner: Spinner) -> None:
    before = tree_cpu_s(spinner.pid)
    spinner.do("keep")
    living = tree_cpu_s(spinner.pid) - before
    assert process_cpu_s(spinner.pid) - before < 0.25, "the process itself does not know yet what its child used"
    spinner.do("reap")
    reaped = tree_cpu_s(spinner.pid) - before
    assert living == pytest.approx(0.32, rel=0.25)
    assert living - 0.02 <= reaped < living + 0.15  # once, not twice


def test_child_that_began_and_ended_between_two_readings_counts(spinner: Spinner) -> None:
    before = tree_cpu_s(spinner.pid)
    spinner.do("child 0.3")
    assert tree_cpu_s(spinner.pid) - before == pytest.approx(0.31, rel=0.25)


def test_roles_sum_their_processes(spinner: Spinner, other: Spinner) -> None:
    meter = CpuMeter({"both": (spinner.pid, other.pid), "idle": ()})
    before = meter.read()
    spinner.do("spin 0.15")
    other.do("spin 0.15")
    used = meter.read().since(before)
    assert used["both"] == pytest.approx(0.3, rel=0.25)
    assert used["idle"] == 0


def test_process_that_is_gone_cannot_be_measured(spinner: Spinner) -> None:
    spinner.end()
    for read in (process_cpu_s, tree_cpu_s):
        with pytest.raises(ProcessGoneError, match=f"process {spinner.pid} is gone"):
            read(spinner.pid)
    with pytest.raises(ProcessGoneError):
        CpuMeter({"ours": (os.getpid(),), "gone": (spinner.pid,)}).read()
