"""What lies at a URL: which sub-folders are adapters, and copies of one adapter's two files. Blocks; bounded in time.

Credentials and addresses of object stores come from the environment, as their libraries read it (`AWS_…`).
"""

from __future__ import annotations

import contextlib
import os
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import fsspec
from fsspec.asyn import AsyncFileSystem, sync
from fsspec.callbacks import Callback

from configs.adapters.place import Remote, Roots
from configs.lora import CONFIG, MAX_CONFIG_BYTES, WEIGHTS, LoraError

PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs"}
"""What fsspec needs besides itself."""

MAX_OBJECTS = 1_000_000
"""A listing longer than this is no folder of adapters."""

_FILES = (CONFIG, WEIGHTS)
_MARKS = ("ETag", "etag", "md5Hash", "mtime", "LastModified", "last_modified", "updated", "generation")
"""What stores call that which changes with an object's content."""

_CHUNK = 1 << 20


class UnreachableError(OSError):
    """The place cannot be read now; that says nothing about what is there."""


@dataclass(frozen=True, slots=True)
class Look:
    """What was there: the fingerprint of each adapter's files by folder name. `identity`: of the folder looked into,
    where it has one."""

    folders: Mapping[str, str]
    identity: str = ""


def look(source: Remote, timeout_s: float) -> Look:
    """Which sub-folders hold a checkpoint's files. Raises UnreachableError; no folder at all is one, too."""
    if source.folder is not None:
        return _look_at_folder(source.folder)
    with _reaching(source):
        fs, path = _store(source)
        fs.invalidate_cache()
        found: dict[str, Any] = _call(fs, "find", timeout_s, path, detail=True)
        if not found and not _call(fs, "exists", timeout_s, path.partition("/")[0]):
            raise UnreachableError(f"{source} is not there")
    if len(found) > MAX_OBJECTS:
        raise UnreachableError(f"{source} has {len(found)} objects: that is no folder of adapters")
    return Look(_grouped((name.removeprefix(f"{path}/"), info) for name, info in found.items()))


def fetch(place: Remote, to: Path, bounds: FetchBounds) -> None:
    """Copies the two files into a folder that is there. Raises LoraError (what is there is no adapter, or too large),
    UnreachableError."""
    if place.folder is not None:
        bounds.roots.check(place)
        for name in _FILES:
            inside = partial(bounds.roots.check_opened, place)
            _copy(place.folder / name, to / name, bounds.of(name), inside)
        return
    with _reaching(place):
        fs, path = _store(place)
        fs.invalidate_cache()
        for name in _FILES:
            _download(fs, f"{path}/{name}", to / name, bounds.of(name))


@dataclass(frozen=True, slots=True)
class Bound:
    """Of one file: bytes, and seconds to fetch it."""

    max_bytes: int
    timeout_s: float

    def check(self, num_bytes: int, what: object) -> None:
        """Raises LoraError."""
        if num_bytes > self.max_bytes:
            raise LoraError(f"{what} has {num_bytes} bytes, the most is {self.max_bytes}")


@dataclass(frozen=True, slots=True)
class FetchBounds:
    """Of one adapter. `roots`: what a folder must lie within."""

    max_bytes: int
    timeout_s: float
    roots: Roots

    def of(self, name: str) -> Bound:
        return Bound(self.max_bytes if name == WEIGHTS else MAX_CONFIG_BYTES, self.timeout_s)


# Folders of this machine.


def _look_at_folder(root: Path) -> Look:
    try:
        about = root.stat()
        folders: dict[str, str] = {}
        with os.scandir(root) as entries:
            for entry in entries:
                if not entry.name.startswith("."):
                    marks = _marks_in(Path(entry.path))
                    if marks:
                        folders[_shown(entry.name)] = marks
    except (OSError, ValueError) as error:
        raise UnreachableError(f"file://{root} cannot be read: {_reason(error)}") from error
    return Look(folders, f"{about.st_dev}:{about.st_ino}")


def _marks_in(folder: Path) -> str:
    """What changes with a checkpoint's files; empty where there is none. Files that are there and cannot be looked at
    now are no reason to believe that there are none."""
    marks = []
    for name in _FILES:
        try:
            about = (folder / name).stat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            marks.append(f"{name} cannot be looked at: {_reason(error)}")
        else:
            marks.append(f"{name} {about.st_size} {about.st_mtime_ns} {about.st_ino}")
    return "; ".join(marks)


