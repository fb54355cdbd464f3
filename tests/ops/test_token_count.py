"""Numbers of tokens as people write them."""

from __future__ import annotations

import click
import pytest
from click.testing import CliRunner

from ops.simulate.cli import simulate
from ops.token_count import TokenCount


@pytest.mark.parametrize(
    ("spelt", "tokens"),
    [("512k", 512_000), ("4M", 4_000_000), ("1.5m", 1_500_000), ("2G", 2 * 10**9), ("4_000_000", 4_000_000), (7, 7)],
)
def test_thousands_and_millions_may_be_written_as_such(spelt: object, tokens: int) -> None:
    assert TokenCount().convert(spelt, None, None) == tokens


@pytest.mark.parametrize("spelt", ["", "0", "-4", "4 M", "4MB", "k", "1e6", "0.0001k"])
def test_anything_else_is_told_with_an_example(spelt: str) -> None:
    with pytest.raises(click.BadParameter, match="512k and 4M"):
        TokenCount().convert(spelt, None, None)


def test_the_simulator_takes_them() -> None:
    refused = CliRunner().invoke(simulate, ["trace", __file__, "--kv-tokens", "lots"])
    assert refused.exit_code == 2 and "'lots' is no number of tokens" in refused.output
