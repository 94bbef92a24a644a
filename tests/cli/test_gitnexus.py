"""``export --gitnexus`` against a real GitNexus server, and against servers that break off in mid-answer."""

from __future__ import annotations

import http.server
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from processes import answering, command, free_port, gitnexus

CODE = '''\
"""A tiny program."""


def greet(name: str) -> str:
    """Say hello."""
    return f"hello {name}"


def main() -> None:
    print(greet("world"))
'''


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    repository = tmp_path_factory.mktemp("gitnexus") / "tiny"
    repository.mkdir()
    (repository / "hello.py").write_text(CODE)
    (repository / "README.md").write_text("# Tiny\n\n## Usage\n\nRun it.\n")
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.com"]
    for arguments in (["init", "-q", "-b", "main"], ["add", "-A"], [*identity, "commit", "-q", "-m", "start"]):
        subprocess.run(["git", *arguments], cwd=repository, check=True)
    return repository


@pytest.fixture(scope="module")
def server(checkout: Path) -> Iterator[str]:
    with gitnexus(checkout, checkout.parent / "home", "tiny") as url:
        yield url


def test_a_running_gitnexus_becomes_a_capsule_named_after_its_repository(server: str, tmp_path: Path) -> None:
    done = command("export", "--gitnexus", server, "--repo", "tiny", "--out", tmp_path, "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["capsule"]["fileName"].startswith("tiny-gitnexus-mem_capsule-")
    assert report["input"]["nodes"] >= 5
    found = command("search", tmp_path / report["capsule"]["fileName"], "greet", "--json")
    assert json.loads(found.stdout)["hits"][0]["id"] == "Function:hello.py:greet"


def test_a_repository_is_found_by_its_path_and_without_a_name_when_it_is_the_only_one(
    server: str, checkout: Path, tmp_path: Path
) -> None:
    by_path = command("export", "--gitnexus", server, "--repo", checkout, "--out", tmp_path / "a", "--json")
    alone = command("export", "--gitnexus", server, "--out", tmp_path / "b", "--json")
    digests = {json.loads(done.stdout)["capsule"]["contentDigest"] for done in (by_path, alone)}
    assert len(digests) == 1


def test_no_path_of_the_machine_reaches_the_capsule(server: str, checkout: Path, tmp_path: Path) -> None:
    done = command("export", "--gitnexus", server, "--repo", checkout, "--out", tmp_path, "--json")
    manifest = json.loads((tmp_path / f"{json.loads(done.stdout)['capsule']['fileName']}.manifest.json").read_text())
    assert str(checkout.parent) not in json.dumps(manifest["source"])
    assert manifest["source"] == {**manifest["source"], "baseName": "tiny", "branch": "main"}


def test_an_unknown_repository_is_a_usage_error_that_lists_the_known_ones(server: str, tmp_path: Path) -> None:
    done = command("export", "--gitnexus", server, "--repo", "other", "--out", tmp_path)
    assert done.returncode == 2
    assert b"'other'" in done.stderr
    assert b"tiny" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_away_is_named(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    done = command("export", "--gitnexus", url, "--out", tmp_path)
    assert done.returncode == 3
    assert url.encode() in done.stderr
    assert b"Traceback" not in done.stderr


NODE = b'{"type":"node","data":{"id":"File:a.py","label":"File","properties":{"name":"a.py","filePath":"a.py"}}}\n'
EDGE = (
    b'{"type":"relationship","data":{"id":"r1","type":"CONTAINS","sourceId":"File:a.py","targetId":"File:a.py",'
    b'"confidence":1,"reason":null,"step":0}}\n'
)


@pytest.mark.parametrize(
    ("lines", "cut", "code", "words"),
    [
        pytest.param([NODE, EDGE, EDGE[:40]], False, 2, b"cut", id="half-a-line-and-a-clean-end"),
        pytest.param([NODE, EDGE], True, 3, b"cut its answer", id="connection-broken-between-lines"),
        pytest.param([NODE, EDGE, b'{"type":"error","error":"database is locked"}\n'], False, 2, b"database is locked"),
        pytest.param([NODE], False, 2, b"relationships", id="no-relationships-at-all"),
    ],
)
def test_an_answer_that_ends_early_is_refused(
    lines: list[bytes], cut: bool, code: int, words: bytes, tmp_path: Path
) -> None:
    with fake_gitnexus(lines, cut=cut) as url:
        done = command("export", "--gitnexus", url, "--out", tmp_path)
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert list(tmp_path.iterdir()) == []


@contextmanager
def fake_gitnexus(lines: list[bytes], *, cut: bool) -> Iterator[str]:
    """A server that answers like GitNexus 1.6 and ends the stream after ``lines``; ``cut`` leaves out its end mark."""

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.send_response(200)
            if self.path.startswith("/api/repos"):
                body = b'[{"name":"tiny","path":"/repos/tiny","branch":"main"}]'
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
                return
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for line in lines:
                self.wfile.write(b"%x\r\n%b\r\n" % (len(line), line))
            if not cut:
                self.wfile.write(b"0\r\n\r\n")
            self.close_connection = True

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with answering(Handler) as url:
        yield url
