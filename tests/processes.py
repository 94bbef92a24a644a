"""The real programs that tests talk to: the command line, our server, a GitNexus server; started and ended here."""

from __future__ import annotations

import os
import pty
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

REPOSITORY = Path(__file__).parents[1]
EXAMPLE = REPOSITORY / "examples" / "memvid-export.graph.ndjson.gz"
COMMAND = Path(sys.executable).parent / "memvid-export"
GITNEXUS = REPOSITORY / ".cache" / "npm" / "node_modules" / ".bin" / "gitnexus"


def command(
    *arguments: object, env: Mapping[str, str] | None = None, stdin: bytes = b"", cwd: Path | None = None
) -> subprocess.CompletedProcess[bytes]:
    """Run ``memvid-export`` to its end; without a key in its environment unless ``env`` has one."""
    return subprocess.run(
        [COMMAND, *map(str, arguments)],
        input=stdin,
        capture_output=True,
        env=_env(env or {}),
        cwd=cwd,
        timeout=240,
        check=False,
    )


@contextmanager
def serving(root: Path, *, key: str | None = None) -> Iterator[str]:
    """Our server on a free port of this machine, as its URL; with ``--dev`` where there is no key."""
    port = free_port()
    env = {"MEMVID_EXPORT_BIND_ADDR": f"127.0.0.1:{port}", "MEMVID_EXPORT_ROOT": str(root)}
    if key:
        env["MEMVID_EXPORT_API_KEY"] = key
    arguments = [COMMAND, "serve"] + ([] if key else ["--dev"])
    url = f"http://127.0.0.1:{port}"
    with running(arguments, root.with_name(root.name + ".log"), _env(env), f"{url}/readyz"):
        yield url


@contextmanager
def gitnexus(repository: Path, home: Path, name: str) -> Iterator[str]:
    """A GitNexus server that has indexed ``repository`` (a git checkout) under ``name``, as its URL."""
    if not GITNEXUS.exists():
        raise FileNotFoundError("GitNexus is not installed; run scripts/setup npm")
    home.mkdir(parents=True, exist_ok=True)
    env = _env({"HOME": str(home), "GITNEXUS_HOME": str(home), "GITNEXUS_LBUG_EXTENSION_INSTALL": "never"})
    subprocess.run(
        [GITNEXUS, "analyze", repository, "--index-only", "--skip-fts", "--name", name],
        env=env,
        check=True,
        capture_output=True,
        timeout=120,
    )
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    arguments = [GITNEXUS, "serve", "--host", "127.0.0.1", "--port", str(port)]
    with running(arguments, home / "serve.log", env, f"{url}/api/health"):
        yield url


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _env(more: Mapping[str, str]) -> dict[str, str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MEMVID_EXPORT_", "GITNEXUS_"))}
    return {**kept, **more}


@contextmanager
def running(
    arguments: Sequence[object], log: Path, env: Mapping[str, str], url: str, *, well: bool = True
) -> Iterator[None]:
    """A program from when it answers at ``url``, with a success if it is to be ``well``, until it is ended here."""
    with log.open("wb") as output:
        process = subprocess.Popen([*map(str, arguments)], stdout=output, stderr=subprocess.STDOUT, env=dict(env))
    try:
        for _ in range(600):
            if process.poll() is not None:
                break
            try:
                if httpx.get(url, timeout=2).is_success or not well:
                    yield
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.05)
        raise RuntimeError(f"{arguments[:2]} did not start:\n{log.read_text(errors='replace')}")
    finally:
        process.terminate()
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def answering(handler: type[BaseHTTPRequestHandler], tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """The URL of a server whose requests ``handler`` answers, each in a thread."""

    class Server(ThreadingHTTPServer):
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that went away is part of the game."""
            if not isinstance(sys.exception(), OSError):
                super().handle_error(request, client_address)

    with Server(("127.0.0.1", 0), handler) as server:
        if tls is not None:
            server.socket = tls.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def on_a_terminal(arguments: Sequence[object], env: Mapping[str, str]) -> tuple[bytes, bytes]:
    """What a program that is run to its end writes to standard output, and what it draws on a terminal, its error
    output."""
    terminal, far_end = pty.openpty()
    with subprocess.Popen([*map(str, arguments)], stdout=subprocess.PIPE, stderr=far_end, env=dict(env)) as process:
        os.close(far_end)
        drawn = bytearray()
        while chunk := _read(terminal):
            drawn += chunk
        stdout, _ = process.communicate()
    os.close(terminal)
    return stdout, bytes(drawn)


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # the other side is closed
        return b""
