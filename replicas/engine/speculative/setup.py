"""From the profile to a speculator: which drafter, and who decides how much of it."""

from __future__ import annotations

import random

from configs.schema import SpeculativeConfig
from replicas.engine.speculative.control import Control, CostlyGuesses, Fixed, FreeGuesses, Trials
from replicas.engine.speculative.drafter import Drafter
from replicas.engine.speculative.lookahead import Lookahead, LookaheadDrafter
from replicas.engine.speculative.speculator import Speculator

MODEL_METHODS = frozenset({"draft_model", "mlp_speculator"})
"""Methods that need files of their own: `SpeculativeConfig.model`."""


def without_model(config: SpeculativeConfig) -> Drafter:
    """The drafter of a method that needs no files."""
    if config.method == "ngram":
        from replicas.engine.speculative.ngram import NgramDrafter  # here, since the sim engine does without numpy

        return NgramDrafter(config.prompt_lookup_min, config.prompt_lookup_max)
    assert config.method == "lookahead", config.method
    return LookaheadDrafter(_lookahead(config), random.Random(0))


def speculator(config: SpeculativeConfig, drafter: Drafter) -> Speculator:
    """A drafter of the profile's method, with the control that suits what its guesses cost."""
    return Speculator(drafter, _control(config))


def max_rows(config: SpeculativeConfig) -> int:
    """Guesses that one sequence may have in a step."""
    return _lookahead(config).max_rows if config.method == "lookahead" else config.num_speculative_tokens


def _control(config: SpeculativeConfig) -> Control:
    num_drafts = max_rows(config)
    if not config.adaptive:
        return Fixed(num_drafts)
    if config.method == "lookahead":
        return Trials(num_drafts)
    return FreeGuesses(num_drafts) if config.method == "ngram" else CostlyGuesses(num_drafts)


def _lookahead(config: SpeculativeConfig) -> Lookahead:
    return Lookahead(config.lookahead_window, config.lookahead_ngram, config.lookahead_guesses)
