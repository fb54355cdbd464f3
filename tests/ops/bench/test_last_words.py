"""Why a process ended, from what it said."""

from __future__ import annotations

import pytest

from ops.bench.last_words import last_words

CORE = """\
(EngineCore pid=7) ERROR 11-22 03:00:00 [core.py:100] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-22 03:00:00 [core.py:100] ValueError: To serve one request 2.1 GiB KV cache is needed
Traceback (most recent call last):
  File "x.py", line 1, in <module>
RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}
replicas.contract.EngineError: vLLM did not start: RuntimeError: Engine core initialization failed.
"""


@pytest.mark.parametrize(
    ("text", "status", "expected"),
    [
        (CORE, 1, "ValueError: To serve one request 2.1 GiB KV cache is needed"),
        ("Traceback\n  File\nconfigs.errors.ConfigError: no model\n", 1, "ConfigError: no model"),
        ("warning: a\nsomething else\n", 3, "something else"),
        ("", 3, "it ended with status 3"),
        ("loading\n", -9, "it was ended by SIGKILL, as the system does when memory runs out"),
        ("loading\n", -11, "it was ended by SIGSEGV"),
        ("MemoryError: no room\n", -6, "MemoryError: no room"),
    ],
)
def test_the_error_that_says_something_is_the_reason(text: str, status: int, expected: str) -> None:
    assert last_words(text, status) == expected


def test_long_words_are_cut() -> None:
    assert len(last_words(f"ValueError: {'x' * 5000}", 1)) < 320
