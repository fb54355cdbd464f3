"""How good and how fast a model folder is under an engine profile: perplexity, a quiz, single-request speed, memory.

Everything goes through the engine itself: prompts are scored by its `prompt_logprobs`, so that what is measured is what
is served. Work is cut into pieces whose results are lines of a file; what is in the file is not measured again.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import median
from typing import TYPE_CHECKING, Any

import msgspec

from configs.schema import EngineConfig
from ops.quiz import Question, chosen

if TYPE_CHECKING:
    import tokenizers

    from replicas.contract import EngineFacts, GenerateRequest
    from replicas.engine.core import EngineCore

WINDOW_TOKENS = 512
_PIECE_WINDOWS = 8
_PIECE_QUESTIONS = 32
_PROMPT_TOKENS, _ANSWER_TOKENS = 128, 64


@dataclass(frozen=True, slots=True)
class Subject:
    """What is measured: files and how they are run."""

    name: str
    model_dir: Path
    config: EngineConfig

    @property
    def key(self) -> str:
        """Changes when results would."""
        files = [path for path in self.model_dir.iterdir() if path.suffix in (".safetensors", ".gguf")]
        sizes = sorted((path.name, path.stat().st_size) for path in files)
        return json.dumps([self.name, str(self.model_dir), msgspec.to_builtins(self.config), sizes])


@dataclass(slots=True)
class Ledger:
    """Results by subject, kind and piece; a line of JSON each."""

    path: Path
    results: dict[tuple[str, str, int], dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def open(cls, path: Path) -> Ledger:
        """Reads what is there; a line cut short by a kill is measured again."""
        ledger = cls(path)
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")
        for line in text.splitlines():
            try:
                row = json.loads(line)
            except ValueError:
                continue
            ledger.results[row["subject"], row["kind"], row["piece"]] = row["result"]
        return ledger

    def get(self, subject: Subject, kind: str, piece: int) -> dict[str, Any] | None:
        return self.results.get((subject.key, kind, piece))

    def put(self, subject: Subject, kind: str, piece: int, result: dict[str, Any]) -> None:
        self.results[subject.key, kind, piece] = result
        row = {"subject": subject.key, "kind": kind, "piece": piece, "result": result}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def all(self, subject: Subject, kind: str) -> list[dict[str, Any]]:
        """A subject's results of one kind, by piece."""
        found = {piece: r for (key, k, piece), r in self.results.items() if key == subject.key and k == kind}
        return [found[piece] for piece in sorted(found)]


