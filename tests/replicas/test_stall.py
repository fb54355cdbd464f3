"""Stalled, runaway and merely starved threads."""

from __future__ import annotations

import threading
import time

from replicas.engine.stall import StallDetector, thread_cpu_s


class Thread:
    """A thread's CPU clock, turned by hand."""

    def __init__(self) -> None:
        self.cpu_s = 0.0
        self.detector = StallDetector(lambda: self.cpu_s)

    def stalled_after(self, wall_s: float, cpu_s: float, predicted_s: float = 0.1) -> bool:
        """The detector's word after `wall_s` seconds without progress, in which `cpu_s` were used evenly."""
        self.detector.stalled(100.0, 100.0, predicted_s)
        num_looks = max(1, int(wall_s))
        for _ in range(num_looks):
            self.detector.look()
            self.cpu_s += cpu_s / num_looks
        return self.detector.stalled(100.0 + wall_s, 100.0, predicted_s)


def test_a_blocked_thread_is_stalled_after_five_seconds() -> None:
    assert not Thread().stalled_after(4.9, 0.0)
    assert Thread().stalled_after(5.1, 0.0)


def test_a_blocked_thread_with_long_steps_gets_five_of_them() -> None:
    assert not Thread().stalled_after(9.9, 0.0, predicted_s=2.0)
    assert Thread().stalled_after(10.1, 0.0, predicted_s=2.0)


def test_a_starved_thread_is_given_time() -> None:
    assert not Thread().stalled_after(20.0, 4.0)


def test_a_runaway_thread_is_stalled() -> None:
    assert Thread().stalled_after(6.0, 5.9)


def test_even_a_starved_thread_is_not_waited_for_for_ever() -> None:
    assert Thread().stalled_after(51.0, 4.0)


def test_a_threads_cpu_clock_counts_its_own_work_alone() -> None:
    stop, go = threading.Event(), threading.Event()

    def spin() -> None:
        go.wait()
        while not stop.is_set():
            pass

    thread = threading.Thread(target=spin, daemon=True)
    assert thread_cpu_s(thread) == 0.0
    thread.start()
    time.sleep(0.05)
    idle = thread_cpu_s(thread)
    go.set()
    end = time.monotonic() + 30.0
    while thread_cpu_s(thread) - idle < 0.04 and time.monotonic() < end:
        time.sleep(0.01)
    spun = thread_cpu_s(thread) - idle
    stop.set()
    thread.join()
    assert idle < 0.04 <= spun
