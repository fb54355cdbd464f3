"""Numbers of tokens on a command line: 4000000, 512k, 4M."""

from __future__ import annotations

import re
from typing import Any

import click

_UNITS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
_SPELT = re.compile(r"(\d+(?:\.\d+)?)([kmg]?)", re.IGNORECASE)


class TokenCount(click.ParamType[int]):
    """At least one token; k, M and G are thousands, millions and thousands of millions."""

    name = "TOKENS"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        found = _SPELT.fullmatch(str(value).replace("_", ""))
        num = round(float(found[1]) * _UNITS[found[2].lower()]) if found else 0
        if num < 1:
            self.fail(f"{value!r} is no number of tokens: 4000000, 512k and 4M are", param, ctx)
        return num
