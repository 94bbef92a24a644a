"""Downloads as HTTP wants them."""

from __future__ import annotations

import base64
import hashlib

import pytest
from live_server import Server, graph


@pytest.fixture(scope="module")
def artifact(server: Server) -> tuple[str, bytes]:
    """The URL of a capsule and its bytes."""
    job_id = server.submit(graph(20, name='naïve "quoted" name'))
    server.wait(job_id)
    url = f"/v1/exports/{job_id}/download"
    return url, server.client.get(url).content


def test_a_whole_file_says_what_it_is(server: Server, artifact: tuple[str, bytes]) -> None:
    url, data = artifact
    answer = server.client.get(url)
    digest = hashlib.sha256(data)
    encoded = base64.b64encode(digest.digest()).decode()
    assert answer.status_code == 200
    assert answer.headers["content-length"] == str(len(data))
    assert answer.headers["etag"] == f'"{digest.hexdigest()}"'
    assert answer.headers["content-digest"] == f"sha-256=:{encoded}:"
    assert answer.headers["accept-ranges"] == "bytes"
    disposition = answer.headers["content-disposition"]
    assert disposition.startswith('attachment; filename="')
    assert "filename*=UTF-8''na%C3%AFve" in disposition
    head = server.client.head(url)
    assert head.content == b""
    for name in ("content-length", "etag", "content-digest", "content-disposition", "content-type"):
        assert head.headers[name] == answer.headers[name]


@pytest.mark.parametrize(
    ("asked", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=0-99", 0, 100),
        ("bytes=100-", 100, None),
        ("bytes=-50", -50, None),
        ("bytes=10-999999999", 10, None),
        ("bytes=-999999999", 0, None),
        ("BYTES=0-1", 0, 2),
        (f"bytes=5-{'9' * 4500}", 5, None),
        (f"bytes=-{'9' * 4500}", 0, None),
    ],
)
def test_a_range_gives_exactly_these_bytes(
    server: Server, artifact: tuple[str, bytes], asked: str, start: int, stop: int | None
) -> None:
    url, data = artifact
    answer = server.client.get(url, headers={"range": asked})
    wanted = data[start:stop]
    first = start if start >= 0 else len(data) + start
    assert answer.status_code == 206
    assert answer.content == wanted
    assert answer.headers["content-length"] == str(len(wanted))
    assert answer.headers["content-range"] == f"bytes {first}-{first + len(wanted) - 1}/{len(data)}"
    assert "content-digest" not in answer.headers
    assert answer.headers["repr-digest"].startswith("sha-256=:")


@pytest.mark.parametrize("asked", ["bytes=0-1,5-9", "bytes=9-1", "bytes=-", "bytes=a-b", "lines=1-2"])
def test_a_range_that_makes_no_sense_gets_the_whole_file(
    server: Server, artifact: tuple[str, bytes], asked: str
) -> None:
    url, data = artifact
    answer = server.client.get(url, headers={"range": asked})
    assert (answer.status_code, answer.content) == (200, data)


@pytest.mark.parametrize("asked", ["bytes=999999999-", "bytes=-0", f"bytes={'9' * 4500}-"])
def test_a_range_outside_the_file_is_refused(server: Server, artifact: tuple[str, bytes], asked: str) -> None:
    url, data = artifact
    answer = server.client.get(url, headers={"range": asked})
    assert answer.status_code == 416
    assert answer.headers["content-range"] == f"bytes */{len(data)}"
    assert answer.json()["error"]["code"] == "RANGE_NOT_SATISFIABLE"


def test_validators_save_a_transfer(server: Server, artifact: tuple[str, bytes]) -> None:
    url, data = artifact
    etag = server.client.head(url).headers["etag"]
    for given in (etag, f"W/{etag}", f'"other", {etag}', "*"):
        answer = server.client.get(url, headers={"if-none-match": given})
        assert (answer.status_code, answer.content) == (304, b"")
        assert answer.headers["etag"] == etag
    assert server.client.get(url, headers={"if-none-match": '"other"'}).status_code == 200
    assert server.client.get(url, headers={"range": "bytes=0-9", "if-range": etag}).content == data[:10]
    assert server.client.get(url, headers={"range": "bytes=0-9", "if-range": '"other"'}).content == data


def test_parts_have_numbers(server: Server, artifact: tuple[str, bytes]) -> None:
    url, data = artifact
    first = server.client.get(url, params={"part": 1})
    assert (first.content, first.headers["x-capsule-part"]) == (data, "1/1")
    for wrong in ("2", "0", "-1", "x"):
        answer = server.client.get(url, params={"part": wrong})
        assert answer.status_code == 400
        assert answer.json()["error"]["details"]["field"] == "part"


def test_sidecar_and_manifest_have_ranges_too(server: Server, artifact: tuple[str, bytes]) -> None:
    job = artifact[0].removesuffix("/download")
    for kind in ("sidecar", "manifest"):
        whole = server.client.get(f"{job}/{kind}")
        assert whole.headers["etag"] == f'"{hashlib.sha256(whole.content).hexdigest()}"'
        assert server.client.get(f"{job}/{kind}", headers={"range": "bytes=0-4"}).content == whole.content[:5]
        assert server.client.get(f"{job}/{kind}", headers={"range": f"bytes={'9' * 4500}-"}).status_code == 416
        assert server.client.head(f"{job}/{kind}").headers["content-length"] == str(len(whole.content))
    assert whole.json()["parts"][0]["fileName"].endswith(".mv2")


def test_a_file_that_is_gone_is_said_to_be_missing(server: Server) -> None:
    job_id = server.submit(graph(name="missing"))
    server.wait(job_id)
    for found in (server.root / "artifacts" / job_id).rglob("*.mv2"):
        found.unlink()
    answer = server.client.get(f"/v1/exports/{job_id}/download")
    assert answer.status_code == 410
    assert answer.json()["error"]["code"] == "ARTIFACT_MISSING"
    assert server.client.get(f"/v1/exports/{job_id}/sidecar").status_code == 200


def test_a_file_that_cannot_be_looked_at_is_an_outage_of_ours(server: Server) -> None:
    job_id = server.submit(graph(name="unseen"))
    server.wait(job_id)
    [path] = (server.root / "artifacts" / job_id).rglob("*.mv2")
    away = path.rename(path.with_name("away"))
    path.symlink_to(path.name)  # leads to itself
    answer = server.client.get(f"/v1/exports/{job_id}/download")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "STORAGE_FAILED")
    away.replace(path)
    assert server.client.get(f"/v1/exports/{job_id}/download").status_code == 200
