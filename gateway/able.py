"""What all replicas of a model can do."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from replicas.contract import EngineFacts

_LEAST = ("max_model_len", "max_num_seqs", "max_num_batched_tokens", "max_logprobs", "max_adapters", "vocab_size")
_ALL = ("exact_resume", "structured", "prompt_logprobs", "events")


def least_able(facts: Sequence[EngineFacts]) -> EngineFacts:
    """The facts that hold for each of them: the smallest limits, the abilities all have. At least one is needed."""
    smallest = min(facts, key=lambda f: f.kv_tokens)
    limits = {name: min(getattr(f, name) for f in facts) for name in _LEAST}
    abilities = {name: all(getattr(f, name) for f in facts) for name in _ALL}
    return msgspec.structs.replace(smallest, **limits, **abilities)
