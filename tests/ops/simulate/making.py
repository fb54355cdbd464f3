"""Small traces that tests make themselves."""

from __future__ import annotations

from random import Random

from ops.simulate.trace import Chain, Trace, TraceRequest


def unique_prompts(arrivals_s: list[float], num_prompt: int, num_output: int = 1) -> Trace:
    """Prompts of one length that share nothing."""
    requests = tuple(TraceRequest(at_s, num_prompt, num_output) for at_s in arrivals_s)
    return Trace("unique", 64, requests)


def poisson(num: int, per_s: float, seed: int = 0) -> list[float]:
    random = Random(seed)
    now = 0.0
    return [now := now + random.expovariate(per_s) for _ in range(num)]


def conversations(num: int, per_s: float, seed: int = 0, block_tokens: int = 16) -> Trace:
    """Prompts that continue earlier ones or begin anew after a common system prompt, of very different lengths."""
    random = Random(seed)
    chain = Chain()
    prompts: list[list[int]] = []
    requests = []
    for i, at_s in enumerate(poisson(num, per_s, seed + 1)):
        goes_on = prompts and random.random() < 0.6
        contents = list(random.choice(prompts[-40:])) if goes_on else [0, 1]
        contents += [100 * i + 10 + k for k in range(random.choice((0, 1, 2, 5, 30)))]
        prompts.append(contents)
        num_prompt = len(contents) * block_tokens + random.randrange(1, block_tokens)
        num_output = random.choice((1, 1, 3, 20, 60))
        requests.append(TraceRequest(at_s, num_prompt, num_output, chain.of(contents)))
    return Trace("conversations", block_tokens, tuple(requests))


def sessions(num: int, num_turns: int, think_s: float, block_tokens: int = 16) -> Trace:
    """Each turn's prompt continues the one before; sessions begin a second apart."""
    requests: list[TraceRequest] = []
    for turn in range(num_turns):
        for session in range(num):
            chain = Chain(session)
            contents = list(range(4 * (turn + 1)))
            requests.append(
                TraceRequest(
                    session + 0.1 * turn,
                    len(contents) * block_tokens + 3,
                    5,
                    chain.of(contents),
                    after=len(requests) - num if turn else None,
                    think_s=think_s,
                )
            )

    return Trace("sessions", block_tokens, tuple(requests))
