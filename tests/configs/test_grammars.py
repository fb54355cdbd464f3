"""Grammars as clients write them: what they become, and what the guard refuses without harm to anybody."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

import configs.grammars.guard as grammars_guard
from configs.grammars.guard import GrammarGuard, GuardLimits
from configs.grammars.source import MAX_SOURCE_BYTES, GrammarError, GrammarKind, GrammarSource, literal
from configs.grammars.translate import MAX_MESSAGE_CHARS, short, to_llguidance, with_preface


@pytest.fixture(scope="module")
def guard() -> Iterator[GrammarGuard]:
    made = GrammarGuard()
    yield made
    made.close()


def refusal(guard: GrammarGuard, kind: GrammarKind, text: str, **more: Any) -> GrammarError:
    with pytest.raises(GrammarError) as caught:
        guard.check(GrammarSource(kind=kind, text=text, **more))
    return caught.value


FINE: list[tuple[GrammarKind, str]] = [
    ("json", '{"type":"object","properties":{"a":{"type":"integer"}}}'),
    ("json", "true"),
    ("json", '{"oneOf":[{"type":"integer"},{"type":"string"}]}'),
    ("json", '{"type":"array","uniqueItems":true}'),
    ("regex", "[a-z]{2,}"),
    ("choice", '["a","é","\\"","\\u007f","😀"]'),
    ("choice", '[""]'),
    ("choice", json.dumps([f"choice {i}" for i in range(6000)])),
    ("grammar", 'root ::= "a" b\nb ::= [0-9]+'),
    ("grammar", 'start: "a" B\nB: /[0-9]+/'),
    ("structural_tag", '{"triggers":["<f="],"structures":[{"begin":"<f=a>","schema":{},"end":"</f>"}]}'),
    ("rules", '{"rules":"start: \\"(\\" @s \\")\\"","schemas":{"s":{"type":"integer"}}}'),
]


@pytest.mark.parametrize(("kind", "text"), FINE)
@pytest.mark.parametrize("preface", ["", 'preface: think "\\n"?\nthink[lazy]: /(.|\\n)*/ "</think>"'])
def test_every_kind_is_understood_with_and_without_a_preface(
    kind: GrammarKind, text: str, preface: str, guard: GrammarGuard
) -> None:
    assert guard.check(GrammarSource(kind=kind, text=text, preface=preface))


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("json", '{"type":"objekt"}', "objekt"),
        ("json", "[]", "a JSON schema is an object"),
        ("json", "{", "Expecting property name"),
        ("json", '{"$ref":"#/nowhere"}', "nowhere"),
        ("json", '{"$ref":"http://127.0.0.1:9/schema"}', "does not fetch|not present"),
        ("json", '{"anyOf":[]}', "empty"),
        ("regex", "a(b", "unclosed|invalid regex"),
        ("regex", "(?=a)b", "look-around"),
        ("choice", "[]", "nothing to choose"),
        ("grammar", "start: nobody", "nobody"),
        ("grammar", "a b c", "."),
        ("grammar", 'start: a\na: a "x"', "nothing matches"),
        ("structural_tag", '{"triggers":["<g"],"structures":[{"begin":"<f>","schema":{},"end":""}]}', "none of"),
        ("rules", '{"rules":"start: @absent","schemas":{}}', "absent"),
    ],
)
def test_what_is_wrong_is_said(kind: GrammarKind, text: str, words: str, guard: GrammarGuard) -> None:
    error = refusal(guard, kind, text)
    assert re.search(words, error.message) and not error.too_complex


def test_keywords_that_cannot_be_kept_are_refused_only_when_strict(guard: GrammarGuard) -> None:
    text = '{"type":"array","uniqueItems":true}'
    assert guard.check(GrammarSource(kind="json", text=text))
    assert "uniqueItems" in refusal(guard, "json", text, strict=True).message


def chained(length: int) -> str:
    defs: dict[str, Any] = {
        f"d{i}": {"type": "object", "properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}, "required": ["a"]}
        for i in range(length)
    }
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**defs, f"d{length}": {"type": "integer"}}})


def rules(length: int) -> str:
    return "start: r0\n" + "\n".join(f'r{i}: r{i + 1} "a"' for i in range(length)) + f'\nr{length}: "b"'


CATASTROPHES: dict[str, tuple[GrammarKind, str]] = {
    "a megabyte": ("regex", "a" * 1_000_000),
    "deep references": ("json", chained(1200)),
    "deep rules": ("grammar", rules(5000)),
    "deep parentheses": ("regex", "(" * 5000 + "a" + ")" * 5000),
    "deep GBNF": ("grammar", "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000),
    "deep objects": ("json", '{"properties":{"a":' * 3000 + "{}" + "}}" * 3000),
    "large multiple": ("json", '{"type":"integer","multipleOf":999983}'),
    "large repetition": ("regex", "a{1000000}"),
    "many optional characters": ("regex", "a?" * 30_000 + "a" * 30_000),
    "many optional properties": ("json", json.dumps({"properties": {f"p{i}": {} for i in range(4000)}})),
    "many alternatives": ("grammar", "start: " + " | ".join(f'"choice {i}"' for i in range(6000))),
    "exponential": ("json", json.dumps({"allOf": [{"anyOf": [{"properties": {f"a{i}{j}": {"type": "string"}}}
                                                            for j in range(4)]} for i in range(10)]})),
}  # fmt: skip


@pytest.mark.parametrize("name", CATASTROPHES)
def test_a_catastrophe_is_refused_and_the_guard_goes_on(name: str, guard: GrammarGuard) -> None:
    refusal(guard, *CATASTROPHES[name])
    assert guard.check(GrammarSource(kind="regex", text="a+"))


def test_the_process_of_the_guard_is_bounded_in_time_and_memory() -> None:
    hasty = GrammarGuard(GuardLimits(max_cpu_s=0.05))
    try:
        assert refusal(hasty, *CATASTROPHES["large multiple"]).message == "it takes too long to compile"
    finally:
        hasty.close()
    small = GrammarGuard(GuardLimits(max_cpu_s=60, max_bytes=16 * 2**20))
    try:
        assert refusal(small, *CATASTROPHES["large multiple"]).too_complex
    finally:
        small.close()


def test_a_guard_whose_process_was_killed_starts_another(guard: GrammarGuard) -> None:
    process = guard._running()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert guard.check(GrammarSource(kind="regex", text="a+"))


def test_a_process_that_cannot_start_is_no_fault_of_the_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("configs.grammars.guard._start", lambda limits: stand_in("raise SystemExit(1)"))
    failing = GrammarGuard()
    try:
        with pytest.raises(OSError, match="ended with 1"):
            failing.check(GrammarSource(kind="regex", text="a+"))
    finally:
        failing.close()


def test_a_process_that_others_kill_is_tried_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []
    killed = "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"

    def start(limits: GuardLimits) -> subprocess.Popen[bytes]:
        started.append("once")
        return real_start(limits) if len(started) == 2 else stand_in(killed)

    real_start = grammars_guard._start
    monkeypatch.setattr(grammars_guard, "_start", start)
    guard = GrammarGuard()
    try:
        assert guard.check(GrammarSource(kind="regex", text="a+")) and len(started) == 2
        os.kill(guard._running().pid, signal.SIGKILL)
        with pytest.raises(OSError, match="killed"):
            guard.check(GrammarSource(kind="regex", text="a+"))
    finally:
        guard.close()


def stand_in(program: str) -> subprocess.Popen[bytes]:
    """For the guard's process."""
    pipe = subprocess.PIPE
    return subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL)


