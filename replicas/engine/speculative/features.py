"""What learned heads look at: the model's last hidden state, taken from each step as it is computed."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class FeatureTap(Protocol):
    """Told by a runner after each step, on the engine's thread."""

    def take(self, request_id: str, position: int, feature: Tensor) -> None:
        """`feature`: the hidden state behind the last norm that the request's newest token was drawn from, [hidden];
        it belongs to the token at `position`, the one before the newest."""
        ...