def _shown(name: str) -> str:
    """A file's name as text, whatever its bytes."""
    return name.encode(errors="surrogateescape").decode(errors="replace")


def _copy(path: Path, to: Path, bound: Bound, inside: Callable[[int], None]) -> None:
    """Copies a plain file, and not one byte more than there may be. `inside` is asked about the open file."""
    try:
        with open(path, "rb", opener=_open_now) as source, to.open("wb") as target:
            inside(source.fileno())
            about = os.fstat(source.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise LoraError(f"{path} is no file")
            bound.check(about.st_size, path)
            num_bytes, until = 0, time.monotonic() + bound.timeout_s
            while chunk := source.read(_CHUNK):
                num_bytes += len(chunk)
                bound.check(num_bytes, path)
                target.write(chunk)
                if time.monotonic() > until:
                    raise UnreachableError(f"{path} was not read within {bound.timeout_s:g} s")
    except FileNotFoundError as error:
        raise LoraError(f"{path} is missing{_instead(path.parent.glob('adapter_model.*'))}") from error
    except IsADirectoryError as error:
        raise LoraError(f"{path} is no file") from error
    except OSError as error:
        raise UnreachableError(f"{path} cannot be read: {_reason(error)}") from error


def _open_now(path: str, flags: int) -> int:
    """A pipe without a writer must not hold us."""
    return os.open(path, flags | os.O_NONBLOCK)


# Object stores.


def _store(place: Remote) -> tuple[Any, str]:
    """fsspec's file system, and the path in it. Raises LoraError where its package is missing."""
    try:
        fs = fsspec.filesystem(place.protocol)
    except ImportError as error:
        package = PACKAGES.get(place.protocol, "fsspec's package for it")
        raise LoraError(f"{place.protocol}:// needs {package}: it is not installed here") from error
    return fs, str(fs._strip_protocol(place.url)).rstrip("/")


def _call(fs: Any, name: str, timeout_s: float, *arguments: Any, **named: Any) -> Any:
    """A method of a file system's, given up after a while where the file system can do that."""
    if isinstance(fs, AsyncFileSystem):
        return sync(fs.loop, getattr(fs, f"_{name}"), *arguments, timeout=timeout_s, **named)
    return getattr(fs, name)(*arguments, **named)


def _grouped(objects: Iterable[tuple[str, Mapping[str, Any]]]) -> dict[str, str]:
    """Fingerprints by sub-folder. `objects`: path below the source, and what the store says of it."""
    marks: dict[str, dict[str, str]] = {}
    for path, info in objects:
        folder, _, name = path.partition("/")
        if name in _FILES and not folder.startswith("."):
            changing = " ".join(str(info[key]) for key in _MARKS if info.get(key))
            marks.setdefault(folder, {})[name] = f"{name} {info.get('size')} {changing}"
    return {folder: "; ".join(files[name] for name in _FILES if name in files) for folder, files in marks.items()}


def _download(fs: Any, path: str, to: Path, bound: Bound) -> None:
    try:
        info = _call(fs, "info", bound.timeout_s, path)
    except FileNotFoundError as error:
        folder = path.rpartition("/")[0]
        with contextlib.suppress(OSError):
            names = _call(fs, "find", bound.timeout_s, folder, prefix="adapter_model.")
            raise LoraError(f"{path} is missing{_instead(map(Path, names))}") from error
        raise LoraError(f"{path} is missing") from error
    bound.check(int(info.get("size") or 0), path)
    _call(fs, "get_file", bound.timeout_s, path, str(to), callback=_Counting(bound, path))
    bound.check(to.stat().st_size, path)


class _Counting(Callback):
    """Ends a download that brings more than there may be."""

    def __init__(self, bound: Bound, what: str) -> None:
        super().__init__()
        self._bound = bound
        self._what = what

    def relative_update(self, inc: int = 1) -> None:
        super().relative_update(inc)
        self._bound.check(self.value, self._what)


@contextlib.contextmanager
def _reaching(place: Remote) -> Iterator[None]:
    """Whatever an object store's library raises means that it cannot be reached; errors of ours go through."""
    try:
        yield
    except (LoraError, UnreachableError):
        raise
    except Exception as error:
        raise UnreachableError(f"{place} cannot be read: {_reason(error)}") from error


def _instead(paths: Iterable[Path]) -> str:
    others = sorted(path.name for path in paths if path.name != WEIGHTS)
    return f"; {', '.join(others)} cannot be served: save it as safetensors" if others else ""


def _reason(error: BaseException) -> str:
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(str(words).split())[:300]
