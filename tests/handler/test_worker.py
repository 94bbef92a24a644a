"""The worker under the unmodified runpod package: what it answers, what it tells meanwhile, and what it leaves."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
from processes import command
from services import S3
from worker_process import Platform, Worker, gone, group, platform, worker

from common.contract import JobError, JobOutput
from common.errors import WriterFailed
from common.storage import FileStorage, Storage, open_storage
from handler import claim
from handler.job import published, read_manifest

LIMIT = 40_000_000
CAPSULE = "chain-gitnexus-mem_capsule-2026-11-21.mv2"


def graph(nodes: int = 9, lines: int = 0) -> bytes:
    """An export request with a chain of functions."""
    text = "\n".join(f"    value_{n} = compute_{n}(argument_{n})" for n in range(lines))
    return json.dumps(
        {
            "sessionId": "s",
            "projectName": "p",
            "source": {"type": "local", "baseName": "chain"},
            "nodes": [
                {
                    "id": f"n{n}",
                    "label": "Function",
                    "properties": {"name": f"call_{n}", "content": f"def f{n}:\n{text}"},
                }
                for n in range(nodes)
            ],
            "relationships": [
                {"id": f"e{n}", "sourceId": f"n{n}", "targetId": f"n{n - 1}", "type": "CALLS", "confidence": 1.0}
                for n in range(1, nodes)
            ],
        }
    ).encode()


LARGE = graph(20_000, lines=12)
"""Takes several seconds."""


class Place:
    """The objects of one job, in the root of the worker unless it is told another storage and place."""

    def __init__(self, root: Path, name: str, storage: Storage | None = None, place: str | None = None) -> None:
        self.name = name
        self.storage = storage or FileStorage([root])
        self.folder = root / name
        self.folder.mkdir(parents=True)
        self.ref = f"{place or root.as_uri()}/{name}"
        self.prefix = f"{self.ref}/1/"

    def input(self, payload: bytes = b"", **changes: Any) -> dict[str, Any]:
        """The input of a job, its payload staged."""
        payload = payload or graph()
        (self.folder / "outgoing").write_bytes(payload)
        self.storage.put(self.folder / "outgoing", f"{self.ref}/payload")
        data = {
            "job_id": self.name,
            "payload_ref": f"{self.ref}/payload",
            "payload_size": len(payload),
            "payload_sha256": hashlib.sha256(payload).hexdigest(),
            "output_prefix": self.prefix,
            "created_at": "2026-11-21T10:00:00.000Z",
            **changes,
        }
        return {name: value for name, value in data.items() if value is not ...}

    def objects(self) -> list[str]:
        """Names of what lies under the prefix, without the claim."""
        names = [found.ref.rpartition("/")[2] for found in self.storage.found(self.prefix)]
        return [name for name in names if name not in claim.NAMES]

    def wait_until(self, state: claim.State) -> None:
        """Until a run has taken the attempt (``held``), or it is closed."""
        for _ in range(1_000):
            if claim.state(self.storage, self.prefix) == state:
                return
            time.sleep(0.03)
        raise AssertionError(f"the attempt is {claim.state(self.storage, self.prefix)}")


class Live(NamedTuple):
    """A platform with a worker."""

    platform: Platform
    worker: Worker


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    root = tmp_path_factory.mktemp("worker") / "root"
    with platform() as (found, url), worker(url, root, {"MEMVID_EXPORT_MAX_PAYLOAD_BYTES": str(LIMIT)}) as process:
        yield Live(found, process)


@pytest.fixture
def place(live: Live, request: pytest.FixtureRequest) -> Place:
    digest = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    return Place(live.worker.root, f"job-{digest}")


def failure(result: dict[str, Any]) -> JobError:
    assert set(result) <= {"error", "stopPod"}, result
    return msgspec.json.decode(result["error"], type=JobError)


def done(result: dict[str, Any]) -> JobOutput:
    assert set(result) == {"output"}, result
    return msgspec.convert(result["output"], JobOutput)


def test_jobs_are_run_from_a_cold_start_to_sigterm_and_tell_their_steps(tmp_path: Path) -> None:
    with platform() as (runpod, url), worker(url, tmp_path / "root") as process:
        first, second = Place(tmp_path / "root", "first"), Place(tmp_path / "root", "second")
        job = runpod.submit(first.input(graph(8_000, lines=12), options={"semanticEnabled": True}))
        output = done(runpod.result(job))
        again = done(
            runpod.result(runpod.submit(second.input(graph(8_000, lines=12), options={"semanticEnabled": True})))
        )

        assert output.metrics["timings"]["coldStart"] > 0
        assert again.metrics["timings"]["coldStart"] == 0
        manifest = read_manifest(first.storage, output.manifest_ref)
        assert manifest.vectors == 8_000
        assert (output.sha256, output.metrics["jobId"]) == (manifest.capsule_sha256, "first")
        assert again.sha256 == output.sha256
        assert published(first.storage, first.prefix, "first") is not None

        assert output.progress is not None
        steps = msgspec.to_builtins(output.progress.steps)
        assert [step["progress"] for step in steps] == sorted(step["progress"] for step in steps)
        assert {step["stage"] for step in steps} == {
            "transform",
            "frame_prep",
            "write_capsule",
            "build_sidecar",
            "finalize",
        }
        *updates, result = runpod.all_of(job)
        assert updates
        assert "status" not in result
        for update in updates:
            assert update["output"]["first"] == 1
            told = update["output"]["steps"]
            assert told == steps[: len(told)]

        processes = process.processes()
        assert processes
        assert process.stop() == 0
        assert gone(processes)
        assert not (tmp_path / "root" / "workers").is_dir() or not list((tmp_path / "root" / "workers").iterdir())


WRONG: list[tuple[dict[str, Any], str, str]] = [
    ({"job_id": ...}, "INVALID_EXPORT_REQUEST", "job_id"),
    ({"job_id": 7}, "INVALID_EXPORT_REQUEST", "job_id"),
    ({"job_id": "../../up"}, "INVALID_EXPORT_REQUEST", "job_id"),
    ({"payload_ref": ...}, "INVALID_EXPORT_REQUEST", "payload_ref"),
    ({"output_prefix": "file:///no/slash"}, "INVALID_EXPORT_REQUEST", "output_prefix"),
    ({"schema_version": "gitnexus.export.schema.v9"}, "INVALID_EXPORT_REQUEST", "schema_version"),
    ({"embedding_mode": "telepathy"}, "INVALID_EXPORT_REQUEST", "embedding_mode"),
    ({"embedding_provider": "openai"}, "INVALID_EXPORT_REQUEST", "embedding_provider"),
    ({"payload_sha256": "abc"}, "INVALID_EXPORT_REQUEST", "payload_sha256"),
    ({"payload_size": -1}, "INVALID_EXPORT_REQUEST", "payload_size"),
    ({"timeout_seconds": 0}, "INVALID_EXPORT_REQUEST", "timeout_seconds"),
    ({"created_at": "yesterday"}, "INVALID_EXPORT_REQUEST", "created_at"),
    ({"attempt": 0}, "INVALID_EXPORT_REQUEST", "attempt"),
    ({"attempt": 10**7}, "INVALID_EXPORT_REQUEST", "attempt"),
    ({"attempt": 10**400}, "INVALID_EXPORT_REQUEST", "attempt"),
    ({"options": {"\ud800": 1}}, "INVALID_EXPORT_REQUEST", "options"),
    ({"options": {"profile": "\ud800"}}, "INVALID_EXPORT_REQUEST", "options"),
    ({"ollama_host": "\ud800"}, "INVALID_EXPORT_REQUEST", "ollama_host"),
    ({"payload_ref": "file:///\ud800"}, "INVALID_EXPORT_REQUEST", "payload_ref"),
    ({"payload_ref": "file://[::1"}, "INVALID_REF", "payload_ref"),
    ({"output_prefix": "file://[::1/"}, "INVALID_REF", "output_prefix"),
    ({"links": {"a": {"get": 7}}}, "INVALID_EXPORT_REQUEST", "links[...].get"),
    ({"options": {"colour": "red"}}, "INVALID_EXPORT_REQUEST", "options.colour"),
    ({"options": {"maxNodeFrames": "many"}}, "INVALID_EXPORT_REQUEST", "options.maxNodeFrames"),
    ({"options": {"maxNodeFrames": -1}}, "INVALID_EXPORT_REQUEST", "options.maxNodeFrames"),
    ({"payload_sha256": "0" * 64}, "PAYLOAD_MISMATCH", "payload_sha256"),
    ({"payload_size": 7}, "PAYLOAD_MISMATCH", "payload_size"),
    ({"payload_ref": "file:///etc/passwd"}, "INVALID_REF", "payload_ref"),
    ({"payload_ref": "s3://elsewhere/payload"}, "INVALID_REF", "payload_ref"),
    ({"payload_ref": "ftp://host/payload"}, "INVALID_REF", "payload_ref"),
    ({"payload_ref": "https://169.254.169.254/latest"}, "INVALID_REF", "payload_ref"),
    ({"output_prefix": "file:///tmp/elsewhere/"}, "INVALID_REF", "output_prefix"),
    ({"output_prefix": "s3://elsewhere/1/"}, "INVALID_REF", "output_prefix"),
]


def test_inputs_that_are_wrong_say_where_and_are_not_to_be_tried_again(live: Live, place: Place) -> None:
    jobs = {}
    for number, (changes, code, field) in enumerate(WRONG):
        one = Place(live.worker.root, f"{place.name}-{number}")
        jobs[live.platform.submit(one.input(**changes))] = (one, changes, code, field)
    for job, (one, changes, code, field) in jobs.items():
        result = live.platform.result(job)
        error = failure(result)
        assert (error.code, error.details.get("field"), error.retryable) == (code, field, False), (changes, error)
        assert "stopPod" not in result
        assert one.objects() == []


@pytest.mark.parametrize(
    ("payload", "code"),
    [
        (b"{", "INVALID_EXPORT_REQUEST"),
        (b'{"nodes": [], "relationships": []}', "INVALID_EXPORT_REQUEST"),
        (b" " * (LIMIT + 1), "PAYLOAD_TOO_LARGE"),
        (None, "OBJECT_MISSING"),
    ],
    ids=["cut", "empty", "too large", "missing"],
)
def test_a_payload_that_cannot_be_exported_is_not_to_be_tried_again(
    live: Live, place: Place, payload: bytes | None, code: str
) -> None:
    data = place.input(payload or b"")
    if payload is None:
        (place.folder / "payload").unlink()
    result = live.platform.result(live.platform.submit(data))
    error = failure(result)
    assert (error.code, error.retryable) == (code, False)
    assert "stopPod" not in result
    assert place.objects() == []


def test_a_failed_job_takes_nothing_along_that_others_have_under_its_prefix(live: Live, place: Place) -> None:
    place.storage.write(f"{place.ref}/another-job/1/x.mv2", b"1")
    job = live.platform.submit(place.input(output_prefix=f"{place.ref}/", payload_sha256="0" * 64))
    error = failure(live.platform.result(job))
    assert (error.code, error.details["field"], error.retryable) == ("INVALID_EXPORT_REQUEST", "output_prefix", False)
    names = [found.ref.removeprefix(f"{place.ref}/") for found in place.storage.found(f"{place.ref}/")]
    assert names == ["another-job/1/x.mv2", "payload"]


@pytest.mark.parametrize("data", [None, [], "job", 7])
def test_an_input_that_is_no_object_is_refused(live: Live, data: object) -> None:
    assert failure(live.platform.result(live.platform.submit(data))).code == "INVALID_EXPORT_REQUEST"


def test_options_of_the_job_go_before_those_of_the_payload(live: Live, place: Place) -> None:
    result = live.platform.result(live.platform.submit(place.input(options={"maxNodeFrames": 4, "profile": "quick"})))
    report = done(result).metrics
    assert (report["capsule"]["nodeFrames"], report["leftOut"]["nodes"], report["profile"]) == (4, 5, "quick")


def test_a_job_that_the_platform_stops_leaves_nothing_and_is_never_run_again(live: Live, place: Place) -> None:
    data = place.input(LARGE)
    job = live.platform.submit(data)
    live.platform.progress(job)
    before = live.worker.children()
    live.platform.stops.put(job)
    place.wait_until("closed")
    assert place.objects() == []
    assert live.worker.scratch() == []
    killed = [pid for pid in before if pid not in live.worker.children()]
    assert len(killed) == 1
    assert group(killed[0]) == []

    assert failure(live.platform.result(live.platform.submit(data))).code == "CANCELED"
    assert [body for body in live.platform.all_of(job) if "status" not in body] == []


def test_a_job_past_its_time_is_ended_and_leaves_nothing(live: Live, place: Place) -> None:
    data = place.input(LARGE, timeout_seconds=0.5)
    result = live.platform.result(live.platform.submit(data))
    error = failure(result)
    assert (error.code, error.retryable) == ("DEADLINE_EXCEEDED", True)
    assert "stopPod" not in result
    assert place.objects() == []
    assert live.worker.scratch() == []
    assert failure(live.platform.result(live.platform.submit(data))).code == "DEADLINE_EXCEEDED"


def test_a_job_whose_process_is_killed_is_lost_and_the_next_one_runs(live: Live, place: Place) -> None:
    job = live.platform.submit(place.input(LARGE))
    live.platform.progress(job)
    for pid in live.worker.children():
        os.kill(pid, signal.SIGKILL)
    result = live.platform.result(job)
    error = failure(result)
    assert (error.code, error.retryable) == ("WORKER_LOST", True)
    assert result["stopPod"] is True
    assert place.objects() == []
    assert live.worker.scratch() == []

    second = Place(live.worker.root, "after-a-kill")
    assert done(live.platform.result(live.platform.submit(second.input()))).metrics["jobId"] == "after-a-kill"


def test_a_second_delivery_does_nothing_while_the_first_runs_and_answers_the_same_after(
    live: Live, place: Place
) -> None:
    data = place.input(LARGE)
    job = live.platform.submit(data)
    place.wait_until("held")
    assert live.platform.result(live.platform.submit(data)) == {"output": {"taken": True}}
    first = done(live.platform.result(job))
    late = done(live.platform.result(live.platform.submit(data)))
    assert msgspec.structs.replace(late, metrics={}, progress=None) == msgspec.structs.replace(
        first, metrics={}, progress=None
    )
    assert len(place.objects()) == 3


def test_a_delivery_that_finds_a_dead_run_is_lost(live: Live, place: Place) -> None:
    assert claim.take(place.storage, place.prefix, "a run that died")
    past = time.time() - claim.STALE_SECONDS - 1
    os.utime(place.folder / "1" / claim.CLAIM_NAME, (past, past))
    error = failure(live.platform.result(live.platform.submit(place.input())))
    assert (error.code, error.retryable) == ("WORKER_LOST", True)
    assert place.objects() == []


@pytest.mark.parametrize("reason", [None, WriterFailed("the disk was full")])
def test_a_delivery_that_finds_a_closed_attempt_says_why_it_was_closed(
    live: Live, place: Place, reason: WriterFailed | None
) -> None:
    told = JobError(code=reason.code, message=reason.message, retryable=reason.retryable) if reason else None
    assert claim.close(place.storage, place.prefix, error=told)
    error = failure(live.platform.result(live.platform.submit(place.input())))
    assert error.code == (reason.code if reason else "CANCELED")
    assert place.objects() == []


def test_an_attempt_that_is_closed_while_it_runs_publishes_nothing(live: Live, place: Place) -> None:
    job = live.platform.submit(place.input(LARGE))
    place.wait_until("held")
    assert not claim.close(place.storage, place.prefix)
    assert claim.close(place.storage, place.prefix, force=True)
    result = live.platform.result(job)
    assert failure(result).code == "CANCELED"
    assert "stopPod" not in result
    assert place.objects() == []
    assert live.worker.scratch() == []


def test_the_platform_hears_of_the_worker_while_a_large_job_runs(live: Live, place: Place) -> None:
    job = live.platform.submit(place.input(LARGE))
    place.wait_until("held")
    live.platform.wait_for_requests("/ping")
    live.platform.wait_for_requests("/job-stop")
    assert all("status" in body for body in live.platform.all_of(job))
    done(live.platform.result(job))


def test_a_worker_that_is_ended_gives_its_job_back(tmp_path: Path) -> None:
    with platform() as (runpod, url), worker(url, tmp_path / "root") as process:
        place = Place(tmp_path / "root", "given-back")
        job = runpod.submit(place.input(LARGE))
        runpod.progress(job)
        assert process.stop() == 0
        error = failure(runpod.result(job))
        assert (error.code, error.retryable) == ("WORKER_LOST", True)
        assert place.objects() == []
        assert process.scratch() == []


def test_a_worker_removes_what_a_killed_one_left_and_not_what_a_live_one_has(tmp_path: Path) -> None:
    with platform() as (runpod, url), worker(url, tmp_path / "root") as killed:
        job = runpod.submit(Place(tmp_path / "root", "killed").input(LARGE))
        runpod.progress(job)
        processes = killed.processes()
        assert len(processes) >= 2  # one runs the job, one pings
        killed.process.kill()
        assert gone(processes)
        assert killed.scratch()
        with worker(url, tmp_path / "root") as second:
            second.wait_until_ready()  # by now the platform has given up on the first one
            done(runpod.result(runpod.submit(Place(tmp_path / "root", "second").input())))
            assert second.scratch() == []
            with worker(url, tmp_path / "root") as third:
                third.wait_until_ready()
                assert len(list((tmp_path / "root" / "workers").iterdir())) == 2
                assert third.stop() == 0
            assert second.stop() == 0


def test_a_worker_whose_processes_do_not_start_ends_with_one_line(tmp_path: Path) -> None:
    settings = {"MEMVID_EXPORT_ROOT": str(tmp_path), "PYTHONPATH": str(tmp_path / "broken")}
    broken = tmp_path / "broken" / "sitecustomize.py"
    broken.parent.mkdir()
    broken.write_text("import os, sys\nif 'handler.child' in sys.orig_argv: os._exit(1)\n")
    ended = command("worker", env=settings)
    assert ended.returncode == 3
    assert ended.stderr.decode().splitlines()[-1].startswith("error: the worker's process ended")
    assert "Traceback" not in ended.stderr.decode()


def test_a_job_that_needs_too_much_memory_asks_for_a_fresh_worker(tmp_path: Path) -> None:
    env = {"MEMVID_EXPORT_WORKER_MEMORY_BYTES": str(256 << 20)}
    with platform() as (runpod, url), worker(url, tmp_path / "root", env):
        place = Place(tmp_path / "root", "heavy")
        result = runpod.result(runpod.submit(place.input(graph(90_000, lines=12))))
        error = failure(result)
        assert (error.code, error.retryable, result["stopPod"]) == ("OUT_OF_MEMORY", False, True)
        assert place.objects() == []


@pytest.mark.parametrize(("told", "most"), [("81920", 5), ("16384\n16384", 2), ("1024", 1), ("[N/A]", 1_000)])
def test_a_worker_runs_as_many_jobs_at_once_as_memory_processors_and_gpu_allow(
    tmp_path: Path, told: str, most: int
) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text(f"#!/bin/sh\nprintf '{told}'\n")
    smi.chmod(0o755)
    script = "import sys; from handler.worker import concurrency; print(concurrency(int(sys.argv[1])))"

    def jobs(memory: int) -> int:
        run = [sys.executable, "-c", script, str(memory)]
        env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
        return int(subprocess.run(run, env=env, check=True, capture_output=True, timeout=60).stdout)

    assert jobs(1 << 50) == 1
    assert jobs(1 << 20) == min(most, len(os.sched_getaffinity(0)))


def test_a_gpu_that_torch_cannot_use_fails_the_job_and_asks_for_a_fresh_worker(tmp_path: Path) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text('#!/bin/sh\n[ "$1" = -L ] && echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"\nexit 0\n')
    smi.chmod(0o755)
    env = {"PATH": f"{smi.parent}:{os.environ['PATH']}", "MEMVID_EXPORT_WORKER_MEMORY_BYTES": str(4 << 30)}
    with platform() as (runpod, url), worker(url, tmp_path / "root", env):
        place = Place(tmp_path / "root", "broken")
        wanted = place.input(embedding_mode="runpod_gpu", options={"semanticEnabled": True})
        result = runpod.result(runpod.submit(wanted))
        error = failure(result)
        assert (error.code, error.retryable, result["stopPod"]) == ("DEVICE_FAILED", True, True)
        assert "1 GPUs" in error.message
        assert place.objects() == []


def test_a_worker_without_a_folder_to_write_says_which_setting_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    ended = command("worker", env={"MEMVID_EXPORT_ROOT": str(tmp_path / "file")})
    assert ended.returncode == 2
    assert ended.stderr.decode().startswith("error: MEMVID_EXPORT_ROOT must be a folder")


def test_a_worker_starts_beside_what_no_worker_left(tmp_path: Path) -> None:
    strange = tmp_path / "root" / "workers" / "notes.txt"
    strange.parent.mkdir(parents=True)
    strange.write_text("not a folder of a worker")
    with platform() as (runpod, url), worker(url, tmp_path / "root") as started:
        done(runpod.result(runpod.submit(Place(tmp_path / "root", "beside").input())))
        assert started.stop() == 0
    assert strange.read_text() == "not a folder of a worker"


def test_one_job_from_a_file_is_run_to_try_the_worker(tmp_path: Path) -> None:
    place = Place(tmp_path, "tried")
    test_input = tmp_path / "test_input.json"
    test_input.write_text(json.dumps({"input": place.input()}))
    settings = {"MEMVID_EXPORT_ROOT": str(tmp_path), "MEMVID_EXPORT_STAGING_ROOT": str(tmp_path)}
    assert command("worker", "--test-input", test_input, env=settings).returncode == 0
    assert len(place.objects()) == 3
    missing = command("worker", "--test-input", tmp_path / "missing.json", env=settings)
    assert (missing.returncode, missing.stdout) == (2, b"")


def test_a_worker_with_credentials_reads_from_a_bucket_and_publishes_there(s3: S3, tmp_path: Path) -> None:
    env = {**s3.env, "MEMVID_EXPORT_STORAGE_URL": f"{s3.url}/with-keys", "MEMVID_EXPORT_S3_ADDRESSING": "path"}
    storage = open_storage(s3.config())
    with platform() as (runpod, url), worker(url, tmp_path / "root", env):
        good = Place(tmp_path / "root", "good", storage, f"{s3.url}/with-keys")
        output = done(runpod.result(runpod.submit(good.input(graph(5_000, lines=12)))))
        assert good.objects() == [CAPSULE, f"{CAPSULE}.index.v1.sqlite", f"{CAPSULE}.manifest.json"]
        found = published(storage, good.prefix, "good")
        assert found is not None
        assert found.output.sha256 == output.sha256 == _sha256(storage, output.artifact_ref)

        wrong = Place(tmp_path / "root", "wrong", storage, f"{s3.url}/with-keys")
        error = failure(runpod.result(runpod.submit(wrong.input(payload_sha256="0" * 64))))
        assert (error.code, error.details["field"]) == ("PAYLOAD_MISMATCH", "payload_sha256")
        foreign = Place(tmp_path / "root", "foreign", storage, f"{s3.url}/with-keys")
        error = failure(runpod.result(runpod.submit(foreign.input(payload_ref="s3://another-bucket/payload"))))
        assert (error.code, error.details["field"]) == ("INVALID_REF", "payload_ref")

        stopped = Place(tmp_path / "root", "stopped", storage, f"{s3.url}/with-keys")
        job = runpod.submit(stopped.input(LARGE))
        runpod.progress(job)
        runpod.stops.put(job)
        stopped.wait_until("closed")
        assert stopped.objects() == []


def test_a_worker_without_credentials_works_over_signed_links(s3: S3, tmp_path: Path) -> None:
    env = {"MEMVID_EXPORT_FETCH_HOSTS": "127.0.0.1", "MEMVID_EXPORT_FETCH_PRIVATE": "true"}
    storage = open_storage(s3.config())
    with platform() as (runpod, url), worker(url, tmp_path / "root", env):
        place = Place(tmp_path / "root", "linked", storage, f"{s3.url}/linked")
        data = place.input(links={})
        output = done(runpod.result(runpod.submit({**data, "links": _links(storage, place, 600)})))
        assert place.objects() == [CAPSULE, f"{CAPSULE}.index.v1.sqlite", f"{CAPSULE}.manifest.json"]
        assert output.sha256 == _sha256(storage, output.artifact_ref)
        late = done(runpod.result(runpod.submit({**data, "links": _links(storage, place, 600)})))
        assert late.sha256 == output.sha256

        expired = Place(tmp_path / "root", "expired", storage, f"{s3.url}/linked")
        links = {**_links(storage, expired, 600), **_links(storage, expired, 1, only=f"{expired.ref}/payload")}
        data = expired.input(links=links)
        time.sleep(1.5)
        error = failure(runpod.result(runpod.submit(data)))
        assert (error.code, error.details["field"], error.retryable) == ("ACCESS_DENIED", "payload_ref", False)
        assert expired.objects() == []

        unlinked = Place(tmp_path / "root", "unlinked", storage, f"{s3.url}/linked")
        error = failure(runpod.result(runpod.submit(unlinked.input())))
        assert (error.code, error.details["field"]) == ("INVALID_REF", "output_prefix")


def _links(storage: Storage, place: Place, seconds: float, only: str | None = None) -> dict[str, dict[str, str]]:
    names = [*claim.NAMES, CAPSULE, f"{CAPSULE}.index.v1.sqlite", f"{CAPSULE}.manifest.json"]
    refs = [only] if only else [f"{place.ref}/payload", *(place.prefix + name for name in names)]
    return {ref: {"get": storage.link(ref, "GET", seconds), "put": storage.link(ref, "PUT", seconds)} for ref in refs}


def _sha256(storage: Storage, ref: str) -> str:
    return hashlib.sha256(b"".join(storage.read(ref, 0, storage.size(ref) or 0))).hexdigest()
