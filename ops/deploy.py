"""One Ray Serve application: ingress, replica groups and, when `redis.url` is `embedded`, their Valkey.

Built by `warmgate serve` in the supervisor, by `serve run ops.deploy:build profile=quickstart`, and by a RayService
whose serveConfigV2 says `import_path: ops.deploy:build` and `args: {profile: …}`.
"""

from __future__ import annotations

import dataclasses
import os
import secrets
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from ray.serve import Application

from configs import check
from configs.errors import ConfigError, Origin
from configs.load import load_config
from configs.runtime import Runtime
from configs.schema import Config
from gateway.deployment import AppFactory, gateway_app, ingress
from ops.ray_cluster import INGRESS_CPUS
from ops.valkey_deployment import store
from replicas.deployment import HostFactory, replica_group, replica_host

APP_NAME = "warmgate"


@dataclass(frozen=True, slots=True)
class Parts:
    """What runs inside the actors; by import, so that each process loads only its own part."""

    app: AppFactory = gateway_app
    host: HostFactory = replica_host


class BuildArgs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What `serve run ops.deploy:build KEY=VALUE …` takes.

    `profile`: a path or a shipped profile's name; or `config`: the profile itself, as a mapping. `redis_url` and
    `secret_env` replace the profile's `redis.url` and `channel.secret_env`.
    """

    profile: str | None = None
    config: Config | None = None
    redis_url: str | None = None
    secret_env: str | None = None


def build(args: dict[str, object]) -> Application:
    """The application for Ray Serve's own tools. Host and port are theirs to set (`http_options`).

    Raises ConfigError. Without a cluster secret in the environment one is drawn and kept in the run folder: enough for
    one machine, which all replicas must share today: their channels are Unix sockets.
    """
    config = resolve(args)
    runtime = Runtime.from_config(config, os.environ, secrets.token_bytes)
    runtime.prepare()
    if not os.environ.get(config.channel.secret_env):
        runtime = dataclasses.replace(runtime, secret=_kept_secret(runtime))
    return application(config, runtime)


def resolve(args: Mapping[str, object]) -> Config:
    """The profile that `args` mean. Raises ConfigError naming the argument."""
    try:
        given = msgspec.convert(args, BuildArgs)
    except msgspec.ValidationError as error:
        raise ConfigError(str(error), origin=Origin("arguments of ops.deploy:build")) from error
    if (given.profile is None) == (given.config is None):
        raise ConfigError("give either profile or config", origin=Origin("arguments of ops.deploy:build"))
    config = given.config if given.config is not None else load_config(str(given.profile), os.environ)
    for problem in check.problems(config):
        raise ConfigError(problem.reason, key=problem.key, origin=Origin("arguments of ops.deploy:build"))
    replace = msgspec.structs.replace
    if given.redis_url is not None:
        config = replace(config, redis=replace(config.redis, url=given.redis_url))
    if given.secret_env is not None:
        config = replace(config, channel=replace(config.channel, secret_env=given.secret_env))
    return config


def application(config: Config, runtime: Runtime, parts: Parts | None = None) -> Application:
    """Everything a profile describes, as one application whose root is the ingress."""
    parts = parts or Parts()
    children = [replica_group(config, group, runtime, parts.host) for group in config.groups]
    if config.redis.url == "embedded":
        children.append(store(runtime))
    return ingress(config, runtime, parts.app, tuple(children), INGRESS_CPUS)


def _kept_secret(runtime: Runtime) -> bytes:
    """The secret of this run folder: Serve calls `build` on every deploy, and a new one would part old from new."""
    path = runtime.run_dir / "secret"
    fresh = runtime.run_dir / f"secret.{os.getpid()}"
    fresh.touch(mode=0o600)
    fresh.write_bytes(runtime.secret)
    try:
        os.link(fresh, path)  # whole, or not at all
    except FileExistsError:
        return path.read_bytes()
    finally:
        fresh.unlink()
    return runtime.secret
