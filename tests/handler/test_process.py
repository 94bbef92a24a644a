"""A worker's child process: it runs jobs, and it and all that it started end when they should."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from small_job import GRAPH, config_of, payload

from common.contract import JobInput, Source
from common.embedding.choice import Choice, Engines
from common.errors import Canceled, DeadlineExceeded, InvalidRef, InvalidRequest, PayloadMismatch, WorkerLost
from handler.process import ChildProcess
from handler.protocol import Check, Checked, Done, Reported, Run


def _with_child(root: Path, scenario: Callable[[ChildProcess], Awaitable[None]]) -> None:
    async def inside() -> None:
        child = await ChildProcess.start(config_of(root))
        try:
            await scenario(child)
        finally:
            await child.close()

    asyncio.run(inside())


def _run(root: Path, **changes: Any) -> Run:
    job = JobInput(
        **{
            "job_id": "job",
            "payload_ref": (root / "payload").as_uri(),
            "output_prefix": (root / "out").as_uri() + "/",
            **changes,
        }
    )
    return Run(job=job, generated_at="2026-11-21T10:00:00.000Z")


async def _end(child: ChildProcess) -> Done:
    while not isinstance(message := await child.receive(), Done):
        assert isinstance(message, Reported)
    return message


def _group(pid: int) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except (FileNotFoundError, ProcessLookupError):
                continue
            if int(fields[2]) == pid and fields[0] != "Z":
                found.append(int(entry.name))
    return found


def test_keys_reach_a_child_without_being_shown_to_others(tmp_path: Path) -> None:
    key = "sk-not-for-everybody"

    async def inside() -> None:
        config = msgspec.structs.replace(config_of(tmp_path), engines=Engines(keys={"openai": key}))
        assert key not in repr(config)
        child = await ChildProcess.start(config)
        try:
            for seen in ("cmdline", "environ"):
                assert key.encode() not in (Path("/proc") / str(child.pid) / seen).read_bytes()
            ref = payload(tmp_path, GRAPH | {"options": {"semanticEnabled": True}})
            await child.send(
                _run(tmp_path, payload_ref=ref, embedding_mode="external_api", embedding_provider="voyage")
            )
            with pytest.raises(InvalidRequest, match="VOYAGE_API_KEY") as caught:
                await _end(child)
            assert caught.value.details["field"] == "embedding_provider"
        finally:
            await child.close()

    asyncio.run(inside())


def test_a_child_whose_engine_cannot_be_loaded_says_why(tmp_path: Path) -> None:
    choice = Choice(mode="local_cpu", provider="torch", model="nowhere-to-be-found")
    config = msgspec.structs.replace(config_of(tmp_path), choice=choice, models=frozenset([choice.model]), preload=True)
    with pytest.raises(InvalidRequest, match="nowhere-to-be-found"):
        asyncio.run(ChildProcess.start(config))


def test_a_raw_graph_is_named_after_where_its_job_says_it_comes_from(tmp_path: Path) -> None:
    async def scenario(child: ChildProcess) -> None:
        raw = {name: GRAPH[name] for name in ("nodes", "relationships")}
        await child.send(_run(tmp_path, payload_ref=payload(tmp_path, raw), source=Source(base_name="engine")))
        assert (await _end(child)).output.artifact_ref.rpartition("/")[2].startswith("engine-gitnexus-")

    _with_child(tmp_path, scenario)


def test_one_child_checks_and_runs_one_job_after_the_other(tmp_path: Path) -> None:
    async def scenario(child: ChildProcess) -> None:
        ref = payload(tmp_path)
        digests = set()
        for number in range(3):
            await child.send(Check(job_id=f"job{number}", payload_ref=ref))
            checked = await child.receive()
            assert isinstance(checked, Checked)
            assert (checked.session_id, checked.nodes, checked.relationships) == ("s", 1, 1)
            prefix = (tmp_path / f"out{number}").as_uri() + "/"
            await child.send(_run(tmp_path, job_id=f"job{number}", output_prefix=prefix))
            output = (await _end(child)).output
            assert output.artifact_ref.startswith(prefix)
            digests.add(output.sha256)
            assert sorted(path.suffix for path in (tmp_path / f"out{number}").iterdir()) == [".json", ".mv2", ".sqlite"]
        assert len(digests) == 1

    _with_child(tmp_path, scenario)


def test_a_bad_payload_is_told_and_the_child_goes_on(tmp_path: Path) -> None:
    async def scenario(child: ChildProcess) -> None:
        await child.send(Check(job_id="bad", payload_ref=payload(tmp_path, {"nodes": [], "relationships": []})))
        with pytest.raises(InvalidRequest) as caught:
            await child.receive()
        assert caught.value.details["field"] == "nodes"
        await child.send(Check(job_id="good", payload_ref=payload(tmp_path)))
        assert isinstance(await child.receive(), Checked)
        assert child.usable

    _with_child(tmp_path, scenario)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"payload_sha256": "0" * 64}, PayloadMismatch),
        ({"payload_size": 7}, PayloadMismatch),
        ({"payload_ref": "file:///etc/passwd"}, InvalidRef),
        ({"schema_version": "gitnexus.export.schema.v9"}, InvalidRequest),
        ({"embedding_mode": "telepathy"}, InvalidRequest),
        ({"output_prefix": "file:///tmp/elsewhere/"}, InvalidRef),
    ],
)
def test_a_job_that_is_not_as_announced_publishes_nothing(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception]
) -> None:
    async def scenario(child: ChildProcess) -> None:
        payload(tmp_path)
        await child.send(_run(tmp_path, **changes))
        with pytest.raises(error):
            await _end(child)
        assert not (tmp_path / "out").exists()
        assert not list((tmp_path / "scratch").glob("*"))

    _with_child(tmp_path, scenario)


@pytest.mark.parametrize("reason", [Canceled("stop"), DeadlineExceeded("too long")])
def test_a_kill_ends_the_whole_group_and_gives_the_reason(tmp_path: Path, reason: Exception) -> None:
    async def scenario(child: ChildProcess) -> None:
        pid = child.pid
        assert len(_group(pid)) >= 2
        child.kill(reason)  # type: ignore[arg-type]
        with pytest.raises(type(reason)):
            await child.receive()
        assert not child.usable
        for _ in range(100):
            if not _group(pid):
                return
            await asyncio.sleep(0.02)
        pytest.fail(f"left: {_group(pid)}")

    _with_child(tmp_path, scenario)


def test_a_child_that_dies_is_noticed(tmp_path: Path) -> None:
    async def scenario(child: ChildProcess) -> None:
        os.kill(child.pid, signal.SIGKILL)
        with pytest.raises(WorkerLost, match="signal 9"):
            await child.receive()
        with pytest.raises(WorkerLost):
            await child.receive()

    _with_child(tmp_path, scenario)