def test_closing_ends_the_process_and_a_check_under_way() -> None:
    guard = GrammarGuard(GuardLimits(max_cpu_s=60))
    assert guard.check(GrammarSource(kind="regex", text="a"))
    process = guard._running()
    errors: list[OSError] = []

    def ask() -> None:
        kind, text = CATASTROPHES["large multiple"]
        with pytest.raises(OSError) as caught:
            guard.check(GrammarSource(kind=kind, text=text))
        errors.append(caught.value)

    checking = threading.Thread(target=ask)
    checking.start()
    guard.close()
    checking.join()
    assert process.returncode is not None and len(errors) == 1
    with pytest.raises(OSError, match="closed"):
        guard.check(GrammarSource(kind="regex", text="a"))
    guard.close()


def test_a_process_that_starts_while_the_guard_closes_is_ended_too(monkeypatch: pytest.MonkeyPatch) -> None:
    guard = GrammarGuard(GuardLimits(max_cpu_s=60))
    started: list[subprocess.Popen[bytes]] = []

    def start(limits: GuardLimits) -> subprocess.Popen[bytes]:
        closing.start()
        while not guard._closed:
            time.sleep(0.001)
        started.append(begin(limits))
        return started[0]

    begin, closing = grammars_guard._start, threading.Thread(target=guard.close)
    monkeypatch.setattr(grammars_guard, "_start", start)
    kind, text = CATASTROPHES["large multiple"]
    with pytest.raises(OSError, match="closed"):
        guard.check(GrammarSource(kind=kind, text=text))
    closing.join()
    assert started[0].returncode == -signal.SIGKILL


def test_a_grammar_that_is_too_long_is_not_even_read() -> None:
    with pytest.raises(GrammarError) as caught:
        to_llguidance(GrammarSource(kind="regex", text="a" * (MAX_SOURCE_BYTES + 1)))
    assert caught.value.too_complex


def test_words_of_the_library_are_bounded() -> None:
    assert short("wrong\n<non-verbose/>") == "wrong"
    assert len(short("x" * 5000)) == MAX_MESSAGE_CHARS + 1


def test_a_preface_comes_before_the_first_of_several_parts() -> None:
    body = to_llguidance(GrammarSource(kind="rules", text='{"rules":"start: @s","schemas":{"s":{}}}'))
    main, first, part = json.loads(with_preface('preface: "x"', body))["grammars"]
    assert main["lark_grammar"].startswith("start: preface @body") and (first["name"], part["name"]) == ("body", "s")


def test_literals_are_written_as_lark_reads_them() -> None:
    assert literal('a"\n\x7fé') == '"a\\"\\n\\u007fé"'
