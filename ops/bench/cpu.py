"""CPU time from the operating system's accounting: utime + stime of `/proc/<pid>/stat`, over whole process trees.

A tree's total counts every living process of it and, through its parent's `cutime` and `cstime`, every child that
has ended and been waited for; so the difference of two readings is what the tree used in between.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

_TICK_S = 1.0 / os.sysconf("SC_CLK_TCK")


class ProcessGoneError(Exception):
    """A process that was to be measured has ended: its CPU time can no longer be read."""


def process_cpu_s(pid: int) -> float:
    """Seconds of CPU one process and its reaped children have used so far. Raises ProcessGoneError."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGoneError(f"process {pid} is gone") from error
    # The command name (field 2) may hold spaces and parentheses; what follows its last one is well-formed.
    fields = stat[stat.rindex(")") + 2 :].split()
    return sum(int(field) for field in fields[11:15]) * _TICK_S


def tree_cpu_s(root: int) -> float:
    """Seconds of CPU the tree under `root` has used so far. Raises ProcessGoneError if the root itself is gone."""
    total = process_cpu_s(root)
    try:
        descendants = psutil.Process(root).children(recursive=True)
    except psutil.NoSuchProcess as error:
        raise ProcessGoneError(f"process {root} is gone") from error
    for process in descendants:
        try:
            total += process_cpu_s(process.pid)
        except ProcessGoneError:  # it ended between the two looks: its parent has its time from now on
            continue
    return total


@dataclass(frozen=True, slots=True)
class CpuReading:
    """Seconds of CPU by role, and the clock when it was read."""

    at_s: float
    by_role: Mapping[str, float]

    def since(self, earlier: CpuReading) -> dict[str, float]:
        """Seconds of CPU each role used between the two readings."""
        return {role: used - earlier.by_role[role] for role, used in self.by_role.items()}


@dataclass(frozen=True, slots=True)
class CpuMeter:
    """Reads the CPU of process trees grouped by role, e.g. `{"ingress": (12, 13), "replicas": (14,)}`."""

    roots: Mapping[str, Sequence[int]]

    def read(self) -> CpuReading:
        by_role = {role: sum(tree_cpu_s(pid) for pid in pids) for role, pids in self.roots.items()}
        return CpuReading(time.perf_counter(), by_role)
