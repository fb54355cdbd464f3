"""What goes wrong in tuning in a way that is the user's to read."""

from __future__ import annotations

from ops.errors import OperationError


class TuneError(OperationError):
    """The profile cannot be tuned so. One line."""


class TrialError(OperationError):
    """One candidate could not be measured; the message says why, the sweep goes on."""
