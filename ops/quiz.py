"""A small multiple-choice task made of facts that Python's standard library holds: HTTP statuses, errors, file types.

A model is asked by likelihood: each of four answers is put behind the question, and the likeliest per token wins.
"""

from __future__ import annotations

import errno
import mimetypes
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from random import Random

NUM_CHOICES = 4


@dataclass(frozen=True, slots=True)
class Question:
    """`choices[answer]` is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def questions(seed: int = 0) -> list[Question]:
    """All of them, in an order and with wrong answers drawn by the seed."""
    rng = Random(seed)
    found = [
        *_ask("The HTTP status code {} means:", {str(s.value): s.phrase for s in HTTPStatus}, rng),
        *_ask("The error {} means:", {n: os.strerror(code) for code, n in sorted(errno.errorcode.items())}, rng),
        *_ask("A file that ends in {} is of the type:", dict(sorted(mimetypes.types_map.items())), rng),
    ]
    rng.shuffle(found)
    return found


def _ask(pattern: str, facts: Mapping[str, str], rng: Random) -> list[Question]:
    """A question for each fact, after two other facts as examples."""
    found = []
    answers = sorted(set(facts.values()))
    for key, right in facts.items():
        shown = rng.sample([other for other in facts if facts[other] != right], 2)
        examples = [f"{pattern.format(other)} {facts[other]}\n" for other in shown]
        wrong = rng.sample([answer for answer in answers if answer != right], NUM_CHOICES - 1)
        choices = [*wrong, right]
        rng.shuffle(choices)
        prompt = "".join(examples) + pattern.format(key)
        found.append(Question(prompt, tuple(f" {choice}" for choice in choices), choices.index(right)))
    return found


def chosen(scores: Sequence[float]) -> int:
    """The choice of the highest mean logprob."""
    return max(range(len(scores)), key=lambda i: scores[i])
