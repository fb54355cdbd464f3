"""Where an adapter's files lie: a folder that is read in place, or a URL that is fetched first; and whether they may.

/adapters/pirate            the folder itself, on the machine of whoever reads it
file:///adapters/pirate     copied, so that the version goes on being served when the folder changes
s3://bucket/adapters/pirate fetched from an object store, through fsspec
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote

from configs.lora import CONFIG, WEIGHTS, LoraError, lora_folder

STORES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "oss", "oci")
"""Object stores of fsspec's. Its other protocols read this machine, or whatever an address says."""

_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)
_PLAIN = re.compile(r"[^\s?#*\[\]\\\x00-\x1f]+")
"""No queries, no patterns, nothing invisible."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine, absolute."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class Remote:
    """What has to be fetched. `folder`: of a `file://` URL, the folder that is copied."""

    url: str
    protocol: str
    folder: Path | None = None

    def __str__(self) -> str:
        return self.url

    def child(self, name: str) -> Remote:
        """A sub-folder."""
        folder = None if self.folder is None else self.folder / name
        return Remote(f"{self.url}/{name}", self.protocol, folder)

    def holds(self, url: str) -> bool:
        """Whether a URL lies within this one."""
        return url == self.url or url.startswith(f"{self.url}/")


Place: TypeAlias = Folder | Remote


def is_url(path: str) -> bool:
    return _URL.match(path) is not None


def place_of(path: str) -> Place:
    """What a path or URL means, `~` expanded. Raises LoraError for one that means nothing, or that nobody may read."""
    found = _URL.fullmatch(path)
    if found is None:
        folder = lora_folder(path)
        if not path or not folder.is_absolute():
            raise LoraError(
                f"needs an absolute path or a URL, replicas have working folders of their own; got {path!r}"
            )
        return Folder(folder)
    protocol, rest = found[1], found[2].rstrip("/")
    if protocol == "file":
        return _file(unquote(rest), path)
    if protocol not in STORES:
        raise LoraError(f"{protocol}:// cannot be read; there are file, {', '.join(STORES)}")
    if not _PLAIN.fullmatch(rest) or "::" in rest or _leaves(rest.split("/")):
        raise LoraError(f"{without_secrets(path)!r} is no plain URL of a folder")
    if ":" in rest.partition("/")[0]:
        raise LoraError("a URL must hold neither password nor port: both come from the environment of the processes")
    return Remote(f"{protocol}://{rest}", protocol)


def _file(folder: str, path: str) -> Remote:
    if not folder.startswith("/") or _leaves(folder.split("/")[1:]) or "\x00" in folder:
        raise LoraError(f"expected file:///an/absolute/folder, got {path!r}")
    return Remote(f"file://{folder}", "file", Path(folder))


def _leaves(parts: Iterable[str]) -> bool:
    """Whether a path has parts that are no names."""
    return any(part in ("", ".", "..") for part in parts)


def without_secrets(url: str) -> str:
    """A URL without the user and password in it."""
    if "://" not in url:
        return url
    protocol, _, rest = url.partition("://")
    host, slash, path = rest.partition("/")
    return f"{protocol}://{host.rpartition('@')[2]}{slash}{path}"


class OutsideError(LoraError):
    """Files that lie where adapters may not; the message says nothing of what is there."""


@dataclass(frozen=True, slots=True)
class Roots:
    """What files of adapters must lie within, links resolved; without any, they may lie anywhere. `words`: what the
    roots are called in errors."""

    places: tuple[Place, ...] = ()
    words: str = "adapter_files.roots"

    def check(self, place: Place) -> None:
        """Raises OutsideError. Looks at the links of folder and files; what is not there is judged by its name."""
        if not self.places:
            return
        folder = place.path if isinstance(place, Folder) else place.folder
        if folder is None:
            if not any(isinstance(root, Remote) and root.holds(str(place)) for root in self.places):
                raise self._outside(place)
            return
        for path in (folder, folder / CONFIG, folder / WEIGHTS):
            self._check_real(_resolved(path), place)

    def check_opened(self, place: Place, descriptor: int) -> None:
        """The same of a file that is open, where the system says what it is: links may have changed since `check`.
        Raises OutsideError."""
        opened = Path(f"/proc/self/fd/{descriptor}")
        if self.places and opened.exists():
            self._check_real(_resolved(opened), place)

    def _check_real(self, real: Path, place: Place) -> None:
        roots = [root.path if isinstance(root, Folder) else root.folder for root in self.places]
        if not any(real.is_relative_to(_resolved(root)) for root in roots if root is not None):
            raise self._outside(place)

    def _outside(self, place: Place) -> OutsideError:
        return OutsideError(f"{place} does not lie within {self.words} (links resolved), as adapters must")


def _resolved(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links leads nowhere
        return Path("/dev/null/nowhere")
