"""Copies of adapters that came from a URL, on this machine: one folder for each digest, shared by all processes.

fetch ─► .fetch-… (nobody looks there) ─► read, digest ─► renamed to its digest ─► served from there ─► least recently
                                                                                    used goes when there are too many
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from configs.adapters.place import Remote
from configs.adapters.remote import FetchBounds, UnreachableError, fetch
from configs.lora import LoraError, LoraFiles, read_lora

KEEP_S = 600.0
"""A copy that was used within this time stays, whatever the bound: some engine may be reading it."""

_PART = ".fetch-"
_DIGEST = re.compile(r"[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Fetched:
    """A checkpoint in the cache, and its digest."""

    files: LoraFiles
    digest: str


class AdapterCache:
    """Blocks. `max_bytes`: what all copies may take, but for those in use; `wall_clock`: Unix seconds, as of files."""

    def __init__(self, folder: Path, max_bytes: int, wall_clock: Callable[[], float] = time.time) -> None:
        self.folder = folder
        self._max_bytes = max_bytes
        self._wall_clock = wall_clock

    def find(self, digest: str) -> LoraFiles | None:
        """The copy of a digest, if there is a sound one; it counts as used."""
        folder = self.folder / digest
        if not _DIGEST.fullmatch(digest) or not folder.is_dir():
            return None
        try:
            files = read_lora(folder)
            if files.digest() == digest:
                os.utime(folder, (self._wall_clock(),) * 2)
                return files
        except (LoraError, OSError):
            pass
        _remove(folder)  # damaged: fetched anew
        return None

    def fetch(self, place: Remote, bounds: FetchBounds, digest: str = "") -> Fetched:
        """Fetches an adapter, and keeps it. With a `digest` it must have that one.

        Raises LoraError (it is no adapter, or another one), UnreachableError, OSError (no room here).
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=self.folder))
        try:
            fetch(place, part, bounds)
            files = _read(part, place)
            found = files.digest()
            if digest and found != digest:
                raise LoraError(f"the files at {place} have changed since it was added: give it a new version")
            kept = self.folder / found
            os.utime(part, (self._wall_clock(),) * 2)
            for _ in range(2):  # a damaged copy in its place goes when it is looked at
                with contextlib.suppress(OSError):  # somebody else was faster: theirs has the same digest
                    part.rename(kept)
                kept_files = self.find(found)
                if kept_files is not None:
                    break
            else:
                raise UnreachableError(f"the copy of {place} is gone again")
        finally:
            _remove(part)
        self.shrink()
        return Fetched(kept_files, found)

    def shrink(self) -> None:
        """Removes copies, the least recently used first, until the rest fits; and what broken fetches left."""
        now = self._wall_clock()
        found: list[tuple[float, int, Path]] = []
        with contextlib.suppress(OSError):
            for folder in self.folder.iterdir():
                with contextlib.suppress(OSError):
                    used_at = folder.stat().st_mtime
                    if folder.name.startswith(_PART) and used_at < now - 6 * KEEP_S:
                        _remove(folder)
                    elif _DIGEST.fullmatch(folder.name):
                        found.append((used_at, sum(f.stat().st_size for f in folder.iterdir()), folder))
        num_bytes = sum(size for _, size, _ in found)
        for used_at, size, folder in sorted(found):
            if num_bytes <= self._max_bytes or used_at > now - KEEP_S:
                return
            gone = folder.with_name(f"{_PART}{folder.name}-{os.getpid()}")
            with contextlib.suppress(OSError):
                folder.rename(gone)  # at once, so that nobody finds half of it
            _remove(gone)
            num_bytes -= size


def _remove(folder: Path) -> None:
    """Whether it is there or not."""
    shutil.rmtree(folder, ignore_errors=True)


def _read(part: Path, place: Remote) -> LoraFiles:
    """What was fetched. Raises LoraError that names the URL, not the folder here."""
    try:
        return read_lora(part)
    except LoraError as error:
        raise LoraError(str(error).replace(str(part), str(place))) from error
