"""The record a running instance leaves in its run folder, for `chat`, `doctor` and a second `serve` to find it."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import psutil

RECORD = "instance.json"


class Instance(msgspec.Struct, frozen=True, kw_only=True):
    """One `warmgate serve`. `started`: the supervisor's creation time as the OS tells it, so that a reused pid does
    not count; `ready`: whether it answers yet. `local_models`: those whose replicas run on this machine and read files.
    `redis_url` may hold a password: the record is for its owner's eyes."""

    pid: int
    started: float
    instance: str
    url: str
    models: tuple[str, ...]
    run_dir: str
    logs: str
    ready: bool = False
    cluster: str = ""
    redis_url: str = ""
    local_models: tuple[str, ...] = ()

    @property
    def alive(self) -> bool:
        try:
            return abs(psutil.Process(self.pid).create_time() - self.started) < 0.01
        except psutil.NoSuchProcess:
            return False

    def write(self) -> None:
        """Replaces the record; readers see the old one or the new one, never half of one."""
        path = Path(self.run_dir) / RECORD
        fresh = path.with_suffix(".tmp")
        fresh.touch(mode=0o600)
        fresh.write_bytes(msgspec.json.encode(self))
        fresh.replace(path)


def own_start_time() -> float:
    """When the OS says this process began."""
    return psutil.Process().create_time()


def find_instance(run_dir: Path) -> Instance | None:
    """The live instance of a run folder; None when there is none, or only what a dead one left."""
    try:
        found = msgspec.json.decode((run_dir / RECORD).read_bytes(), type=Instance)
    except (OSError, msgspec.DecodeError):
        return None
    return found if found.alive else None


def find_instances(temp_dir: Path) -> list[Instance]:
    """This user's live instances, the oldest first. `temp_dir`: where run folders are (`tempfile.gettempdir()`)."""
    folders = {temp_dir / f"wg-{os.getuid()}", Path("/tmp") / f"wg-{os.getuid()}"}
    records = {path.resolve() for folder in folders for path in folder.glob(f"*/{RECORD}")}
    found = [instance for path in records if (instance := find_instance(path.parent))]
    return sorted(found, key=lambda i: i.started)
