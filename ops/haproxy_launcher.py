"""Starts the HAProxy that Ray Serve asks for, with its configuration made fit for a private instance.

Serve starts HAProxy through RAY_SERVE_HAPROXY_BINARY_PATH; that path is a two-line shell script which calls this file
(standard library only, so it costs some 20 ms):

    haproxy_launcher.py REAL_HAPROXY -db -f CONFIG [-sf PIDS …]

1. A HAProxy whose Serve actor died goes on serving (Ray ends a dead worker's process group: it gets its own) until the
   next actor's takes over (`-sf`, as in a reload: streams finish). Without this the port is dead for 5 s.
2. Statistics and metrics listen on loopback; Serve's template binds all interfaces and has no setting for it.
3. No line per request to UDP 127.0.0.1:514, Serve's default log target.
4. Request headers must arrive within 30 s; the template sets no such limit.
5. What HAProxy answers itself (no ingress: 404 and 503; a broken one: 502; 504) is 503 with an OpenAI error body and
   Retry-After instead of `404` and `500 text/plain`.

What HAProxy cannot read as HTTP it answers in HTML (400; 408 for slow headers): compiled in, below any `errorfile`.
An edit whose line is not found is left out: a later template still starts.
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

HEADER_TIMEOUT_S = 30

_BIND_ALL = re.compile(r"^(\s*bind )\*?:(\d+)\s*$")
_PRIVATE_SECTIONS = ("frontend prometheus", "listen stats")
_LOG_TARGET = re.compile(r"^\s*log \S+ local0 info\s*$")
_NO_BACKEND = re.compile(r"^(\s*)http-request return status 404 .*$")
_ERROR_FILE = re.compile(r"^\s*errorfile 50[234] (\S+)\s*$")


def tightened(template: str) -> str:
    """Serve's generated configuration with edits 2 to 5."""
    out = []
    section = ""
    for line in template.splitlines():
        section = line if line[:1].strip() else section
        if _LOG_TARGET.match(line):
            continue
        line = _NO_BACKEND.sub(r"\1http-request deny deny_status 503", line)
        if section in _PRIVATE_SECTIONS:
            line = _BIND_ALL.sub(r"\g<1>127.0.0.1:\2", line)
        out.append(line)
        if line.strip() == "option abortonclose":
            out.append(f"    timeout http-request {HEADER_TIMEOUT_S}s")
    return "\n".join(out) + "\n"


def error_files(template: str) -> set[Path]:
    """The files whose content HAProxy sends for its own 502, 503 and 504."""
    return {Path(m[1]) for line in template.splitlines() if (m := _ERROR_FILE.match(line))}


def unavailable_response() -> bytes:
    """A whole HTTP response: 503, OpenAI's error body, retry in a second."""
    error = {
        "message": "No gateway process can take this request now; please retry.",
        "type": "service_unavailable_error",
        "param": None,
        "code": "ingress_unavailable",
    }
    body = json.dumps({"error": error}).encode()
    head = (
        "HTTP/1.1 503 Service Unavailable\r\n"
        "Content-Type: application/json\r\n"
        f"Content-Length: {len(body)}\r\n"
        "Retry-After: 1\r\n"
        "Cache-Control: no-store\r\n"
        "\r\n"
    )
    return head.encode() + body


def orphan(config: Path, pid_file: Path) -> int | None:
    """The HAProxy that ran this configuration last, when it still does."""
    try:
        pid = int(pid_file.read_text())
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except (OSError, ValueError):
        return None
    return pid if os.fsencode(config) in words else None


def main(argv: Sequence[str]) -> None:
    """Edits the configuration named by `-f` in place (Serve rewrites it before each start) and becomes HAProxy."""
    binary, *args = argv
    if "-f" in args:
        config = Path(args[args.index("-f") + 1])
        pid_file = config.with_suffix(".pid")
        template = config.read_text()
        for path in error_files(template):
            path.write_bytes(unavailable_response())
        config.write_text(tightened(template))
        before = orphan(config, pid_file)
        if before is not None and "-sf" not in args:
            args += ["-sf", str(before)]
        pid_file.write_text(str(os.getpid()))
    os.setsid()
    os.execv(binary, [binary, *args])


if __name__ == "__main__":
    main(sys.argv[1:])
