"""Kernels are compiled once, by one process of many, and what cannot run here is not kept."""

from __future__ import annotations

import ctypes
import logging
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from configs.runtime import home_dir
from replicas.engine import kernels
from replicas.engine.kernels.build import BuildError, build, find_compiler, load_kernels

KERNELS = Path(kernels.__file__).parent
SCRIPT = """#!/bin/sh
echo "$@" >> {log}
{extra}
while [ $# -gt 0 ]; do [ "$1" = -o ] && out=$2; shift; done
sleep {sleep_s}
cp {library} "$out"
"""


@dataclass
class Compiler:
    """A compiler that takes its time and always makes the same library."""

    folder: Path
    library: Path

    @property
    def log(self) -> Path:
        return self.folder / "calls"

    def env(self, sleep_s: float = 0, extra: str = "") -> dict[str, str]:
        script = self.folder / "fake-c++"
        words = SCRIPT.format(log=self.log, library=self.library, sleep_s=sleep_s, extra=extra)
        script.write_text(words)
        script.chmod(0o755)
        return {"CXX": str(script), "PATH": os.environ["PATH"]}

    @property
    def num_links(self) -> int:
        return self.log.read_text().count("-shared") if self.log.exists() else 0


@pytest.fixture(scope="session")
def real_library() -> Path:
    if find_compiler(os.environ) is None:
        pytest.skip("no C++ compiler here")
    return build(home_dir(os.environ) / "kernels", os.environ)


@pytest.fixture
def compiler(tmp_path: Path, real_library: Path) -> Compiler:
    return Compiler(tmp_path, real_library)


def test_a_library_is_compiled_once_and_found_again(compiler: Compiler, tmp_path: Path) -> None:
    env = compiler.env()
    first = build(tmp_path / "cache", env)
    assert build(tmp_path / "cache", env) == first
    assert compiler.num_links == 1
    assert sorted(path.name for path in (tmp_path / "cache").iterdir()) == [".lock", first.name]


def test_of_processes_that_start_together_one_compiles(compiler: Compiler, tmp_path: Path) -> None:
    env = {**os.environ, **compiler.env(sleep_s=0.3)}
    code = (
        "import os, sys; from pathlib import Path; from replicas.engine.kernels.build import load_kernels;"
        "sys.exit(load_kernels(Path(sys.argv[1]), os.environ) is None)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache")]
    processes = [subprocess.Popen(command, env=env) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    assert compiler.num_links == 1


def test_a_compiler_without_openmp_is_asked_without_it(compiler: Compiler, tmp_path: Path) -> None:
    env = compiler.env(extra='case "$*" in *-fopenmp*) echo "error: no omp.h" >&2; exit 1;; esac')
    assert build(tmp_path / "cache", env).is_file()


def test_a_compiler_that_fails_is_quoted_and_leaves_nothing(compiler: Compiler, tmp_path: Path) -> None:
    env = compiler.env(extra='echo "x.cpp:1: error: no such thing" >&2; exit 1')
    with pytest.raises(BuildError, match=r"fake-c\+\+ cannot compile the kernels: x\.cpp:1: error: no such thing"):
        build(tmp_path / "cache", env)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("content", [b"no library", b""])
def test_a_library_that_does_not_run_here_is_not_kept(content: bytes, compiler: Compiler, tmp_path: Path) -> None:
    compiler.library = tmp_path / "broken.so"
    compiler.library.write_bytes(content)
    with pytest.raises(BuildError, match="does not run here"):
        build(tmp_path / "cache", compiler.env())
    assert [path.name for path in (tmp_path / "cache").iterdir()] == [".lock"]


@pytest.mark.parametrize("env", [{"PATH": ""}, {"CXX": "no-such-compiler", "PATH": os.environ["PATH"]}])
def test_without_a_compiler_the_log_says_so(
    env: dict[str, str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        assert load_kernels(tmp_path, env) is None
    assert "no compiled kernels, torch's own operators are used" in caplog.text
    assert "no C++ compiler" in caplog.text


def test_a_cache_that_cannot_be_written_is_no_reason_to_fail(
    compiler: Compiler, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    assert load_kernels(tmp_path / "file" / "cache", compiler.env()) is None
    assert "no compiled kernels" in caplog.text


HALVES = """
#include "simd.h"
extern "C" void to_halves(const float* from, uint16_t* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = float_to_half(from[i]);
}
extern "C" void from_halves(const uint16_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; i++) to[i] = half_to_float(from[i]);
}
"""


@pytest.mark.parametrize("flag", ["-mno-f16c", "-march=native"])
def test_halves_are_rounded_right_with_and_without_instructions_for_them(flag: str, tmp_path: Path) -> None:
    compiler = find_compiler(os.environ)
    if compiler is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler for x86")
    (tmp_path / "halves.cpp").write_text(HALVES)
    made = tmp_path / "halves.so"
    command = [compiler, "-std=c++17", "-O2", flag, "-w", "-fPIC", "-shared", f"-I{KERNELS}"]
    subprocess.run([*command, str(tmp_path / "halves.cpp"), "-o", str(made)], check=True)
    library = ctypes.CDLL(str(made))
    halves = torch.arange(2**16).to(torch.uint16).view(torch.float16)
    floats = torch.empty(len(halves))
    library.from_halves(*map(ctypes.c_void_p, (halves.data_ptr(), floats.data_ptr())), ctypes.c_int64(len(halves)))
    assert torch.equal(floats.nan_to_num(7e7), halves.float().nan_to_num(7e7))
    numbers = floats[floats.isfinite()].sort().values
    between = ((numbers[1:].double() + numbers[:-1].double()) / 2).float()  # ties, and floats beside them
    large = torch.tensor([65519.99, 65520.0, 1e9, float("inf"), float("nan"), 1e-30])
    asked = torch.cat([numbers, between, large])
    asked = torch.cat([asked, asked * (1 + 2**-23), asked * (1 - 2**-23), -asked])
    found = torch.empty(len(asked), dtype=torch.float16)
    library.to_halves(*map(ctypes.c_void_p, (asked.data_ptr(), found.data_ptr())), ctypes.c_int64(len(asked)))
    assert torch.equal(found.isnan(), asked.isnan())
    assert torch.equal(found.nan_to_num(0), asked.half().nan_to_num(0))


def test_no_kernel_needs_a_type_for_halves() -> None:
    """GCC has `_Float16` in C++ from 13 on for ARM: one source that names it would take all kernels away."""
    for source in (*KERNELS.glob("*.cpp"), *KERNELS.glob("*.h")):
        assert "_Float16" not in source.read_text(), source.name
