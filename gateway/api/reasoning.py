"""Models that think before they answer: where the thought ends in their text, and where it stands in an answer.

<think>\\nThe user wants …\\n</think>\\n\\nParis.          prompts of some templates end with the opening tag
       └ reasoning ──────┘           └ content
<think>\\n…\\n</think>\\n<answer>\\nParis.\\n</answer>    some put the answer between tags too
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from gateway.api.harmony import HarmonyReasoning
from gateway.api.pieces import Content, Piece, Reader, Stage, Thought, num_held


@dataclass(frozen=True, slots=True)
class ReasoningFormat:
    """`always`: the thought has begun when the prompt says nothing about it. `answer`: tags around what follows it,
    which the model may leave out."""

    begin: str
    end: str
    always: bool = False
    answer: tuple[str, str] | None = None

    def reader(self, stage: Stage, rest: Reader | None) -> ReasoningReader:
        """`rest` reads what is no thought; None: it is text."""
        if self.answer is not None:
            rest = AnswerReader(*self.answer, rest)
        return ReasoningReader(self, stage, rest)

    def stage(self, prompt: str, *, continues: bool = False) -> Stage:
        """Where an answer to `prompt` begins. `continues`: the prompt ends within an answer."""
        if continues:
            return "inside" if prompt.rfind(self.begin) > prompt.rfind(self.end) else "after"
        tail = prompt.rstrip()
        if tail.endswith(self.begin):
            return "inside"
        if tail.endswith(self.end):
            return "after"
        return "inside" if self.always else "before"

    def lead(self, stage: Stage, spell: Callable[[str], str]) -> str:
        """Lark for what stands before content, thoughts apart: nothing."""
        return ""

    def preface(self, stage: Stage, spell: Callable[[str], str], lead: str = "") -> str:
        """Lark rules for what may come before text that follows a grammar; "" when nothing may. `spell` writes a tag:
        as text, or as the special token it is. `lead`: what stands before the text in any case."""
        if stage == "after":
            return ""
        end = spell(self.end)
        thought = f"thought[lazy]: /(.|\\n)*/ {end}" if end.startswith('"') else f"thought: /(.|\\n)*/ {end}"
        opened = "thought SPACE?" if stage == "inside" else f"({spell(self.begin)} thought SPACE?)?"
        return f"preface: {opened}\n{thought}\nSPACE: /\\n{{1,2}}/"


_THINK = ReasoningFormat("<think>", "</think>")
_ALWAYS = ReasoningFormat("<think>", "</think>", always=True)

REASONING_FORMATS: dict[str, ReasoningFormat | HarmonyReasoning] = {
    "deepseek_r1": _ALWAYS,
    "deepseek_v3": _THINK,
    "ernie45": ReasoningFormat("<think>", "</think>", always=True, answer=("<response>", "</response>")),
    "glm45": _THINK,
    "hunyuan_a13b": ReasoningFormat("<think>", "</think>", answer=("<answer>", "</answer>")),
    "kimi_k2": _THINK,
    "minimax_m2": _ALWAYS,
    "mistral": ReasoningFormat("[THINK]", "[/THINK]"),
    "openai_gptoss": HarmonyReasoning(),
    "nemotron_v3": _ALWAYS,
    "olmo3": _THINK,
    "qwen3": _THINK,
    "seed_oss": ReasoningFormat("<seed:think>", "</seed:think>"),
    "step3": _ALWAYS,
}
"""By vLLM's names."""


def detect_reasoning(template: str) -> str | None:
    """The name of the format that a chat template speaks of."""
    if "<|channel|>" in template:
        return "openai_gptoss"
    if "[THINK]" in template:
        return "mistral"
    if "<seed:think>" in template:
        return "seed_oss"
    return "qwen3" if "</think>" in template else None


class ReasoningReader:
    """Splits the thought from the rest, which goes to `rest`. Line breaks around the thought say nothing."""

    def __init__(self, form: ReasoningFormat, stage: Stage, rest: Reader | None) -> None:
        self._form = form
        self._stage: Stage = stage
        self._rest = rest
        self._held = ""
        self._begins = True  # nothing was shown of this stage yet

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        pieces: list[Piece] = []
        if self._stage == "before":
            self._look_for_begin()
        if self._stage == "inside":
            pieces += self._think()
        if self._stage == "after":
            pieces += self._pass_on()
        return pieces

    def finish(self) -> list[Piece]:
        held, self._held = self._held, ""
        if self._stage == "inside":
            return [Thought(held)] if held else []
        if self._rest is None:
            return [Content(held)] if held else []
        return [*(self._rest.feed(held) if held else ()), *self._rest.finish()]

    def _look_for_begin(self) -> None:
        stripped = self._held.lstrip()
        if stripped.startswith(self._form.begin):
            self._held, self._stage = stripped.removeprefix(self._form.begin), "inside"
        elif not self._form.begin.startswith(stripped):
            self._stage, self._begins = "after", False  # it answers at once: its white space is its own

    def _think(self) -> list[Piece]:
        self._trim()
        at = self._held.find(self._form.end)
        ended = at >= 0
        end = at if ended else len(self._held) - num_held(self._held, self._form.end)
        thought = self._held[:end]
        self._held = self._held[end + len(self._form.end) :] if ended else self._held[end:]
        if ended:
            self._stage, self._begins = "after", True
        return [Thought(thought)] if thought else []

    def _pass_on(self) -> list[Piece]:
        self._trim()
        text, self._held = self._held, ""
        if not text:
            return []
        return [Content(text)] if self._rest is None else self._rest.feed(text)

    def _trim(self) -> None:
        if self._begins:
            self._held = self._held.lstrip("\r\n")
            self._begins = not self._held


class AnswerReader:
    """Takes the tags, and the line breaks beside them, off an answer that has them; what follows is passed on."""

    def __init__(self, begin: str, end: str, rest: Reader | None) -> None:
        self._begin = begin
        self._end = end
        self._rest = rest
        self._held = ""
        self._state: Literal["before", "first", "inside", "behind", "plain"] = "before"

    def feed(self, text: str) -> list[Piece]:
        self._held += text
        if self._state == "before":
            self._look_for_begin()
        if self._state == "first":
            self._held = self._held.lstrip("\r\n")
            self._state = "inside" if self._held else "first"
        pieces = self._inside() if self._state == "inside" else []
        if self._state == "behind":
            self._held = self._held.lstrip()
            self._state = "plain" if self._held else "behind"
        return pieces + self._pass_on(len(self._held)) if self._state == "plain" else pieces

    def finish(self) -> list[Piece]:
        pieces = self._pass_on(len(self._held))
        return pieces if self._rest is None else [*pieces, *self._rest.finish()]

    def _look_for_begin(self) -> None:
        stripped = self._held.lstrip()
        if stripped.startswith(self._begin):
            self._held, self._state = stripped.removeprefix(self._begin), "first"
        elif not self._begin.startswith(stripped):
            self._state = "plain"

    def _inside(self) -> list[Piece]:
        at = self._held.find(self._end)
        if at >= 0:
            pieces = self._pass_on(len(self._held[:at].rstrip("\r\n")))
            self._held = self._held.lstrip("\r\n").removeprefix(self._end)
            self._state = "behind"
            return pieces
        shown = self._held[: len(self._held) - num_held(self._held, self._end)]
        return self._pass_on(len(shown.rstrip("\r\n")))

    def _pass_on(self, num_chars: int) -> list[Piece]:
        text, self._held = self._held[:num_chars], self._held[num_chars:]
        if not text:
            return []
        return [Content(text)] if self._rest is None else self._rest.feed(text)
