"""The command `warmgate`. Verbs load what they need when they run, so that help and version come at once.

Exit codes: 0 done, 1 it did not work, 2 the command or the configuration is wrong. Errors are one line on stderr.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ops.verbs import Verbs

if TYPE_CHECKING:
    from rich.console import Console

    from configs.load import Override, Profile

Command = TypeVar("Command", bound=Callable[..., Any])


_HELP = {"help_option_names": ["-h", "--help"]}


@click.group(cls=Verbs, context_settings=_HELP)
def main() -> None:
    """An OpenAI-compatible gateway in front of many model replicas.

    \b
    warmgate models pull smollm2-135m     get the model of the quickstart
    warmgate serve                        serve it on http://127.0.0.1:8000
    warmgate chat "What is a prefix?"     ask it
    warmgate doctor                       say what is missing on this machine
    """


def profile_options(command: Command) -> Command:
    """PROFILE, --host, --port, --set: arrives as the keyword arguments of `_load`."""
    for decorate in (
        click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Set any key; may be repeated."),
        click.option("--port", metavar="PORT", help="Listen on this port (http.port)."),
        click.option("--host", metavar="HOST", help="Listen on this address (http.host)."),
        click.argument("profile", default="quickstart"),
    ):
        command = decorate(command)
    return command


@main.command(short_help="Serve a profile until Ctrl-C.")
@profile_options
@click.option("--upstream", "upstreams", multiple=True, metavar="URL", help="A server that runs already; repeatable.")
@click.option("--model", metavar="SOURCE", help="With --upstream: whose tokenizer and chat template.")
def serve(profile: str, upstreams: Sequence[str], model: str | None, **flags: Any) -> None:
    """Serve PROFILE (a YAML file or a shipped profile's name) until Ctrl-C.

    With --upstream no profile is needed: the gateway goes in front of OpenAI-compatible servers that run already.

    \b
    warmgate serve                                          the quickstart: SmolLM2 on two replicas
    warmgate serve sim                                      no model: replicas that pretend
    warmgate serve my.yaml --port 8001
    warmgate serve --upstream http://a:8000 --upstream http://b:8000 --port 9000
    warmgate serve --set groups.0.replicas=1 --set http.docs=false
    WARMGATE_HTTP__PORT=8001 warmgate serve                 the same keys, from the environment
    """
    from configs.errors import ConfigError

    if upstreams:
        from configs.runtime import home_dir
        from ops.upstream import make_profile

        profile = str(make_profile(upstreams, model, home_dir(os.environ)))
        click.echo(f"profile: {profile}")
    elif model is not None:
        raise click.UsageError("--model is for --upstream: a profile names its own models")
    loaded = _load(profile, **flags)
    from ops.serve import ServeOptions, run

    try:
        code = run(loaded.config, ServeOptions(console=_console()))
    except ConfigError as error:
        if error.origin is not None or not error.key:
            raise
        raise ConfigError(error.reason, key=error.key, origin=loaded.document.origin_of(error.key)) from error
    click.get_current_context().exit(code)


@main.command(short_help="Show the instances that run on this machine.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def status(as_json: bool) -> None:
    """Show the instances that run on this machine, their replicas and what those are doing.

    \b
    warmgate status
    warmgate status --json
    """
    from ops.status import show, statuses

    found = statuses()
    if as_json:
        import json

        click.echo(json.dumps([one.as_json() for one in found], indent=2))
    elif not found:
        click.echo("no instance is running on this machine: start one with warmgate serve")
    else:
        show(found, _console())


@main.group()
def models() -> None:
    """Get and list model files.

    They live in WARMGATE_HOME/models, by default ~/.cache/warmgate/models.
    """


@models.command("pull")
@click.argument("names", nargs=-1, metavar="[NAME]…")
@click.option("--profile", help="Get what this profile names and is not here.")
def models_pull(names: Sequence[str], profile: str | None) -> None:
    """Get models: names from the catalogue, or hub ids like org/name.

    A model that is here and sound is left alone; an interrupted pull goes on where it can.

    \b
    warmgate models pull smollm2-135m
    warmgate models pull --profile quickstart
    WARMGATE_HOME=/data/warmgate warmgate models pull smollm2-135m
    """
    from configs.runtime import home_dir
    from ops.models import missing, pull
    from ops.pull_progress import PullProgress

    home = home_dir(os.environ)
    if profile is not None:
        names = [*names, *missing(_load(profile), home)]
    elif not names:
        raise click.UsageError("name a model, or give --profile")
    console = _console(stderr=True)
    for name in names:
        with PullProgress(console, name) as progress:
            path = pull(name, home, os.environ, progress.report)
        click.echo(f"{name} is ready at {path}")


@models.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def models_list(as_json: bool) -> None:
    """List the catalogue and what is on this machine."""
    from configs.runtime import home_dir
    from ops.models import listed

    found = listed(home_dir(os.environ))
    if as_json:
        import json

        rows = [{"name": m.name, "state": m.state, "path": str(m.path), "num_bytes": m.num_bytes} for m in found]
        click.echo(json.dumps(rows, indent=2))
        return
    width = max(len(model.name) for model in found)
    for model in found:
        size = f"{model.num_bytes / 1e6:,.0f} MB"
        click.echo(f"{model.name:<{width}}  {size:>10}  {model.state:<10}  {model.about}".rstrip())


@models.command("path")
@click.argument("name")
def models_path(name: str) -> None:
    """Print the folder that a model's files are in.

    \b
    ls "$(warmgate models path smollm2-135m)"
    """
    from configs.runtime import home_dir
    from configs.tokenizer import find_model

    click.echo(find_model(name, home_dir(os.environ)))


@main.command()
@click.argument("prompt", nargs=-1)
@click.option("--url", envvar="WARMGATE_URL", help="The gateway [default: the one running here, or port 8000].")
@click.option("--key", envvar="WARMGATE_API_KEY", help="API key [environment: WARMGATE_API_KEY].")
@click.option("--model", help="Model id [default: the first the gateway lists].")
@click.option("--system", help="System message.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Longest answer, in tokens.")
@click.option("--temperature", type=click.FloatRange(0, 2), default=0.2, show_default=True, help="0 is greedy.")
def chat(prompt: tuple[str, ...], **options: Any) -> None:
    """Chat with a gateway. With PROMPT, or with text on standard input: one answer, then the end.

    In a conversation: /reset forgets it, /system TEXT sets the system message, /quit or Ctrl-D leaves, Ctrl-C stops an
    answer.

    \b
    warmgate chat
    warmgate chat "Name three rivers."
    git diff | warmgate chat "Say what changes here:"
    warmgate chat --url http://gateway:8000 --model smollm2-135m --system "Answer in one line."
    """
    from ops.chat import ChatOptions, converse, one_answer

    url = options.pop("url") or running_url()
    chosen = ChatOptions(url=url, **options)
    text = " ".join(prompt)
    if not sys.stdin.isatty():
        text = "\n\n".join(part for part in (text, sys.stdin.read().strip()) if part)
    if text:
        one_answer(chosen, text)
    elif sys.stdin.isatty():
        converse(chosen, _console())
    else:
        raise click.UsageError("no prompt: give one as an argument or on standard input")


@main.command()
@profile_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.option("--gpu-gib", type=click.FloatRange(min=1), help="Reckon with GPUs of that size, not those that are here.")
def doctor(profile: str, as_json: bool, gpu_gib: float | None, **flags: Any) -> None:
    """Check this machine against PROFILE and say what to do. Exit code 1 when something will not work.

    \b
    warmgate doctor
    warmgate doctor my.yaml --json
    warmgate doctor vllm-awq-tp --gpu-gib 24
    """
    from ops.doctor import diagnose, render, to_json, worst

    findings = diagnose(profile, lambda: _load(profile, **flags), os.environ, gpu_gib)
    if as_json:
        click.echo(to_json(findings))
    else:
        render(findings, _console())
    click.get_current_context().exit(1 if worst(findings) == "fail" else 0)


@main.group()
def config() -> None:
    """Look at profiles."""


@config.command("show", short_help="Print a profile as it will be used.")
@profile_options
def config_show(profile: str, **flags: Any) -> None:
    """Print PROFILE as it will be used: every key, and where its value came from.

    \b
    warmgate config show
    WARMGATE_HTTP__PORT=8001 warmgate config show sim
    """
    from configs.show import annotated_yaml

    click.echo(annotated_yaml(_load(profile, **flags)), nl=False)


@config.command("list")
def config_list() -> None:
    """List the shipped profiles."""
    from configs.load import PROFILES, shipped_profiles

    for name in shipped_profiles():
        first = (PROFILES / f"{name}.yaml").read_text(encoding="utf-8").splitlines()[0]
        click.echo(f"{name:<12}  {first.removeprefix('#').strip()}")


@main.command()
def version() -> None:
    """Print the versions of Warmgate and of what it runs on."""
    import platform
    from importlib import metadata

    click.echo(f"warmgate {metadata.version('warmgate')}")
    click.echo(f"python {platform.python_version()}")
    for package in ("ray", "torch", "transformers", "vllm"):
        try:
            click.echo(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            continue


def _load(profile: str, *, host: str | None = None, port: str | None = None, settings: Sequence[str] = ()) -> Profile:
    from configs.errors import Origin
    from configs.load import Override, load_profile, setting

    overrides: list[Override] = [setting(text) for text in settings]
    if host is not None:
        overrides.append(Override(Origin("--host"), ("http", "host"), host))
    if port is not None:
        overrides.append(Override(Origin("--port"), ("http", "port"), port))
    return load_profile(profile, os.environ, overrides)


def running_url() -> str:
    """The gateway that runs here and is ready, port 8000 when there is none; never a guess among several."""
    import tempfile
    from pathlib import Path

    from ops.instance import find_instances

    ready = [instance.url for instance in find_instances(Path(tempfile.gettempdir())) if instance.ready]
    if len(ready) > 1:
        raise click.UsageError(f"several instances run here: choose one with --url: {', '.join(ready)}")
    return ready[0] if ready else "http://127.0.0.1:8000"


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


if __name__ == "__main__":
    main(prog_name="warmgate")
