"""Small vocabularies, grammars followed by hand, and the slow obvious truth about regular expressions."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import llguidance

from configs.grammars.source import GrammarError, GrammarSource
from configs.grammars.translate import to_llguidance
from configs.schema import EngineConfig, SimConfig
from configs.tokenizer import load_model_files
from replicas.contract import Constraint, GenerateRequest, SamplingParams, StepDelta, pack_tokens
from replicas.detokenize import TextEngine
from replicas.engine.structured.grammar import Grammar
from replicas.engine.structured.numbers import NumberEnd
from replicas.engine.structured.walk import Compiled, Walk
from replicas.local import LocalEngine
from replicas.sim_engine import SimOptions, sim_engine

WORDS = ("a", "b", "c", "ab", "bc", "ca", "aa", "abc", "bbb", "x")
EOS = len(WORDS)


class Words:
    """A vocabulary of words, then end of sequence."""

    eos_token_id = EOS
    bos_token_id = None
    tokens = (*(word.encode() for word in WORDS), b"\xff<eos>")
    special_token_ids = (EOS,)

    def __call__(self, text: bytes) -> list[int]:
        return [WORDS.index(chr(byte)) for byte in text if chr(byte) in WORDS]


TOKENIZER = llguidance.LLTokenizer(llguidance.TokenizerWrapper(Words()))


def no_time() -> float:
    return 0.0


def grammar_of(source: GrammarSource, numbers: NumberEnd | None = None, **options: Any) -> Grammar:
    walk = Walk(Compiled(TOKENIZER, to_llguidance(source)))
    return Grammar(walk, "structured_outputs", options.get("cpu_s", no_time), numbers)


def ids(mask: bytes | None, vocab_size: int = EOS + 1) -> set[int]:
    assert mask is not None
    return {i for i in range(vocab_size) if mask[i // 8] >> (i % 8) & 1}


# Regular expressions, by derivatives (Brzozowski 1964).


@dataclass(frozen=True)
class Regex:
    """`kind`: empty (matches nothing), epsilon, char, then, either, star."""

    kind: str
    parts: tuple[Any, ...] = ()

    @property
    def nullable(self) -> bool:
        if self.kind in ("epsilon", "star"):
            return True
        if self.kind == "then":
            return all(part.nullable for part in self.parts)
        return self.kind == "either" and any(part.nullable for part in self.parts)

    @property
    def possible(self) -> bool:
        """Whether anything matches: what cannot has been simplified away."""
        return self.kind != "empty"

    def after(self, char: str) -> Regex:
        if self.kind == "char":
            return EPSILON if self.parts[0] == char else EMPTY
        if self.kind == "star":
            return then(self.parts[0].after(char), self)
        if self.kind == "either":
            return either(*(part.after(char) for part in self.parts))
        if self.kind == "then":
            first, second = self.parts
            left = then(first.after(char), second)
            return either(left, second.after(char)) if first.nullable else left
        return EMPTY

    def behind(self, text: str) -> Regex:
        found = self
        for char in text:
            found = found.after(char)
        return found

    def __str__(self) -> str:
        if self.kind == "char":
            return str(self.parts[0])
        if self.kind == "epsilon":
            return "()"
        if self.kind == "star":
            return f"({self.parts[0]})*"
        return "(" + ("|" if self.kind == "either" else "").join(map(str, self.parts)) + ")"


EMPTY, EPSILON = Regex("empty"), Regex("epsilon")


def then(first: Regex, second: Regex) -> Regex:
    if EMPTY in (first, second):
        return EMPTY
    return second if first == EPSILON else Regex("then", (first, second))


def either(*parts: Regex) -> Regex:
    left = [part for part in dict.fromkeys(parts) if part != EMPTY]
    return left[0] if len(left) == 1 else Regex("either", tuple(left)) if left else EMPTY


def allowed_by(regex: Regex, text: str) -> set[int]:
    """The tokens after which a match is still possible, each tried."""
    behind = regex.behind(text)
    found = {i for i, word in enumerate(WORDS) if behind.behind(word).possible}
    return found | {EOS} if behind.nullable else found


# A sim engine that follows grammars.

FAST: dict[str, Any] = {"step_base_s": 0, "step_per_sequence_s": 0, "prefill_tokens_per_s": 1e9}


@asynccontextmanager
async def engine(**changes: Any) -> AsyncIterator[LocalEngine]:
    """Changes are fields of EngineConfig or SimConfig; `tokenizer=False` leaves the tokenizer out."""
    files = load_model_files("sim:bytes", Path())
    json_text = files.tokenizer.to_str() if changes.pop("tokenizer", True) else None
    sim = SimConfig(**FAST, **{n: changes.pop(n) for n in list(changes) if n in SimConfig.__struct_fields__})
    config = EngineConfig(kind="sim", sim=sim, **changes)
    made = sim_engine(config, files.vocab_size, files.special.eos, "sim", SimOptions(tokenizer_json=json_text))
    async with LocalEngine(TextEngine(made, files.tokenizer)) as local:
        yield local


@dataclass
class Said:
    """What one request came to."""

    deltas: list[StepDelta] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def tokens(self) -> list[int]:
        return [token_id for delta in self.deltas for token_id in delta.token_ids]

    @property
    def last(self) -> StepDelta:
        return self.deltas[-1]


def request(request_id: str, source: GrammarSource | None, **changes: Any) -> GenerateRequest:
    """Changes are fields of SamplingParams or GenerateRequest."""
    constraint = None if source is None else Constraint(source=source, param="response_format")
    sampling = {name: changes.pop(name) for name in list(changes) if name in SamplingParams.__struct_fields__}
    params = SamplingParams(**{"max_tokens": 300, "seed": 1, **sampling}, constraint=constraint)
    prompt = pack_tokens(list(changes.pop("prompt", b"hello")))
    return GenerateRequest(request_id=request_id, prompt=prompt, sampling=params, **changes)


async def say(local: LocalEngine, request_id: str, source: GrammarSource | None, **changes: Any) -> Said:
    return Said(await local.generate(request(request_id, source, **changes)))


def schema(**described: Any) -> GrammarSource:
    return GrammarSource(kind="json", text=json.dumps(described))


def regex(text: str) -> GrammarSource:
    return GrammarSource(kind="regex", text=text)


class CountingGuard:
    """A guard that tries nothing, and counts who asks."""

    def __init__(self, refusals: Sequence[GrammarError] = ()) -> None:
        self.checked: list[GrammarSource] = []
        self.closed = False
        self._refusals = list(refusals)

    def check(self, source: GrammarSource) -> str:
        self.checked.append(source)
        if self._refusals:
            raise self._refusals.pop()
        return to_llguidance(source)

    def close(self) -> None:
        self.closed = True
