"""One answer's way through its grammar. No torch here: the sim engine follows grammars too.

A grammar may be right and yet slow to follow: a mask that takes 50 ms holds up every request of the step. So an answer
has an allowance of CPU seconds for its masks, which grows with its tokens; beyond it that answer alone ends.

Masks behind guesses are no fault of the answer: they have an allowance of their own, beyond which there are no guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from configs.grammars.translate import refusal
from replicas.contract import Fault
from replicas.engine.structured.numbers import NumberEnd
from replicas.engine.structured.walk import Walk

BURST_S = 0.3
PER_TOKEN_S = 0.001
"""CPU seconds that the masks of one answer may take: at once, and more for each token. A usual mask takes 10 µs, one
that nothing like it came before 5 ms."""

MAX_GUESSABLE_S = 0.0001
"""A mask that takes longer is not worth to be made behind guesses, which are mostly wrong."""

GUESS_BURST_S = 0.02
GUESS_PER_TOKEN_S = 0.001
"""CPU seconds that the masks behind guesses may take: at most at once, and more for each token."""


class Grammar:
    """Follows one sequence along its `walk`. `cpu_s` is the CPU clock of the thread that calls (`time.thread_time`);
    `numbers` bounds those of JSON.

    `fault` says why the grammar cannot be followed any further; then nothing it allows means anything.
    """

    __slots__ = ("_allowance_s", "_cpu_s", "_guess_allowance_s", "_mask_s", "_numbers", "_param", "_walk", "fault")

    def __init__(
        self,
        walk: Walk,
        param: str,
        cpu_s: Callable[[], float],
        numbers: NumberEnd | None = None,
    ) -> None:
        self.fault: Fault | None = None
        self._walk = walk
        self._param = param
        self._cpu_s = cpu_s
        self._numbers = numbers
        self._allowance_s = BURST_S
        self._guess_allowance_s = GUESS_BURST_S
        self._mask_s = 0.0

    @property
    def complete(self) -> bool:
        """Nothing more can follow but end of sequence."""
        return self.fault is None and self._walk.complete

    @property
    def bears_guesses(self) -> bool:
        """Whether masks behind guesses can be afforded in the next step. It changes when tokens come, never which."""
        return self._guess_allowance_s > 0.0 and self._mask_s <= MAX_GUESSABLE_S

    def allowed(self, path: Sequence[int] = ()) -> bytes | None:
        """Which tokens may come next, behind the guesses `path`: one bit a token id, lowest bit first.

        None when the path is not allowed itself (what is drawn behind it counts for nothing), or after a fault.
        """
        if self.fault is not None:
            return None
        started = self._cpu_s()
        mask = self._walk.mask(path)
        if mask is None and not path:
            self._fail()
        if mask is not None and self._numbers is not None:
            mask = self._numbers.without_digits(mask, path)
        elapsed_s = self._cpu_s() - started
        if path:
            self._guess_allowance_s -= elapsed_s
        else:
            self._allowance_s -= elapsed_s
            self._mask_s = elapsed_s
        return mask

    def advance(self, token_id: int) -> bool:
        """Takes in a token that was drawn; False when the grammar cannot be followed: see `fault`."""
        if self.fault is not None:
            return False
        started = self._cpu_s()
        if not self._walk.take((token_id,)):
            self._fail()
        if self._numbers is not None:
            self._numbers.advance(token_id)
        self._allowance_s += PER_TOKEN_S - (self._cpu_s() - started)
        self._guess_allowance_s = min(GUESS_BURST_S, self._guess_allowance_s + GUESS_PER_TOKEN_S)
        if self._allowance_s < 0.0 and self.fault is None:
            message = "The grammar takes too long to follow; a simpler one will do."
            self.fault = Fault("grammar_too_complex", message, param=self._param)
        return self.fault is None

    def _fail(self) -> None:
        error = refusal(self._walk.error)
        code = "grammar_too_complex" if error.too_complex else "invalid_grammar"
        self.fault = Fault(code, f"The grammar cannot be followed any further: {error.message}", param=self._param)
