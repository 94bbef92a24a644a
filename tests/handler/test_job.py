"""What an attempt published can be recognised later, and only when it is whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from worker_run import run_here

from common.contract import JobInput, JobOutput, Progress
from common.errors import Canceled
from common.storage import FileStorage
from handler.job import published

GRAPH = {
    "projectName": "p",
    "source": {"type": "local", "baseName": "weird %20 ünïcode #name", "displayName": "x"},
    "nodes": [{"id": "a", "label": "Function", "properties": {"name": "first"}}],
    "relationships": [{"id": "e", "sourceId": "a", "targetId": "a", "type": "CALLS", "confidence": 1.0}],
    "options": {"semanticEnabled": True},
}


def _run(root: Path, *, stop: bool = False) -> tuple[JobOutput, list[Progress]]:
    (root / "payload").write_text(json.dumps(GRAPH))
    told: list[Progress] = []

    def should_stop() -> None:
        if stop and told:
            raise Canceled("stop")

    prefix = (root / "out" / "1").as_uri() + "/"
    job = JobInput(job_id="job", payload_ref=(root / "payload").as_uri(), output_prefix=prefix)
    output = run_here(job, FileStorage([root]), root / "scratch", emit=told.append, should_stop=should_stop)
    return output, told


def test_a_published_attempt_is_recognised_and_says_the_same(tmp_path: Path) -> None:
    output, told = _run(tmp_path)
    assert told
    assert output.metrics["capsule"]["vectors"] == 1
    assert output.metrics["capsule"]["path"] is None
    found = published(FileStorage([tmp_path]), (tmp_path / "out" / "1").as_uri() + "/", "job")
    assert found is not None
    names = ("artifact_ref", "sidecar_ref", "manifest_ref", "sha256", "size_bytes")
    assert [getattr(found.output, name) for name in names] == [getattr(output, name) for name in names]
    assert found.output.metrics["jobId"] == "job"
    assert found.manifest.capsule_sha256 == output.sha256
    assert not (tmp_path / "scratch").exists()


@pytest.mark.parametrize("pattern", ["*.mv2", "*.sqlite", "*.json"])
def test_an_attempt_that_lacks_a_file_is_not_recognised(tmp_path: Path, pattern: str) -> None:
    _run(tmp_path)
    storage, prefix = FileStorage([tmp_path]), (tmp_path / "out" / "1").as_uri() + "/"
    for path in (tmp_path / "out" / "1").glob(pattern):
        path.unlink()
    assert published(storage, prefix, "job") is None
    assert published(storage, (tmp_path / "out" / "2").as_uri() + "/", "job") is None


def test_a_job_that_is_told_to_stop_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(Canceled):
        _run(tmp_path, stop=True)
    assert not (tmp_path / "scratch").exists()
    assert not (tmp_path / "out").exists()