@dataclass(slots=True)
class Engine:
    """A subject's engine, without its thread."""

    core: EngineCore
    facts: EngineFacts
    _num_requests: int = 0

    @classmethod
    def load(cls, subject: Subject) -> Engine:
        """Raises EngineError as the engine does."""
        from replicas.engine.engine import build_engine

        built = build_engine(subject.model_dir, subject.config, subject.name, time.monotonic)
        return cls(built.core, built.facts)

    @property
    def bytes_per_token(self) -> float:
        """What keys and values of one token take."""
        return self.facts.kv_bytes / (self.facts.num_blocks * self.facts.block_size)

    def scores(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """Logprobs of every token but the first of each sequence."""
        names = [self._add(sequence, prompt_logprobs=0, max_tokens=1) for sequence in sequences]
        found: dict[str, list[float]] = {}
        while self.core.has_work:
            for delta in self.core.step():
                if delta.prompt_logprobs is not None:
                    found[delta.request_id] = [p.logprob for p in delta.prompt_logprobs if p is not None]
        return [found[name] for name in names]

    def decode_steps(self, prompt: Sequence[int], num_tokens: int) -> list[float]:
        """Seconds of each step that gave a token after the first."""
        self._add(prompt, max_tokens=num_tokens, ignore_eos=True)
        times = []
        while self.core.has_work:
            began = time.perf_counter()
            deltas = self.core.step()
            if any(delta.token_ids for delta in deltas):
                times.append(time.perf_counter() - began)
        return times[1:]

    def _add(self, tokens: Sequence[int], **sampling: Any) -> str:
        from replicas.contract import GenerateRequest, SamplingParams, pack_tokens

        self._num_requests += 1
        request: GenerateRequest = GenerateRequest(
            request_id=f"measured-{self._num_requests}",
            prompt=pack_tokens(tokens),
            sampling=SamplingParams(temperature=0.0, seed=0, **sampling),
        )
        self.core.add(request)
        return request.request_id


def windows(text: str, tokenizer: tokenizers.Tokenizer, max_tokens: int | None) -> list[list[int]]:
    """The text's tokens in windows of 512, the last one shorter; each is scored by itself."""
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids[:max_tokens]
    cut = [ids[i : i + WINDOW_TOKENS] for i in range(0, len(ids), WINDOW_TOKENS)]
    return [window for window in cut if len(window) > 1]


def measure_perplexity(ledger: Ledger, subject: Subject, engine: Engine, cut: Sequence[list[int]]) -> Iterator[None]:
    """Scores the windows that the ledger lacks, a piece at a time."""
    for piece, part in _window_pieces(cut):
        if not _has_windows(ledger, subject, piece, part):
            scores = [score for scores in engine.scores(part) for score in scores]
            ledger.put(subject, "perplexity", piece, {"nats": -sum(scores), "num_tokens": len(scores)})
        yield


def perplexity(ledger: Ledger, subject: Subject) -> tuple[float, int] | None:
    """Perplexity and the number of tokens scored so far."""
    pieces = ledger.all(subject, "perplexity")
    num_tokens = sum(piece["num_tokens"] for piece in pieces)
    return (math.exp(sum(piece["nats"] for piece in pieces) / num_tokens), num_tokens) if pieces else None


def measure_quiz(
    ledger: Ledger, subject: Subject, engine: Engine, asked: Sequence[Question], tokenizer: tokenizers.Tokenizer
) -> Iterator[None]:
    """Asks the questions that the ledger lacks."""
    for piece, part in _question_pieces(asked):
        if not _has_questions(ledger, subject, piece, part):
            right = sum(_answers_right(engine, question, tokenizer) for question in part)
            ledger.put(subject, "quiz", piece, {"num_right": right, "num_asked": len(part)})
        yield


def accuracy(ledger: Ledger, subject: Subject) -> tuple[float, int] | None:
    """Share of right answers and the number of questions so far."""
    pieces = ledger.all(subject, "quiz")
    num_asked = sum(piece["num_asked"] for piece in pieces)
    return (sum(piece["num_right"] for piece in pieces) / num_asked, num_asked) if pieces else None


def _answers_right(engine: Engine, question: Question, tokenizer: tokenizers.Tokenizer) -> bool:
    start = len(tokenizer.encode(question.prompt, add_special_tokens=False).ids)
    sequences = [tokenizer.encode(question.prompt + c, add_special_tokens=False).ids for c in question.choices]
    scores = [scored[start - 1 :] for scored in engine.scores(sequences)]
    return chosen([sum(s) / len(s) for s in scores]) == question.answer


def has_quality(ledger: Ledger, subject: Subject, cut: Sequence[list[int]], asked: Sequence[Question]) -> bool:
    """Whether all windows and questions are in the ledger."""
    scored = all(_has_windows(ledger, subject, piece, part) for piece, part in _window_pieces(cut))
    return scored and all(_has_questions(ledger, subject, piece, part) for piece, part in _question_pieces(asked))


def _window_pieces(cut: Sequence[list[int]]) -> Iterator[tuple[int, Sequence[list[int]]]]:
    return ((i, cut[i : i + _PIECE_WINDOWS]) for i in range(0, len(cut), _PIECE_WINDOWS))


def _question_pieces(asked: Sequence[Question]) -> Iterator[tuple[int, Sequence[Question]]]:
    return ((i, asked[i : i + _PIECE_QUESTIONS]) for i in range(0, len(asked), _PIECE_QUESTIONS))


def _has_windows(ledger: Ledger, subject: Subject, piece: int, part: Sequence[list[int]]) -> bool:
    """Whether a piece was measured with as much text: the last one of a shorter run was not."""
    found = ledger.get(subject, "perplexity", piece)
    return found is not None and found["num_tokens"] >= sum(len(window) - 1 for window in part)


def _has_questions(ledger: Ledger, subject: Subject, piece: int, part: Sequence[Question]) -> bool:
    found = ledger.get(subject, "quiz", piece)
    return found is not None and found["num_asked"] >= len(part)


def measure_speed(ledger: Ledger, subject: Subject, engine: Engine, visit: int) -> None:
    """Tokens a second of one request by itself, from the median step; a visit more each time that this is asked."""
    if ledger.get(subject, "speed", visit) is None:
        rng = Random(visit)
        prompt = [rng.randrange(engine.facts.vocab_size) for _ in range(_PROMPT_TOKENS)]
        rate = 1 / median(engine.decode_steps(prompt, _ANSWER_TOKENS))
        result = {"tokens_per_s": rate, "weight_bytes": engine.facts.weight_bytes, "kv_bytes": engine.bytes_per_token}
        ledger.put(subject, "speed", visit, result)


def speed(ledger: Ledger, subject: Subject) -> dict[str, float] | None:
    """The median of all visits' rates, and what weights and a token's keys and values take."""
    visits = ledger.all(subject, "speed")
    return {**visits[0], "tokens_per_s": median(visit["tokens_per_s"] for visit in visits)} if visits else None
