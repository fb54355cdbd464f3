"""The group that `warmgate` is: our errors as one line and an exit code, big verbs loaded when they are called."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import click

from ops.errors import OperationError

_LAZY = {
    "adapters": "ops.adapters",
    "bench": "ops.bench.cli",
    "explain": "ops.explain",
    "quantize": "ops.quantize",
    "quantize-report": "ops.quantize_report",
    "simulate": "ops.simulate.cli",
    "train-draft": "ops.train_draft",
    "demo-lora": "ops.demo_lora",
    "train-lora": "ops.train_lora",
    "tune": "ops.tune.cli",
}
"""Verbs whose own module holds them, under their name."""


class Verbs(click.Group):
    """A group that turns our own errors into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except KeyboardInterrupt:
            ctx.exit(130)
        except BrokenPipeError:  # the reader of our output left, as `head` does
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(1)
        except Exception as error:
            code = _exit_code(error)
            if code is None:
                raise
            click.echo(f"error: {error}", err=True)
            ctx.exit(code)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted([*super().list_commands(ctx), *(name for name in _LAZY if find_spec(_LAZY[name]))])

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name in _LAZY and find_spec(_LAZY[cmd_name]):
            command: click.Command = getattr(import_module(_LAZY[cmd_name]), cmd_name.replace("-", "_"))
            return command
        return super().get_command(ctx, cmd_name)


def _exit_code(error: Exception) -> int | None:
    """The code of an error that is the user's to read; None for a fault of ours, which shows its traceback."""
    from configs.errors import ConfigError

    if isinstance(error, ConfigError):
        return 2
    return 1 if isinstance(error, OperationError) else None
