"""`warmgate serve`: the supervisor. Brings an instance up step by step, watches it, and takes all of it down again.

    ports ─► guard ─► packages, model files ─► Ray ─► Serve: Valkey, replicas, ingress ─► ready ─► watch ─► drain, stop

Exit codes: 0 stopped as asked, 1 a step failed, 2 the configuration cannot be used, 130 killed by a second signal.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

import psutil
from rich.console import Console

from configs import check
from configs.errors import ConfigError
from configs.runtime import Runtime
from configs.schema import Config
from ops import guard, ray_cluster
from ops.instance import Instance, find_instance, own_start_time
from ops.memory import beyond_memory
from ops.processes import Family, adopt_orphans
from ops.progress import Progress
from ops.ray_cluster import RayPlan, RayStartError
from ops.serving import Serving, StartFailedError, first_request

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
KILL_GRACE_S = 3.0
HEAD_PROCESSES = ("gcs_server", "raylet")


class StopRequested(BaseException):
    """The first SIGINT, SIGTERM or SIGHUP; raised in the main thread wherever that is. Like KeyboardInterrupt."""


@dataclass(frozen=True, slots=True)
class ServeOptions:
    """How to run, as opposed to what. `start_timeout_s` bounds the wait for replicas and ingress together."""

    console: Console = field(default_factory=Console)
    start_timeout_s: float = 600.0


def run(config: Config, options: ServeOptions | None = None) -> int:
    """Serves a profile until asked to stop; returns the exit code.

    Belongs in the main thread of a process of its own, in which ray is not imported yet: it sets signal handlers,
    adopts orphans and sets Ray's environment. Raises ConfigError (exit code 2) before anything is started.
    """
    options = options or ServeOptions()
    runtime = Runtime.from_config(config, os.environ, secrets.token_bytes)
    preflight(config, runtime)
    return Supervisor(config, runtime, options).run()


def preflight(config: Config, runtime: Runtime) -> None:
    """What can be known to fail before anything starts. Raises ConfigError."""
    running = find_instance(runtime.run_dir)
    if running is not None:
        raise ConfigError(f"process {running.pid} already serves this at {running.url}", key=("http", "port"))
    private = config.ray.address == "local"  # elsewhere the port may well be held by the Serve we are joining
    if private and (reason := ray_cluster.port_problem(config)) is not None:
        raise ConfigError(reason, key=("http", "port"))
    for problem in check.missing_models(config, runtime.home):
        raise ConfigError(problem.reason, key=problem.key)
    if private:  # elsewhere the replicas' machines are not this one
        beyond = beyond_memory(config, runtime.home, psutil.virtual_memory().total)
        if beyond is not None:
            raise ConfigError(beyond.reason, key=beyond.key)
        for problem in check.broken_adapters(config):
            raise ConfigError(problem.reason, key=problem.key)
    if config.ray.haproxy == "on" and not sys.platform.startswith("linux"):
        raise ConfigError("HAProxy mode needs Linux", key=("ray", "haproxy"))


@dataclass(slots=True)
class Supervisor:
    """One run. Everything it starts is in `family`; nothing else is ever signalled."""

    config: Config
    runtime: Runtime
    options: ServeOptions
    progress: Progress = field(init=False)
    serving: Serving = field(init=False)
    family: Family = field(init=False)
    stopping: bool = False
    head: list[psutil.Process] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.progress = Progress(self.options.console)
        self.serving = Serving(self.config, self.runtime, self.progress)

    def run(self) -> int:
        """The whole life; returns the exit code."""
        plan = ray_cluster.plan_cluster(self.config, self.runtime, ray_cluster.RayPorts.draw())
        self.runtime.prepare()
        with guarded(guard.Mark(str(self.runtime.run_dir), str(plan.folder))):
            adopt_orphans()
            self.family = Family()
            code = self._live(plan)
        self._tidy(plan, keep_logs=code != 0)
        return code

    def _live(self, plan: RayPlan) -> int:
        with contextlib.ExitStack() as redirected:
            # Ray prints what it thinks of dying workers to stdout, whatever it is told.
            self.progress.console.file = self.progress.console.file  # pins it to the stdout of now
            messages = redirected.enter_context((self.runtime.run_dir / "ray.log").open("w"))
            redirected.enter_context(contextlib.redirect_stdout(messages))
            code = self._supervise(plan)
        return code

    def _supervise(self, plan: RayPlan) -> int:
        self._listen()
        try:
            self._start(plan)
            self.serving.watch(self._head_is_well)
        except (StopRequested, SystemExit):  # ray.init has SIGTERM raise SystemExit while it runs
            return 0
        except Exception as error:
            if self.stopping:  # the signal came to light as some other error inside Ray
                return 0
            if not isinstance(error, (StartFailedError, RayStartError)):
                raise
            self.progress.say(str(error), "red")
            self.progress.say(f"logs: {self.runtime.run_dir / 'logs'}")
            return 1
        finally:
            self.stopping = True  # from here a signal kills
            self._listen()
            self._stop()

    def _start(self, plan: RayPlan) -> None:
        self._record(ready=False)
        with self.progress.step("packages") as step:
            step.tell(self.serving.packages())
        with self.progress.step("models") as step:
            step.tell(self.serving.model_files())
        with self.progress.step("ray") as step:
            self._start_ray(plan, step.tell)
        self.serving.deploy(self.options.start_timeout_s)
        self._record(ready=True)
        url = self.serving.url
        logs = self.runtime.run_dir / "logs"
        self.progress.say(f"\n{url} is ready (docs: {url}/docs, logs: {logs}); Ctrl-C stops it. Try:\n")
        self.progress.say(f"{first_request(self.config, url)}\n")

    def _start_ray(self, plan: RayPlan, tell: Callable[[str], None]) -> None:
        logs = self.runtime.run_dir / "logs"
        if self.config.ray.address == "local":
            ray_cluster.prepare_folder(plan)
            logs.unlink(missing_ok=True)
            logs.symlink_to(plan.logs)
            proxy = "HAProxy" if ray_cluster.uses_haproxy(self.config) else "Serve's own proxy"
            tell(f"at {ray_cluster.start_cluster(plan)}, {proxy}")
            self.head = [p for p in psutil.Process().children() if p.name() in HEAD_PROCESSES]
        else:
            tell(f"at {ray_cluster.join_cluster(self.config.ray.address)}")
        self._listen()  # ray.init took SIGTERM for itself

    def head_is_alive(self) -> bool:
        """Whether Ray's own processes still run, as far as this process started them."""
        return all(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in self.head)

    def _head_is_well(self) -> bool:
        self.family.reap()  # adopted orphans that ended
        return self.head_is_alive()

    def _stop(self) -> None:
        with self.progress.step("stopping") as step:
            with contextlib.suppress(Exception):  # whatever Ray says now, what it started ends below
                if self.head_is_alive():
                    step.tell("draining")
                    self.serving.drain()
            ray_cluster.stop_cluster()
            killed = self.family.end(KILL_GRACE_S)
            step.tell(f"had to kill {killed}" if killed else "")

    def _listen(self) -> None:
        for signum in STOP_SIGNALS:
            signal.signal(signum, self._on_signal)

    def _on_signal(self, _signum: int, _frame: FrameType | None) -> None:
        if self.stopping:
            self.family.kill()
            os._exit(130)  # the guard sees the pipe close and looks for what is left
        self.stopping = True
        raise StopRequested

    def _record(self, *, ready: bool) -> None:
        Instance(
            pid=os.getpid(),
            started=own_start_time(),
            instance=self.runtime.instance,
            url=self.serving.url,
            models=tuple(model.id for model in self.config.models),
            run_dir=str(self.runtime.run_dir),
            logs=str(self.runtime.run_dir / "logs"),
            ready=ready,
            cluster=self.config.cluster,
            redis_url=self.runtime.redis_url,
            local_models=_local_models(self.config),
        ).write()

    def _tidy(self, plan: RayPlan, *, keep_logs: bool) -> None:
        if keep_logs:
            (self.runtime.run_dir / "instance.json").unlink(missing_ok=True)
            return
        shutil.rmtree(plan.folder, ignore_errors=True)
        shutil.rmtree(self.runtime.run_dir, ignore_errors=True)


def _local_models(config: Config) -> tuple[str, ...]:
    if config.ray.address != "local":
        return ()
    read = {group.model for group in config.groups if group.engine.kind in ("native", "vllm")}
    return tuple(model.id for model in config.models if model.id in read)


@contextlib.contextmanager
def guarded(mark: guard.Mark) -> Iterator[None]:
    """Ends an earlier run's leftovers now, and this run's should this process be killed (`ops.guard`; Linux)."""
    if not sys.platform.startswith("linux"):
        yield
        return
    guard.sweep(mark)
    command = [sys.executable, "-I", "-S", guard.__file__, mark.run_dir, mark.ray_dir]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True):
        yield  # leaving closes the pipe and waits
