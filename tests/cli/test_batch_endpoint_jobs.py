"""One graph of a batch on a Runpod endpoint: what it comes to for each word of the platform and each state of storage.
The platform by its wire format."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import msgspec
import pytest
from operations.storehouse import exported
from processes import answering
from services import S3
from small_batch import PLAN

from common.contract import Manifest, Progress, Source, WorkerProgress
from common.errors import DeadlineExceeded, EmbeddingRefused, ExportError, GateFailed, WorkerLost
from common.storage import FileStorage, Storage, open_storage
from control_plane.backends.runpod_api import RunpodApi
from control_plane.batch.runpod import MAX_ATTEMPTS, STAGED, Endpoint, RunpodSlot
from control_plane.batch.slots import Kept, Work
from control_plane.batch.sources import Graph, Payload
from control_plane.operations.metrics import Metrics
from handler import claim
from handler.protocol import job_error

__all__ = ["exported"]

RUNNING = {"status": "IN_PROGRESS"}
DONE = {"status": "COMPLETED"}
Look = dict[str, Any] | Callable[[], dict[str, Any]] | None


class Platform:
    """An endpoint with one job; ``looks`` are the answers to what it asks, None: it knows no such job. The last one
    stays."""

    def __init__(self, looks: list[Look]) -> None:
        self.looks = looks
        self.runs: list[dict[str, Any]] = []
        self.canceled: list[str] = []
        self.looked = 0
        self.answers = threading.Event()
        """A job that was handed over is answered."""
        self.answers.set()

    def look(self) -> dict[str, Any] | None:
        self.looked += 1
        said = self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]
        return said() if callable(said) else said


@contextmanager
def platform(*looks: Look) -> Iterator[tuple[Platform, str]]:
    known = Platform(list(looks) or [RUNNING])

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/endpoint/run":
                known.runs.append(json.loads(body)["input"])
                known.answers.wait(20)
                self._say({"status": "IN_QUEUE"})
            else:
                known.canceled.append(self.path)
                self._say({"status": "CANCELLED"})

        def do_GET(self) -> None:
            self._say(known.look())

        def _say(self, said: dict[str, Any] | None) -> None:
            body = b"" if said is None else json.dumps({"id": "one", **said}).encode()
            self.send_response(404 if said is None else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with answering(Handler) as url:
        yield known, url


class Place:
    """A destination, a payload for it, and what a worker puts there."""

    def __init__(self, root: Path, exported: Path) -> None:
        self.root = root / "out"
        self.root.mkdir()
        self.storage: Storage = FileStorage([root])
        self.prefix = self.root.as_uri() + "/"
        self._exported = exported
        self._payload = root / "payload"
        manifest = msgspec.json.decode(next(exported.glob("*.json")).read_bytes(), type=Manifest)
        self._sha256 = manifest.report.input.sha256

    def work(self, address: str = "tiny.json") -> Work:
        self._payload.write_bytes(b"{}")  # what is staged is moved away
        return Work(Graph("tiny", address, 1, Source(), "tiny"), Payload(self._payload, 2, self._sha256), None)

    def publish(self, prefix: str, change: Callable[[Path], None] = lambda _: None) -> dict[str, Any]:
        """As a worker does, after which ``change`` strikes the folder; what the platform says then."""
        folder = self.folder(prefix)
        shutil.copytree(self._exported, folder, dirs_exist_ok=True)
        change(folder)
        return DONE

    def folder(self, prefix: str) -> Path:
        return Path(prefix.removeprefix("file://"))

    def files(self) -> dict[str, int]:
        """Names and bytes below the destination."""
        found = (path for path in self.root.rglob("*") if path.is_file())
        return {path.relative_to(self.root).as_posix(): path.stat().st_size for path in found}

    def run(
        self, url: str, do: Callable[[RunpodSlot], Awaitable[Callable[[], Kept]]] | None = None
    ) -> tuple[Kept, list[Progress]]:
        """Run the graph and keep what came of it."""
        told: list[Progress] = []

        async def inside() -> Kept:
            api = RunpodApi(url, "endpoint", "key", Metrics())
            slot = RunpodSlot(1, Endpoint(api, self.storage, self.prefix, PLAN, 60_000, 60_000, 0.01))
            try:
                keep = await (do(slot) if do else slot.run(self.work(), told.append))
                return await asyncio.to_thread(keep)
            finally:
                await api.close()

        return asyncio.run(inside()), told


@pytest.fixture
def place(tmp_path: Path, exported: Path) -> Place:
    return Place(tmp_path, exported)


def progress(*steps: Progress) -> dict[str, Any]:
    return {**RUNNING, "output": msgspec.to_builtins(WorkerProgress(steps=list(steps)))}


def test_a_job_is_told_of_while_it_runs_and_leaves_nothing_but_what_its_manifest_names(place: Place) -> None:
    step = Progress(stage="write_capsule", progress=60, stage_progress=10, message="writing")
    (place.root / "tiny" / f"{'a' * 16}-1").mkdir(parents=True)
    (place.root / "tiny" / f"{'a' * 16}-1" / "old.mv2").write_bytes(b"old")

    def end() -> dict[str, Any]:
        prefix = known.runs[0]["output_prefix"]
        place.publish(prefix)
        claim.close(place.storage, prefix)
        return DONE

    with platform({"status": "IN_QUEUE"}, {**RUNNING, "output": "none yet"}, progress(), progress(step), end) as (
        known,
        url,
    ):
        kept, told = place.run(url)
    assert told == [step]
    (asked,) = known.runs
    assert (asked["options"], asked["payload_size"], asked["timeout_seconds"]) == (PLAN.options, 2, 58.0)
    assert asked["payload_ref"].startswith(place.prefix + STAGED)
    assert kept.folder.startswith("tiny/")
    assert asked["output_prefix"] == place.prefix + kept.folder
    assert {kept.folder + name: size for name, size in kept.files.items()} == place.files()
    assert kept.report.capsule.frames > 0


def test_what_an_earlier_batch_had_published_is_taken_and_not_run_again(place: Place) -> None:
    with platform(lambda: place.publish(known.runs[0]["output_prefix"])) as (known, url):
        first, _ = place.run(url)
        again, _ = place.run(url)
    assert len(known.runs) == 1
    assert again == first


def flip(folder: Path) -> None:
    path = next(folder.glob("*.mv2"))
    data = path.read_bytes()
    path.write_bytes(data[:600] + bytes([data[600] ^ 1]) + data[601:])


def halve(folder: Path) -> None:
    path = next(folder.glob("*.manifest.json"))
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.parametrize(("harm", "words"), [(flip, "SHA-256"), (halve, "the manifest is damaged")])
def test_an_attempt_that_is_not_what_it_says_is_removed_and_the_next_one_has_a_place_of_its_own(
    place: Place, harm: Callable[[Path], None], words: str
) -> None:
    with platform(lambda: place.publish(known.runs[-1]["output_prefix"], harm)) as (known, url):
        with pytest.raises(GateFailed, match=words):
            place.run(url)
        assert not [name for name in place.files() if name.endswith((".mv2", ".sqlite"))]
        assert claim.state(place.storage, known.runs[0]["output_prefix"]) == "closed"
        known.looks = [lambda: place.publish(known.runs[-1]["output_prefix"])]
        kept, _ = place.run(url)
    assert [run["output_prefix"][-3:] for run in known.runs] == ["-1/", "-2/"]
    assert {kept.folder + name for name in kept.files} == set(place.files())


def test_what_an_earlier_batch_had_published_and_was_damaged_since_is_run_again(place: Place) -> None:
    with platform(lambda: place.publish(known.runs[-1]["output_prefix"])) as (known, url):
        first, _ = place.run(url)
        halve(place.root / first.folder)
        again, _ = place.run(url)
    assert (len(known.runs), again.folder[-3:]) == (2, "-2/")
    assert {again.folder + name: size for name, size in again.files.items()} == place.files()


def test_a_payload_in_the_bucket_of_the_destination_is_read_where_it_lies(place: Place, s3: S3) -> None:
    place.storage = storage = open_storage(s3.config())
    place.prefix = f"{s3.url}/there/"
    address = f"{s3.url}/graphs/tiny.json"
    with platform(DONE) as (known, url), pytest.raises(WorkerLost):
        place.run(url, lambda slot: slot.run(place.work(address), lambda _: None))
    assert known.runs[0]["payload_ref"] == address
    assert not storage.found(f"{place.prefix}{STAGED}")


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (DONE, WorkerLost, "ended without publishing anything"),
        ({"status": "TIMED_OUT"}, DeadlineExceeded, "execution timeout"),
        ({"status": "CANCELLED"}, WorkerLost, "canceled at Runpod"),
        ({"status": "FAILED", "error": "out of memory"}, WorkerLost, "the worker failed: out of memory"),
        (
            {
                "status": "FAILED",
                "error": msgspec.json.encode(job_error(EmbeddingRefused("too dear"))).decode(),
            },
            EmbeddingRefused,
            "too dear",
        ),
        (None, WorkerLost, "does not know the job any more"),
    ],
    ids=["completed", "timed out", "canceled", "failed", "failed in our words", "unknown"],
)
def test_a_job_that_published_nothing_ends_in_what_the_platform_says_and_nobody_may_publish_later(
    place: Place, said: dict[str, Any] | None, kind: type[ExportError], words: str
) -> None:
    with platform(RUNNING, said) as (known, url), pytest.raises(kind, match=words):
        place.run(url)
    assert claim.state(place.storage, known.runs[0]["output_prefix"]) == "closed"


def test_what_the_run_that_held_the_claim_failed_in_counts_for_all_its_deliveries(place: Place) -> None:
    def end() -> dict[str, Any]:
        claim.close(place.storage, known.runs[0]["output_prefix"], error=job_error(EmbeddingRefused("too dear")))
        return DONE

    with platform(end) as (known, url), pytest.raises(EmbeddingRefused, match="too dear"):
        place.run(url)


def test_a_run_that_lives_though_the_platform_has_lost_its_job_is_waited_for(place: Place) -> None:
    def lost() -> dict[str, Any]:
        assert claim.take(place.storage, known.runs[0]["output_prefix"], "a run")
        return DONE

    def published() -> dict[str, Any]:
        return place.publish(known.runs[0]["output_prefix"])

    with platform(lost, None, published) as (known, url):
        kept, _ = place.run(url)
    assert set(place.files()) == {kept.folder + name for name in kept.files}


def test_a_batch_that_is_stopped_cancels_its_job_and_closes_its_attempt(place: Place) -> None:
    async def stopped(slot: RunpodSlot) -> Callable[[], Kept]:
        task = asyncio.create_task(slot.run(place.work(), lambda _: None))
        while not known.looked:
            await asyncio.sleep(0.01)
        task.cancel()
        return await task

    with platform(RUNNING) as (known, url), pytest.raises(asyncio.CancelledError):
        place.run(url, stopped)
    assert known.canceled == ["/endpoint/cancel/one"]
    assert claim.state(place.storage, known.runs[0]["output_prefix"]) == "closed"


def test_a_batch_that_is_stopped_while_it_hands_a_job_over_closes_its_attempt(place: Place) -> None:
    async def stopped(slot: RunpodSlot) -> Callable[[], Kept]:
        task = asyncio.create_task(slot.run(place.work(), lambda _: None))
        while not known.runs:
            await asyncio.sleep(0.01)
        task.cancel()
        try:
            return await task
        finally:
            known.answers.set()

    with platform(RUNNING) as (known, url):
        known.answers.clear()
        with pytest.raises(asyncio.CancelledError):
            place.run(url, stopped)
    assert known.canceled == []
    assert claim.state(place.storage, known.runs[0]["output_prefix"]) == "closed", "the run stops by itself"


def test_attempts_whose_runs_are_dead_are_passed_over_and_after_a_thousand_the_graph_has_failed(place: Place) -> None:
    with platform(DONE) as (known, url):
        with pytest.raises(WorkerLost):
            place.run(url)
        first = place.folder(known.runs[0]["output_prefix"])
        stale = first.with_name(first.name.removesuffix("-1") + "-2")
        closed = (first / claim.CLAIM_NAME).read_bytes()
        assert claim.take(place.storage, stale.as_uri() + "/", "a dead run")
        _age(stale)
        with pytest.raises(WorkerLost):
            place.run(url)
        assert known.runs[-1]["output_prefix"].endswith("-3/")
        assert claim.state(place.storage, stale.as_uri() + "/") == "closed"
        for number in range(4, MAX_ATTEMPTS + 1):
            folder = first.with_name(first.name.removesuffix("-1") + f"-{number}")
            folder.mkdir()
            (folder / claim.CLAIM_NAME).write_bytes(closed)
        with pytest.raises(ExportError, match="1,000 attempts at this graph have failed; remove what lies under"):
            place.run(url)
    assert len(known.runs) == 2


def _age(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, (time.time() - 60,) * 2)


def test_payloads_that_graphs_have_left_are_cleared_at_the_end(place: Place) -> None:
    with platform(DONE) as (_, url), pytest.raises(WorkerLost):
        place.run(url)
    assert [name for name in place.files() if name.startswith(STAGED)]
    api = RunpodApi("http://127.0.0.1:9", "endpoint", "key", Metrics())
    Endpoint(api, place.storage, place.prefix, PLAN, 1, 1, 1).clear()
    assert not [name for name in place.files() if name.startswith(STAGED)]
