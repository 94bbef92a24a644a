"""What a child answers to each command, and whether it takes another after it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from provider_server import KEY, provider_server
from small_job import GRAPH, config_of, payload

from common.capsule.gate import Gate
from common.contract import JobInput
from common.embedding.choice import Choice, Engines
from common.storage import FileStorage
from handler import claim
from handler.child import Child
from handler.job import published, read_manifest
from handler.protocol import Check, Checked, ChildConfig, Done, Failed, Message, Reported, Run


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with Gate() as found:
        yield found


class Listened:
    """A child in this process, and what it says."""

    def __init__(self, root: Path, gate: Gate, config: ChildConfig) -> None:
        self.root = root
        self.storage = FileStorage([root])
        self._said = root / "said"
        self._out = os.open(self._said, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.child = Child(config, gate, self._out)

    def messages(self) -> list[Message]:
        """All so far but the steps of jobs."""
        told = [msgspec.json.decode(line, type=Message) for line in self._said.read_bytes().splitlines()]
        return [message for message in told if not isinstance(message, Reported)]

    def run(self, name: str = "job", *, holder: str | None = None, **changes: Any) -> bool:
        """Run a job whose payload lies at its usual place."""
        job = JobInput(
            **{
                "job_id": name,
                "payload_ref": (self.root / "payload").as_uri(),
                "output_prefix": self.at(name),
                **changes,
            }
        )
        return self.child.serve(Run(job=job, generated_at="2026-11-21T10:00:00.000Z", run=holder))

    def at(self, name: str) -> str:
        """The output prefix of a job."""
        return (self.root / "out" / name).as_uri() + "/"

    def close(self) -> None:
        """Listen no more."""
        os.close(self._out)


@pytest.fixture
def listened(tmp_path: Path, gate: Gate) -> Iterator[Listened]:
    found = Listened(tmp_path, gate, config_of(tmp_path))
    yield found
    found.close()


def test_a_run_that_holds_the_attempt_publishes_and_one_that_lost_it_meanwhile_does_not(listened: Listened) -> None:
    payload(listened.root)
    for name, closed in (("held", False), ("closed", True)):
        assert claim.take(listened.storage, listened.at(name), "this run")
        if closed:
            assert claim.close(listened.storage, listened.at(name), force=True)
        assert listened.run(name, holder="this run")
    done, failed = listened.messages()
    assert isinstance(done, Done)
    assert done.output.artifact_ref.startswith(listened.at("held"))
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.message) == ("CANCELED", "the attempt was closed while it ran")
    assert published(listened.storage, listened.at("held"), "held") is not None
    assert published(listened.storage, listened.at("closed"), "closed") is None
    assert not list((listened.root / "scratch").iterdir())


def test_a_payload_that_was_read_for_one_job_is_not_exported_for_another(listened: Listened) -> None:
    ref = payload(listened.root)
    assert listened.child.serve(Check(job_id="first", payload_ref=ref))
    more = [{"id": name, "label": "Function", "properties": {"name": name}} for name in ("a", "b", "c")]
    payload(listened.root, GRAPH | {"nodes": more})
    assert listened.run("second")
    checked, done = listened.messages()
    assert isinstance(checked, Checked)
    assert (checked.nodes, checked.relationships) == (1, 1)
    assert isinstance(done, Done)
    assert read_manifest(listened.storage, done.output.manifest_ref).report.input.nodes == 3


def test_a_payload_that_was_read_for_a_job_is_exported_for_it_though_it_is_gone_by_then(listened: Listened) -> None:
    ref = payload(listened.root)
    assert listened.child.serve(Check(job_id="job", payload_ref=ref))
    (listened.root / "payload").unlink()
    assert listened.run("job")
    assert isinstance(listened.messages()[-1], Done)
    assert listened.run("job", output_prefix=listened.at("again"))
    failed = listened.messages()[-1]
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.details["field"]) == ("OBJECT_MISSING", "payload_ref")


def test_an_error_of_the_input_leaves_the_child_fit_for_the_next_command(listened: Listened) -> None:
    ref = payload(listened.root, {"nodes": [], "relationships": []})
    assert listened.child.serve(Check(job_id="job", payload_ref=ref))
    payload(listened.root)
    assert listened.run(output_prefix="file:///tmp/elsewhere/")
    assert listened.run()
    empty, elsewhere, done = listened.messages()
    assert isinstance(empty, Failed)
    assert (empty.error.code, empty.error.details["field"]) == ("INVALID_EXPORT_REQUEST", "nodes")
    assert isinstance(elsewhere, Failed)
    assert (elsewhere.error.code, elsewhere.error.details["field"]) == ("INVALID_REF", "output_prefix")
    assert isinstance(done, Done)


def test_what_nobody_foresaw_is_told_without_what_it_was_and_is_the_childs_last_command(
    tmp_path: Path, gate: Gate
) -> None:
    payload(tmp_path)
    # No path has a NUL in it, and nothing of the child's asks whether one has.
    listened = Listened(tmp_path, gate, msgspec.structs.replace(config_of(tmp_path), scratch=f"{tmp_path}/a\x00b"))
    assert not listened.run()
    listened.close()
    (failed,) = listened.messages()
    assert isinstance(failed, Failed)
    assert (failed.error.code, failed.error.retryable, failed.error.details) == ("INTERNAL", False, {})
    assert "null byte" not in failed.error.message
    assert not (tmp_path / "out").exists()


def test_a_child_whose_vectors_come_from_an_api_asks_it_for_none_that_no_job_wants(tmp_path: Path, gate: Gate) -> None:
    with provider_server("openai") as server:
        choice = Choice(mode="external_api", provider="openai", model="text-embedding-3-small")
        engines = Engines(keys={"openai": KEY["openai"]}, urls={"openai": server.url})
        listened = Listened(tmp_path, gate, config_of(tmp_path, choice=choice, engines=engines))
        listened.child.preload()
        payload(tmp_path)
        assert listened.run()
        listened.close()
        assert server.seen == []
    (done,) = listened.messages()
    assert isinstance(done, Done)
    assert done.output.metrics["capsule"]["vectors"] == 0
