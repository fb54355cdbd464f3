"""What one running instance shares among its processes, besides the profile."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from configs.errors import ConfigError, Origin
from configs.schema import Config

MAX_SOCKET_PATH = 103
"""Bytes a Unix socket's path may have: 107 on Linux, 103 on macOS."""

MAX_SOCKET_NAME = 40
"""Bytes left for a socket's name inside the run folder."""


@dataclass(frozen=True, slots=True)
class Runtime:
    """One running instance; the same value goes to every process of it (it pickles).

    `run_dir`: Unix sockets live there, mode 0700. `home`: models and caches. `secret`: authenticates the channel and
    salts prefix caches. `instance`: `{cluster}-{port}`, unique on a machine.
    """

    run_dir: Path
    home: Path
    redis_url: str
    secret: bytes = field(repr=False)
    instance: str

    @classmethod
    def from_config(cls, config: Config, env: Mapping[str, str], draw: Callable[[int], bytes]) -> Runtime:
        """Resolves where an instance lives; touches no file (`prepare` makes the folder).

        `draw(n)` returns n random bytes (`secrets.token_bytes`); used when the variable named by
        `channel.secret_env` is unset. Raises ConfigError for a secret of fewer than 16 bytes.
        """
        run_dir = run_dir_for(config, Path(tempfile.gettempdir()))
        given = env.get(config.channel.secret_env, "").encode()
        if given and len(given) < 16:
            raise ConfigError(
                f"the cluster secret must have at least 16 bytes, got {len(given)}",
                origin=Origin(f"environment variable {config.channel.secret_env}"),
            )
        embedded = config.redis.url == "embedded"
        return cls(
            run_dir=run_dir,
            home=home_dir(env),
            redis_url=f"unix://{run_dir / 'valkey.sock'}" if embedded else config.redis.url,
            secret=given or draw(32),
            instance=f"{config.cluster}-{config.http.port}",
        )

    def prepare(self) -> None:
        """Makes the run folder, for this user alone. Raises ConfigError when someone else's folder is in the way."""
        self.run_dir.parent.parent.mkdir(parents=True, exist_ok=True)
        for folder in (self.run_dir.parent, self.run_dir):
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid():
                raise ConfigError(f"{folder} must be a folder that belongs to user {os.getuid()}")
            if stat.S_IMODE(found.st_mode) != 0o700:
                folder.chmod(0o700)


def home_dir(env: Mapping[str, str]) -> Path:
    """Where models and caches live: WARMGATE_HOME, by default ~/.cache/warmgate."""
    given = env.get("WARMGATE_HOME")
    return Path(given).expanduser().absolute() if given else Path.home() / ".cache" / "warmgate"


def run_dir_for(config: Config, temp_dir: Path) -> Path:
    """`{temp_dir}/wg-{uid}/{cluster}-{port}`, shortened where a Unix socket inside would have too long a path."""
    name = f"{config.cluster}-{config.http.port}"
    for base in (temp_dir, Path("/tmp")):
        run_dir = base / f"wg-{os.getuid()}" / name
        if _fits(run_dir):
            return run_dir
        digest = hashlib.sha256(config.cluster.encode()).hexdigest()[:8]
        run_dir = run_dir.with_name(f"{digest}-{config.http.port}")
        if _fits(run_dir):
            return run_dir
    raise AssertionError(f"/tmp is short enough for {name!r}")


def _fits(run_dir: Path) -> bool:
    return len(os.fsencode(run_dir)) + 1 + MAX_SOCKET_NAME <= MAX_SOCKET_PATH
