"""Downloads give out the bytes that were published or none: damage is noticed, said, and remembered."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
from live_server import Server, graph
from services import BUCKET, s3_server

KINDS = {"download": ".mv2", "sidecar": ".sqlite", "manifest": ".manifest.json"}


class Place:
    """A server, and the folder in which its artifacts lie, on its own disk or below a bucket."""

    def __init__(self, server: Server, artifacts: Path, *, bucket: bool) -> None:
        self.server = server
        self.artifacts = artifacts
        self.bucket = bucket

    def export(self, **more: Any) -> str:
        """A finished export."""
        job_id = self.server.submit(graph(300, lines=4, **more))
        assert self.server.wait(job_id)["type"] == "job_completed"
        return job_id

    def file(self, job_id: str, kind: str) -> Path:
        """The stored file."""
        [found] = [path for path in (self.artifacts / job_id).rglob("*") if path.name.endswith(KINDS[kind])]
        return found

    def spoil(self, job_id: str, kind: str, *, at: int = -100) -> None:
        """Turn one byte of the stored file; its size stays."""
        path = self.file(job_id, kind)
        data = bytearray(path.read_bytes())
        data[at] ^= 0x01
        with path.open("r+b") as file:
            file.write(data)

    def get(self, job_id: str, kind: str, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.server.client.get(f"/v1/exports/{job_id}/{kind}", headers=named)

    def damaged(self, kind: str) -> float:
        """How often the figures say that such a file was damaged."""
        name = {"download": "capsule"}.get(kind, kind)
        found = re.search(
            rf'memvid_export_damaged_total{{file="{name}"}} (\S+)', self.server.client.get("/metrics").text
        )
        return float(found[1]) if found else 0.0


@pytest.fixture(scope="module", params=["file", "s3"])
def place(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """A server with its files on disk, and one with them in a bucket."""
    folder = tmp_path_factory.mktemp(f"integrity-{request.param}")
    if request.param == "file":
        server = Server(folder / "root", worker_slots=1)
        try:
            yield Place(server.start(), server.root / "artifacts", bucket=False)
        finally:
            server.close()
        return
    with s3_server(folder / "s3") as store:
        server = Server(
            folder / "root", env=store.env, storage_url=f"{store.url}/here", s3_addressing="path", worker_slots=1
        )
        try:
            yield Place(server.start(), folder / "s3" / BUCKET / "here" / "artifacts", bucket=True)
        finally:
            server.close()


def _refused(answer: httpx.Response) -> str:
    assert answer.status_code == 410, answer.text
    error = answer.json()["error"]
    assert error["code"] == "ARTIFACT_MISSING"
    return str(error["message"])


@pytest.mark.parametrize("kind", ["download", "manifest"])
def test_a_spoiled_file_is_not_given_out_and_the_job_says_why_from_then_on(place: Place, kind: str) -> None:
    job_id = place.export(name=f"spoiled-{kind}")
    before = place.damaged(kind)
    place.spoil(job_id, kind)
    if place.bucket and kind != "manifest":
        # It is compared while it is sent: the connection is cut before its last piece.
        with pytest.raises(httpx.RemoteProtocolError):
            place.get(job_id, kind)
    else:
        _refused(place.get(job_id, kind))
    assert place.damaged(kind) == before + 1
    for other in KINDS:
        message = _refused(place.get(job_id, other))
        assert place.file(job_id, kind).name in message
    job = f"/v1/exports/{job_id}"
    assert place.server.client.head(f"{job}/download").status_code == 410
    _refused(place.server.client.get(f"{job}/search", params={"q": "call_1"}))
    assert place.damaged(kind) == before + 1
    assert place.server.job(job_id)["status"] == "completed"


def test_a_spoiled_sidecar_is_not_given_out_and_all_else_goes_on(place: Place) -> None:
    job_id = place.export(name="spoiled-index")
    found = place.server.client.get(f"/v1/exports/{job_id}/search", params={"q": "call_1"}).json()["hits"]
    before = place.damaged("sidecar")
    place.spoil(job_id, "sidecar")
    if place.bucket:
        with pytest.raises(httpx.RemoteProtocolError):
            place.get(job_id, "sidecar")
    else:
        _refused(place.get(job_id, "sidecar"))
    assert place.damaged("sidecar") == before + 1
    assert place.get(job_id, "download").status_code == 200
    assert place.server.job(job_id)["artifact"]["sidecarUrl"]
    answer = place.server.client.get(f"/v1/exports/{job_id}/search", params={"q": "call_1"})
    assert (answer.status_code, answer.json()["hits"]) == (200, found)


@pytest.mark.parametrize("headers", [{"range": "bytes=0-9"}, {"if_none_match": "*"}])
def test_a_part_and_not_changed_are_not_answered_of_a_spoiled_file(place: Place, headers: dict[str, str]) -> None:
    job_id = place.export(name="asked-in-part")
    place.spoil(job_id, "download")
    _refused(place.get(job_id, "download", **headers))


def test_a_file_that_is_spoiled_after_it_was_given_out_is_noticed(place: Place) -> None:
    job_id = place.export(name="later")
    whole = place.get(job_id, "download")
    etag = whole.headers["etag"]
    assert place.get(job_id, "download", if_none_match=etag).status_code == 304
    assert place.get(job_id, "download", range="bytes=5-9").content == whole.content[5:10]
    place.spoil(job_id, "download", at=7)
    if place.bucket:  # the gateway keeps the object's ETag beside the file: only the whole tells
        with pytest.raises(httpx.RemoteProtocolError):
            place.get(job_id, "download")
    _refused(place.get(job_id, "download", if_none_match=etag))
    _refused(place.get(job_id, "download", range="bytes=5-9"))


def test_a_file_of_another_size_is_damage_and_one_that_is_gone_may_come_back(place: Place) -> None:
    job_id = place.export(name="away")
    path = place.file(job_id, "sidecar")
    away = path.with_name("away")
    path.rename(away)
    assert "not where it should be" in _refused(place.get(job_id, "sidecar"))
    away.rename(path)
    assert place.get(job_id, "sidecar").status_code == 200
    with path.open("ab") as file:
        file.write(b"more")
    assert "bytes, not" in _refused(place.get(job_id, "sidecar"))


def test_a_manifest_that_says_something_else_is_not_given_out(place: Place) -> None:
    job_id = place.export(name="other-manifest")
    path = place.file(job_id, "manifest")
    text = path.read_text()
    path.write_text(text.replace('"frames": ', '"frames": 1', 1))
    assert "not the one that was published" in _refused(place.get(job_id, "manifest"))


def test_the_hashes_of_the_manifest_the_job_and_the_headers_are_those_of_the_bytes(place: Place) -> None:
    body = json.dumps(graph(30, name="hashes")).encode()
    digest = hashlib.sha256(body)
    posted = place.server.post(
        body, content_digest=f"sha-512=:AAAA:, sha-256=:{base64.b64encode(digest.digest()).decode()}:"
    )
    assert posted.status_code == 202, posted.text
    assert posted.headers["x-payload-sha256"] == digest.hexdigest()
    job_id = posted.json()["jobId"]
    place.server.wait(job_id)
    job = place.server.job(job_id)
    manifest = place.get(job_id, "manifest").json()
    found = {}
    for kind in KINDS:
        answer = place.get(job_id, kind)
        found[kind] = hashlib.sha256(answer.content).hexdigest()
        expected = base64.b64encode(bytes.fromhex(found[kind])).decode()
        assert answer.headers["content-digest"] == answer.headers["repr-digest"] == f"sha-256=:{expected}:"
    assert job["metadata"]["payloadSha256"] == digest.hexdigest() == manifest["report"]["input"]["sha256"]
    assert job["artifact"]["sha256"] == found["download"] == manifest["parts"][0]["sha256"]
    assert job["artifact"]["sidecarSha256"] == found["sidecar"] == manifest["sidecarSha256"]


@pytest.mark.parametrize("name", ["Content-Digest", "Repr-Digest"])
def test_a_body_that_is_not_what_its_digest_says_is_refused_and_nothing_of_it_stays(server: Server, name: str) -> None:
    body = json.dumps(graph(3)).encode()
    digest = base64.b64encode(hashlib.sha256(body + b"x").digest()).decode()
    answer = server.post(body, **{name: f"sha-256=:{digest}:"})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert (error["code"], error["details"]["field"]) == ("INVALID_EXPORT_REQUEST", name)
    assert not list((server.root / "staging" / "incoming").iterdir())


@pytest.mark.parametrize("value", ["sha-256=abc", "sha-256=:!!!:", "sha-256=:AAAA:", "md5=:AAAA:", ""])
def test_a_digest_that_is_none_is_refused(server: Server, value: str) -> None:
    answer = server.post(graph(3), content_digest=value)
    assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "Content-Digest")


def test_a_compressed_body_is_hashed_as_it_is_sent(server: Server) -> None:
    body = gzip.compress(json.dumps(graph(3)).encode())
    digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
    assert server.post(body, content_digest=f"sha-256=:{digest}:").status_code == 202


def test_names_in_the_answers_are_those_of_the_files(place: Place) -> None:
    job_id = place.export(name="names")
    disposition = place.get(job_id, "download").headers["content-disposition"]
    assert unquote(place.file(job_id, "download").name) in unquote(disposition)
