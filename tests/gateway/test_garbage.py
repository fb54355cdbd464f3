from __future__ import annotations

import subprocess
import sys

CHECK = """
import gc
from gateway import garbage
kept = [[n] for n in range(1000)]
garbage.settle()
assert gc.get_freeze_count() > 1000, gc.get_freeze_count()
assert gc.get_threshold()[0] == garbage.YOUNG_OBJECTS
cycle = []
cycle.append(cycle)
del cycle
assert gc.collect() >= 1, "what comes later is still collected"
"""


def test_the_collector_leaves_alone_what_was_loaded_and_finds_what_comes_later() -> None:
    subprocess.run([sys.executable, "-c", CHECK], check=True, timeout=30)
