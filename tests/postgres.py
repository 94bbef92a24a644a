"""A real PostgreSQL on a free port of this machine, with a fresh database for whoever asks."""

from __future__ import annotations

import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psycopg
import pytest
from processes import free_port

PACKAGE = find_spec("pgserver")  # not imported: it would look for servers of its own
assert PACKAGE is not None
assert PACKAGE.origin is not None
PACKAGES = Path(PACKAGE.origin).parents[1]
QUICK = ("fsync=off", "synchronous_commit=off", "full_page_writes=off")

# Ends the server when told how, or at once, and its files too, when whoever started it is gone.
KEEPER = """
"$@" & server=$!
if read -r signal; then kill -s "$signal" "$server"; wait "$server"; exit 0; fi
kill -s QUIT "$server"; wait "$server"; rm -rf "$0"
"""


class Postgres:
    """One server; can be stopped, or ended as by a crash, and started again on the same port with the same data.

    ``durable=False`` does not wait for the disk: for all tests but those that cut the power.
    """

    def __init__(self, *, durable: bool = False) -> None:
        self._home = Path(tempfile.mkdtemp(prefix="memvid-export-postgres-"))
        self._data = self._home / "data"
        self._log = self._home / "log"
        self._durable = durable
        self.password = secrets.token_hex(16)
        self._keeper: subprocess.Popen[bytes] | None = None
        self._made = 0
        secret = self._home / "password"
        secret.write_text(self.password)
        self._user: dict[str, Any] = {}
        if os.geteuid() == 0:  # PostgreSQL refuses to run as root
            nobody = pwd.getpwnam("nobody")
            self._user = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
            for path in (self._home, secret):
                os.chown(path, nobody.pw_uid, nobody.pw_gid)
        self._bin = self._reachable()
        self._call(
            *(self._bin / "initdb", "-D", self._data, "-U", "postgres", "-E", "UTF8", "--locale=C.UTF-8"),
            *("--no-sync", "--auth=password", f"--pwfile={secret}"),
        )
        self.port = free_port()

    @property
    def programs(self) -> Path:
        """The folder of its programs, pg_dump and pg_restore among them."""
        return self._bin

    def _reachable(self) -> Path:
        """The folder of the server's programs, copied to where its user can reach it if need be."""
        programs = PACKAGES / "pgserver" / "pginstall" / "bin"
        try:
            self._call(programs / "postgres", "--version")
        except PermissionError:
            for name in ("pgserver", "pgserver.libs"):
                shutil.copytree(PACKAGES / name, self._home / name)
            return self._home / programs.relative_to(PACKAGES)
        return programs

    def _call(self, *arguments: object) -> None:
        result = subprocess.run(
            [*map(str, arguments)], **self._user, capture_output=True, cwd=self._home, timeout=60, check=False
        )
        if result.returncode:
            raise RuntimeError(f"{arguments[0]} failed:\n{result.stderr.decode(errors='replace')}")

    def start(self) -> Postgres:
        """Start and wait until it takes connections."""
        options = [] if self._durable else [part for option in QUICK for part in ("-c", option)]
        for _ in range(5):
            server = [self._bin / "postgres", "-D", self._data, "-p", self.port, "-h", "127.0.0.1", "-k", "", *options]
            with self._log.open("wb") as log:
                self._keeper = subprocess.Popen(
                    ["sh", "-c", KEEPER, self._home, *map(str, server)],
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=log,
                    **self._user,
                    cwd=self._home,
                    start_new_session=True,
                )
            if self._wait():
                return self
            self._end("QUIT")
            if "Address already in use" not in self._log.read_text(errors="replace"):
                break
            self.port = free_port()
        raise RuntimeError(f"PostgreSQL did not start:\n{self._log.read_text(errors='replace')[-4000:]}")

    def _wait(self) -> bool:
        for _ in range(600):
            try:
                self.execute("SELECT 1")
            except psycopg.OperationalError:
                if "database system is shut down" in self._log.read_text(errors="replace"):
                    return False
                time.sleep(0.05)
            else:
                return True
        return False

    def stop(self) -> None:
        """End in order; open connections are ended."""
        self._end("INT")

    def crash(self) -> None:
        """End at once, as if the power were cut for the server's processes."""
        self._end("QUIT")

    def close(self) -> None:
        """End and remove all files."""
        if self._keeper is not None:
            self._end("QUIT")
        shutil.rmtree(self._home)

    def _end(self, signal: str) -> None:
        keeper, self._keeper = self._keeper, None
        assert keeper is not None
        keeper.communicate(f"{signal}\n".encode(), timeout=60)

    def execute(self, statement: str, database: str = "postgres") -> None:
        """Run one statement as the owner of the server."""
        with psycopg.connect(self._address(database), autocommit=True) as connection:
            connection.execute(statement.encode())

    def new_database(self) -> str:
        """Make an empty database and answer its URL."""
        self._made += 1
        name = f"test_{self._made}"
        self.execute(f"CREATE DATABASE {name}")
        return self._address(name).replace("postgresql://", "postgresql+psycopg://")

    def cut(self, url: str) -> None:
        """End all connections to a database."""
        name = url.rpartition("/")[2]
        self.execute(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")

    def drop(self, url: str) -> None:
        """Drop a database, whoever uses it."""
        self.execute(f"DROP DATABASE {url.rpartition('/')[2]} WITH (FORCE)")

    def _address(self, database: str) -> str:
        return f"postgresql://postgres:{self.password}@127.0.0.1:{self.port}/{database}"


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[Postgres]:
    """The server that the tests of one process share; who stops it uses another."""
    server = Postgres()
    try:
        yield server.start()
    finally:
        server.close()


@pytest.fixture
def postgres_url(postgres_server: Postgres) -> Iterator[str]:
    """The URL of an empty database."""
    url = postgres_server.new_database()
    yield url
    postgres_server.drop(url)
