"""What lies under a prefix is taken for an export only as far as it is one, byte for byte."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from small_job import payload
from worker_run import run_here

from common.capsule.gate import Gate
from common.contract import JobInput
from common.errors import CapsuleUnreadable, ExportError, GateFailed, InvalidRef, StorageFailed
from common.storage import FileStorage
from handler.job import (
    MANIFEST_ENDING,
    MAX_MANIFEST_BYTES,
    Published,
    check_bytes,
    published,
    read_manifest,
    same_manifest,
)


class Attempt:
    """An attempt below a folder."""

    def __init__(self, root: Path, gate: Gate) -> None:
        self.root = root
        self.storage = FileStorage([root])
        self.folder = root / "out" / "1"
        self.prefix = self.folder.as_uri() + "/"
        self._gate = gate

    def run(self, job_id: str = "job", *, scratch: Path | None = None, prefix: str | None = None) -> Published:
        """Export a graph of one node; answers what lies there then."""
        job = JobInput(job_id=job_id, payload_ref=payload(self.root), output_prefix=prefix or self.prefix)
        run_here(job, self.storage, scratch or self.root / "scratch", gate=self._gate)
        found = published(self.storage, self.prefix, job_id)
        assert found is not None
        return found

    def file(self, pattern: str) -> Path:
        """The one file of a kind."""
        (path,) = self.folder.glob(pattern)
        return path


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with Gate() as found:
        yield found


@pytest.fixture
def attempt(tmp_path: Path, gate: Gate) -> Attempt:
    return Attempt(tmp_path, gate)


@pytest.mark.parametrize("pattern", ["*.mv2", "*.sqlite"])
def test_a_byte_that_changed_in_storage_is_found_and_the_file_named(attempt: Attempt, pattern: str) -> None:
    manifest = attempt.run().manifest
    sha256 = manifest.report.input.sha256
    check_bytes(attempt.storage, attempt.prefix, manifest, sha256)
    path = attempt.file(pattern)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    assert published(attempt.storage, attempt.prefix, "job") is not None, "by its size it is whole"
    with pytest.raises(GateFailed) as caught:
        check_bytes(attempt.storage, attempt.prefix, manifest, sha256)
    assert caught.value.message == f"{path.name} in storage is not what its manifest says (SHA-256)"
    assert caught.value.details["probe"] == "sha256"


def test_an_export_of_another_payload_is_not_the_jobs(attempt: Attempt) -> None:
    manifest = attempt.run().manifest
    with pytest.raises(GateFailed, match="another payload") as caught:
        check_bytes(attempt.storage, attempt.prefix, manifest, "0" * 64)
    assert caught.value.details["probe"] == "payload_sha256"


def test_of_two_manifests_under_a_prefix_none_is_believed(attempt: Attempt) -> None:
    attempt.run()
    manifest = attempt.file(f"*{MANIFEST_ENDING}")
    manifest.with_name(f"other{MANIFEST_ENDING}").write_bytes(manifest.read_bytes())
    assert published(attempt.storage, attempt.prefix, "job") is None


def test_a_file_of_another_size_than_the_manifest_says_is_not_published(attempt: Attempt) -> None:
    attempt.run()
    with attempt.file("*.sqlite").open("ab") as file:
        file.write(b"x")
    assert published(attempt.storage, attempt.prefix, "job") is None


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _grow(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(MAX_MANIFEST_BYTES + 1)


@pytest.mark.parametrize(
    ("change", "kind", "says"),
    [
        (_cut, CapsuleUnreadable, "the manifest is damaged"),
        (_grow, StorageFailed, "there is no manifest at its ref"),
        (Path.unlink, StorageFailed, "there is no manifest at its ref"),
    ],
    ids=["cut", "without measure", "gone"],
)
def test_a_manifest_that_cannot_be_read_says_why(
    attempt: Attempt, change: object, kind: type[ExportError], says: str
) -> None:
    attempt.run()
    path = attempt.file(f"*{MANIFEST_ENDING}")
    assert callable(change)
    change(path)
    with pytest.raises(kind, match=says):
        read_manifest(attempt.storage, path.as_uri())


def test_manifests_of_one_export_say_the_same_though_one_names_its_job(attempt: Attempt) -> None:
    first = attempt.run().manifest
    path = attempt.file(f"*{MANIFEST_ENDING}")
    told = json.loads(path.read_bytes())
    told["report"]["jobId"] = "job"
    path.write_text(json.dumps(told))
    older = read_manifest(attempt.storage, path.as_uri())
    assert older != first
    assert same_manifest(older, first)
    told["vectors"] = 7
    path.write_text(json.dumps(told))
    assert not same_manifest(read_manifest(attempt.storage, path.as_uri()), first)


def test_a_disk_that_fails_is_told_as_such_and_nothing_is_published(attempt: Attempt) -> None:
    (attempt.root / "full").touch()
    with pytest.raises(StorageFailed, match="the worker's disk failed: Not a directory") as caught:
        attempt.run(scratch=attempt.root / "full" / "scratch")
    assert caught.value.details["errno"] == 20
    assert caught.value.retryable
    assert not attempt.folder.exists()


def test_a_place_that_may_not_be_written_is_named_by_its_field(attempt: Attempt) -> None:
    with pytest.raises(InvalidRef) as caught:
        attempt.run(prefix="file:///tmp/elsewhere/")
    assert caught.value.details["field"] == "output_prefix"
    assert not (attempt.root / "scratch").exists()
