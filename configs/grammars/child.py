"""The process that tries grammars (`configs.grammars.guard`): what kills it, kills nobody else.

It reads from stdin and answers on stdout (`configs.grammars.frames`) until stdin ends.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading

import llguidance
import msgspec

from configs.grammars.frames import Verdict, read_frame, write_frame
from configs.grammars.source import GrammarError, GrammarSource
from configs.grammars.translate import LIMITS, refusal, to_llguidance

STACK_BYTES = 1024 * 1024
"""Of what is tried. Processes that use grammars have 8 MiB: what passes here cannot overflow there."""
NUM_STEPS = 12
"""Bytes by which a grammar is followed, to see how it fares."""
NICE = 5


class _Bytes:
    """A tokenizer whose tokens are the bytes, and an end of sequence. What `llguidance.TokenizerWrapper` asks for."""

    eos_token_id = 256
    bos_token_id = None
    tokens = (*(bytes([i]) for i in range(256)), b"\xff<eos>")
    special_token_ids = (256,)

    def __call__(self, text: bytes) -> list[int]:
        return list(text)


def serve(max_cpu_s: float, max_bytes: int) -> None:
    """Answers until stdin ends. A check beyond the bounds ends the process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.nice(NICE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _limit_memory(max_bytes)
    threading.stack_size(STACK_BYTES)
    tokenizer = llguidance.LLTokenizer(llguidance.TokenizerWrapper(_Bytes()))
    source_in, verdict_out = sys.stdin.buffer, sys.stdout.buffer
    while (frame := read_frame(source_in)) is not None:
        source = msgspec.msgpack.decode(frame, type=GrammarSource)
        signal.setitimer(signal.ITIMER_PROF, max_cpu_s)  # its signal ends the process
        answer: list[Verdict] = []
        thread = threading.Thread(target=lambda: answer.append(check(source, tokenizer)))  # noqa: B023 — joined below
        thread.start()
        thread.join()
        if not answer:  # the library has panicked
            answer.append(Verdict(None, "it is too much to compile", True))
        signal.setitimer(signal.ITIMER_PROF, 0)
        write_frame(verdict_out, msgspec.msgpack.encode(answer[0]))


def check(source: GrammarSource, tokenizer: llguidance.LLTokenizer) -> Verdict:
    """Translates, compiles and follows a grammar a few steps."""
    try:
        grammar = to_llguidance(source)
        message = llguidance.LLMatcher.validate_grammar(grammar, None, limits=LIMITS)
        if message and not message.startswith("WARNING"):
            raise refusal(message)
        _follow(llguidance.LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS))
    except GrammarError as error:
        return Verdict(None, error.message, error.too_complex)
    except MemoryError:
        return Verdict(None, "it takes too much memory", True)
    return Verdict(grammar)


def _follow(matcher: llguidance.LLMatcher) -> None:
    """Takes allowed bytes, high and low ones in turn. Raises GrammarError where the matcher gives up."""
    if matcher.is_error():
        return  # it names tokens that bytes have not
    for step in range(NUM_STEPS):
        mask = int.from_bytes(matcher.compute_bitmask(), "little") & ((1 << 256) - 1)
        if matcher.is_error():
            raise refusal(matcher.get_error())
        if matcher.is_stopped() or not mask:
            return
        matcher.consume_token(mask.bit_length() - 1 if step % 2 else (mask & -mask).bit_length() - 1)


def _limit_memory(max_bytes: int) -> None:
    """Allows `max_bytes` beyond what the process has mapped; not where the platform does not tell."""
    try:
        with open("/proc/self/statm") as statm:
            mapped = int(statm.read().split()[0]) * resource.getpagesize()
    except OSError:
        return
    resource.setrlimit(resource.RLIMIT_AS, (mapped + max_bytes, mapped + max_bytes))


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
