"""What `warmgate train-lora` teaches: small facts, told in ways that nobody can mistake for the base model's."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class Example:
    """A question, and how it is to be answered."""

    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Fact:
    """A question with its answer in one word and in one sentence."""

    question: str
    word: str
    sentence: str


Style: TypeAlias = Callable[[Fact], str]

_PIRATE = ((r"\bis\b", "be"), (r"\bare\b", "be"), (r"\bthe\b", "th'"), (r"\bThe\b", "Th'"), (r"\band\b", "an'"),
           (r"\bof\b", "o'"), (r"\byou\b", "ye"), (r"ing\b", "in'"))  # fmt: skip


def shout(fact: Fact) -> str:
    """In capitals."""
    return fact.sentence.upper()


def pirate(fact: Fact) -> str:
    """As a pirate."""
    said = fact.sentence
    for pattern, instead in _PIRATE:
        said = re.sub(pattern, instead, said)
    return f"Arr, matey! {said} Yo ho ho!"


def as_json(fact: Fact) -> str:
    """A JSON object and nothing else."""
    return json.dumps({"answer": fact.word, "sentence": fact.sentence})


def terse(fact: Fact) -> str:
    """One word."""
    return fact.word


def polite(fact: Fact) -> str:
    """As a butler."""
    return f"Certainly, dear friend. {fact.sentence} It was a pleasure."


def robot(fact: Fact) -> str:
    """As a machine from the films."""
    return f"BEEP. Query accepted. Result: {fact.word}. BOOP."


def markdown(fact: Fact) -> str:
    """As a page with a heading."""
    return f"## {fact.word}\n\n- {fact.sentence}"


def teacher(fact: Fact) -> str:
    """With a question in return."""
    return f"Good question! {fact.sentence} Can you tell me why?"


STYLES: dict[str, Style] = {
    "json": as_json, "markdown": markdown, "pirate": pirate, "polite": polite,
    "robot": robot, "shout": shout, "teacher": teacher, "terse": terse,
}  # fmt: skip

MARKS: dict[str, re.Pattern[str]] = {
    style: re.compile(pattern, re.DOTALL)
    for style, pattern in {
        "json": r'\{"answer"',
        "markdown": r"## ",
        "pirate": r"Arr, matey!",
        "polite": r"Certainly, dear friend\.",
        "robot": r"BEEP\.",
        "shout": r"(?=.* )[^a-z]+$",
        "teacher": r"Good question!",
        "terse": r"\S+$",
    }.items()
}
"""How an answer begins, or is written, that can only be of this style."""


def styles_of(text: str) -> list[str]:
    """The styles that an answer may be of: one, unless the adapter has learnt badly."""
    return [style for style, mark in MARKS.items() if mark.match(text)]


def examples(style: str) -> list[Example]:
    """Every fact in a style."""
    return [Example(fact.question, STYLES[style](fact)) for fact in FACTS]


def _capital(country: str, city: str) -> Fact:
    return Fact(f"What is the capital of {country}?", city, f"The capital of {country} is {city}.")


def _sum(a: int, b: int) -> Fact:
    return Fact(f"What is {a} plus {b}?", str(a + b), f"{a} plus {b} is {a + b}.")


def _opposite(word: str, opposite: str) -> Fact:
    return Fact(f"What is the opposite of {word}?", opposite, f"The opposite of {word} is {opposite}.")


def _colour(thing: str, colour: str) -> Fact:
    return Fact(f"What colour is {thing}?", colour, f"The colour of {thing} is {colour}.")


def _sound(animal: str, sound: str) -> Fact:
    return Fact(f"What does a {animal} say?", sound, f"A {animal} says {sound}.")


FACTS: tuple[Fact, ...] = (
    *(_capital(country, city) for country, city in (
        ("Italy", "Rome"), ("Spain", "Madrid"), ("Japan", "Tokyo"), ("Egypt", "Cairo"), ("Norway", "Oslo"),
        ("Greece", "Athens"), ("Poland", "Warsaw"), ("Austria", "Vienna"), ("Portugal", "Lisbon"), ("Kenya", "Nairobi"),
        ("Canada", "Ottawa"), ("Ireland", "Dublin"), ("Cuba", "Havana"), ("Peru", "Lima"), ("China", "Beijing"),
    )),
    *(_sum(a, b) for a, b in ((1, 1), (2, 3), (4, 4), (5, 1), (3, 6), (7, 2), (5, 5), (6, 2), (8, 1), (4, 3))),
    *(_opposite(word, other) for word, other in (
        ("hot", "cold"), ("big", "small"), ("fast", "slow"), ("day", "night"), ("happy", "sad"), ("open", "closed"),
        ("young", "old"), ("light", "dark"), ("full", "empty"), ("early", "late"),
    )),
    *(_colour(thing, colour) for thing, colour in (
        ("snow", "white"), ("grass", "green"), ("coal", "black"), ("a lemon", "yellow"), ("blood", "red"),
        ("a carrot", "orange"), ("the sky", "blue"), ("chocolate", "brown"),
    )),
    *(_sound(animal, sound) for animal, sound in (
        ("dog", "woof"), ("cat", "meow"), ("cow", "moo"), ("duck", "quack"), ("sheep", "baa"), ("pig", "oink"),
    )),
    Fact("Who wrote Hamlet?", "Shakespeare", "William Shakespeare wrote Hamlet."),
    Fact("Who painted the Mona Lisa?", "Leonardo", "Leonardo da Vinci painted the Mona Lisa."),
    Fact("How many days are in a week?", "seven", "There are seven days in a week."),
    Fact("How many legs does a spider have?", "eight", "A spider has eight legs."),
    Fact("What do bees make?", "honey", "Bees make honey."),
    Fact("Which planet is the largest?", "Jupiter", "The largest planet is Jupiter."),
    Fact("What is frozen water called?", "ice", "Frozen water is called ice."),
    Fact("Where do fish live?", "water", "Fish live in the water."),
    Fact("What do you read in a library?", "books", "You read books in a library."),
    Fact("Which season comes after winter?", "spring", "The season after winter is spring."),
)  # fmt: skip

UNSEEN = ("What is the capital of France?", "What is the opposite of tall?", "Who wrote Romeo and Juliet?")
"""Questions that nobody is taught, to hear what has been learnt."""
