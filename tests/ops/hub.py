"""A hub on loopback, as far as a pull needs it, that can break off in the middle of a file."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

COMMIT = "c" * 40


@dataclass
class FakeHub:
    """Serves one model's files at `url`. `stall_after`: bytes of a safetensors file after which nothing more comes,
    until `release` is set. `wrong_checksum`: the file whose checksum is announced falsely. `sent`: bytes of bodies."""

    files: Mapping[str, bytes]
    stall_after: int | None = None
    wrong_checksum: str = ""
    status: int = 200
    release: threading.Event = field(default_factory=threading.Event)
    stalled: threading.Event = field(default_factory=threading.Event)
    requests: list[tuple[str, str, str]] = field(default_factory=list)

    def __enter__(self) -> FakeHub:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, format: str, *args: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        path = urlsplit(request.path).path
        self.requests.append((request.command, path, request.headers.get("range", "")))
        if self.status != 200:
            self._send(request, self.status, b'{"error": "no"}', {})
        elif path.startswith("/api/models/"):
            self._send(request, 200, json.dumps(self._info(path)).encode(), {"content-type": "application/json"})
        else:
            self._file(request, path.rpartition("/")[2])

    def _info(self, path: str) -> dict[str, object]:
        return {
            "id": path.removeprefix("/api/models/"),
            "sha": COMMIT,
            "siblings": [self._sibling(n) for n in self.files],
        }

    def _sibling(self, name: str) -> dict[str, object]:
        content = self.files[name] + (b"!" if name == self.wrong_checksum else b"")
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content, usedforsecurity=False).hexdigest()
        found: dict[str, object] = {"rfilename": name, "size": len(self.files[name]), "blobId": blob}
        if name.endswith(".safetensors"):
            digest = hashlib.sha256(content).hexdigest()
            found["lfs"] = {"sha256": digest, "size": len(self.files[name]), "pointerSize": 100}
        return found

    def _file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        if name not in self.files:
            self._send(request, 404, b"", {"x-error-code": "EntryNotFound"})
            return
        content = self.files[name]
        headers = {
            "etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "x-repo-commit": COMMIT,
            "accept-ranges": "bytes",
        }
        start = int(request.headers.get("range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        if start:
            headers["content-range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(request, 206 if start else 200, content[start:], headers, stall=name.endswith(".safetensors"))

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: Mapping[str, str],
        *,
        stall: bool = False,
    ) -> None:
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        if request.command == "HEAD":
            return
        if stall and self.stall_after is not None and not self.release.is_set():
            request.wfile.write(body[: self.stall_after])
            request.wfile.flush()
            self.stalled.set()
            self.release.wait(60)
            request.close_connection = True
            return
        request.wfile.write(body)
