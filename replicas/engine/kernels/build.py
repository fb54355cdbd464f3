"""Compiles the C++ beside this file at first use, and keeps what came out.

Some 13 seconds of a CPU, for exactly this processor. The result lies in a cache under a name made of the sources, the
flags, the compiler and the processor, so that a home folder shared by different machines works. Of processes that
start together one compiles and the others wait for it; a library is tried in a process of its own before it gets its
name, by a rename. Without a compiler everything runs on torch's own operators, slower.
"""

from __future__ import annotations

import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from replicas.engine.kernels.library import Kernels

logger = logging.getLogger(__name__)

_HERE = Path(__file__).parent
_SOURCES = ("linear.cpp", "integers.cpp", "floats.cpp", "attention.cpp", "activations.cpp", "lora.cpp")
_HEADERS = ("simd.h", "matrix.h")
_COMPILERS = ("c++", "g++", "clang++")
_BUILD_S = 120
_TRIAL_S = 60
_NATIVE = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
_FLAGS = ("-std=c++17", "-O3", _NATIVE, "-ffp-contract=fast", "-fno-math-errno", "-fPIC", "-w")

# Loads a library and computes with it: a root mean square norm of eight twos, which is eight ones.
_TRIAL = """
import ctypes, sys
x, w, y = ((ctypes.c_float * 8)(*[v] * 8) for v in (2, 1, 0))
norm = ctypes.CDLL(sys.argv[1]).warmgate_rms_norm
norm.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2 + [ctypes.c_float]
norm(x, w, y, 1, 8, 0.0)
sys.exit(any(abs(v - 1) > 1e-5 for v in y))
"""


class BuildError(Exception):
    """The kernels cannot be built or loaded here. One line."""


def load_kernels(cache: Path, env: Mapping[str, str]) -> Kernels | None:
    """The kernels of this machine, built if need be; None, and a line in the log, where that cannot be done."""
    try:
        return Kernels(build(cache, env))
    except (BuildError, OSError, AttributeError) as error:
        logger.warning("no compiled kernels, torch's own operators are used, which are slower: %s", error)
        return None


def build(cache: Path, env: Mapping[str, str]) -> Path:
    """The shared library in `cache`, compiled when it is not there. Raises BuildError, OSError."""
    compiler = find_compiler(env)
    if compiler is None:
        raise BuildError(f"no C++ compiler: neither CXX nor any of {', '.join(_COMPILERS)} is found")
    target = cache / f"warmgate-{_fingerprint(compiler)}.so"
    if not target.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with _alone(cache):
            if not target.is_file():  # another process may have been first
                logger.info("compiling kernels for this processor, once: some 15 seconds")
                _make(compiler, target)
    return target


def find_compiler(env: Mapping[str, str]) -> str | None:
    """The C++ compiler that `CXX` names, else the first of the usual ones on the path."""
    wanted = env.get("CXX")
    names = (wanted,) if wanted else _COMPILERS
    return next((path for name in names if (path := shutil.which(name, path=env.get("PATH")))), None)


@contextmanager
def _alone(cache: Path) -> Iterator[None]:
    """One process at a time; the system takes the lock from one that dies. Where files cannot be locked all may build:
    then the last rename stays."""
    with (cache / ".lock").open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(compiler: str, target: Path) -> None:
    """Compiles, tries and names the library. Raises BuildError."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as folder:
        made = Path(folder) / target.name
        problem = _compile(compiler, made, "-fopenmp")
        if problem:  # some compilers come without OpenMP's runtime: one thread then
            problem = _compile(compiler, made)
        if problem:
            raise BuildError(f"{compiler} cannot compile the kernels: {problem}")
        problem = _run((sys.executable, "-c", _TRIAL, str(made)), _TRIAL_S)
        if problem:
            raise BuildError(f"what {compiler} made of the kernels does not run here: {problem}")
        os.replace(made, target)


def _compile(compiler: str, target: Path, *flags: str) -> str:
    """Compiles and links; returns the first line of a complaint, empty when there is none."""
    objects = [target.parent / f"{name}.o" for name in _SOURCES]
    commands = [
        (compiler, *_FLAGS, *flags, "-c", str(_HERE / name), "-o", str(made))
        for name, made in zip(_SOURCES, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        complaints = [words for words in pool.map(lambda command: _run(command, _BUILD_S), commands) if words]
    if complaints:
        return complaints[0]
    return _run((compiler, *_FLAGS, *flags, "-shared", *map(str, objects), "-o", str(target)), _BUILD_S)


def _run(command: Sequence[str], limit_s: float) -> str:
    """Runs a command; returns the first line of its complaint, empty when it went well."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_s, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
    return lines[0] if lines else f"exit status {done.returncode}"


def _fingerprint(compiler: str) -> str:
    """Changes with anything that the library depends on."""
    digest = hashlib.sha256()
    for name in (*_SOURCES, *_HEADERS):
        digest.update((_HERE / name).read_bytes())
    found = os.stat(compiler)
    for part in (*_FLAGS, compiler, found.st_size, found.st_mtime_ns, platform.machine(), *_processor()):
        digest.update(f"{part}\n".encode())
    return digest.hexdigest()[:16]


def _processor() -> tuple[str, ...]:
    """What this processor is and can do, where the system tells."""
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        return (platform.processor(),)
    wanted = ("model name", "flags", "Features", "CPU part")
    lines = path.read_text().partition("\n\n")[0].splitlines()  # the first processor's
    return tuple(line for line in lines if line.startswith(wanted))
