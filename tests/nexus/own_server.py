"""A program of others as a server of tests: started, ended and started again with what it holds."""

from __future__ import annotations

import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx
from processes import free_port


class OwnServer(ABC):
    """A server over a folder, on a free port."""

    HEALTH: str
    """The path that it answers once it serves, with or without a key."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @abstractmethod
    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        """Its command line and environment."""

    def start(self) -> None:
        """Start, and wait until it answers."""
        command, env = self.command()
        log = self.folder / "log"
        with log.open("ab") as output:
            self._process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=output, stderr=subprocess.STDOUT)
        until = time.monotonic() + 30
        while self._process.poll() is None and time.monotonic() < until:
            try:
                if httpx.get(self.url + self.HEALTH, timeout=2, trust_env=False).status_code in (200, 401):
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.02)
        self.kill()
        raise RuntimeError(f"{command[0]} did not start:\n{log.read_text(errors='replace')[-4_000:]}")

    def stop(self) -> None:
        """End in order."""
        assert self._process is not None
        self._process.terminate()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End at once, whatever it does."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def restart(self, *, kill: bool = False) -> None:
        """End, in order or at once, and start with what it holds."""
        self.kill() if kill else self.stop()
        self.start()
