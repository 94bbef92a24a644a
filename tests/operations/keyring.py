"""Keys for a server that tests talk to, and the clients that have them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from live_server import Server


def text_of(name: str) -> str:
    """The key of a name; tests need no random ones."""
    return f"the-key-of-{name}"


def entry(name: str, *scopes: str, text: str | None = None, **more: object) -> str:
    """The lines of a key in a keys file; ``more`` as TOML has it."""
    digest = hashlib.sha256((text or text_of(name)).encode()).hexdigest()
    lines = ["[[keys]]", f'name = "{name}"', f'sha256 = "{digest}"', f"scopes = {list(scopes)}"]
    return "\n".join([*lines, *(f"{field} = {value}" for field, value in more.items()), ""])


TEAMS = "\n".join(
    [
        entry("red", "export", "read", client="'red'"),
        entry("red-export", "export", client="'red'"),
        entry("red-read", "read", client="'red'"),
        entry("blue", "export", "read", client="'blue'"),
        entry("operator", "admin"),
    ]
)
"""Two clients, keys of one scope each, and somebody who may do all."""


class Keyed:
    """A server with a keys file."""

    def __init__(self, folder: Path, keys: str = TEAMS, **settings: object) -> None:
        self.file = folder / "keys.toml"
        self.file.write_text(keys)
        given = {"keys_file": self.file, "api_key": "", "worker_slots": 1, **settings}
        self.server = Server(folder / "root", **given)

    def as_(self, name: str, text: str | None = None) -> httpx.Client:
        """A client with the key of a name."""
        headers = {"Authorization": f"Bearer {text or text_of(name)}"}
        return httpx.Client(base_url=self.server.url, headers=headers, timeout=60)

    def submit(self, name: str, body: Any) -> str:
        """Post a graph with the key of a name, and answer the job's id."""
        with self.as_(name) as client:
            answer = client.post("/v1/exports", json=body)
        assert answer.status_code == 202, answer.text
        return str(answer.json()["jobId"])

    def finish(self, name: str, job_id: str) -> None:
        """Follow a job to its end."""
        with self.as_(name) as client:
            assert client.get(f"/v1/exports/{job_id}/events/stream").status_code == 200
            assert client.get(f"/v1/exports/{job_id}").json()["status"] == "completed"


@contextmanager
def keyed(folder: Path, keys: str = TEAMS, **settings: object) -> Iterator[Keyed]:
    """A started server with these keys, ended after."""
    found = Keyed(folder, keys, **settings)
    found.server.start()
    try:
        yield found
    finally:
        found.server.close()
