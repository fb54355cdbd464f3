"""The policies inside plain Ray Serve: a real Ray, the example of the docs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Where the example's requests went."""
    page = (ROOT / "docs" / "ray-router.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    folder = tmp_path_factory.mktemp("ray-router")
    example = folder / "example.py"
    example.write_text(code)
    words = [sys.executable, "-m", "tests.routing.ray_router_main", str(example)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


@pytest.mark.ray
def test_conversations_spread_and_then_stay_where_they_are_warm(found: dict[str, Any]) -> None:
    assert len(set(found["spread"])) >= 2
    assert found["stayed"] == 8


@pytest.mark.ray
def test_turns_with_an_adapter_stay_together(found: dict[str, Any]) -> None:
    assert len(set(found["with adapter"])) == 1


@pytest.mark.ray
def test_a_burst_of_strangers_uses_every_replica(found: dict[str, Any]) -> None:
    counts = Counter(found["burst"])
    assert len(counts) == 3
    assert max(counts.values()) <= 16


@pytest.mark.ray
def test_a_request_without_a_prompt_is_answered(found: dict[str, Any]) -> None:
    assert found["no prompt"]
