"""A child that takes more memory than it may, or ends for want of it, and one that speaks out of turn."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from played_child import played
from small_job import config_of
from worker_process import group

from common.errors import ExportError, OutOfMemory, WorkerLost
from handler.process import ChildProcess
from handler.protocol import Check

LIMIT = 64 << 20


def _end(root: Path) -> tuple[ExportError, int]:
    """Why a child ended that got a command, and its id."""

    async def inside() -> tuple[ExportError, int]:
        child = await ChildProcess.start(msgspec.structs.replace(config_of(root), memory_limit=LIMIT))
        try:
            await child.send(Check(job_id="job", payload_ref="file:///payload"))
            async with asyncio.timeout(60):
                with pytest.raises(ExportError) as caught:
                    await child.receive()
            assert not child.usable
            return caught.value, child.pid
        finally:
            await child.close()

    return asyncio.run(inside())


def test_a_child_over_its_memory_is_ended_though_it_does_not_listen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = """
signal.signal(signal.SIGTERM, signal.SIG_IGN)
say(type="ready")
sys.stdin.readline()
held = b"x" * (96 << 20)
time.sleep(300)
"""
    played(tmp_path / "played", monkeypatch, part)
    error, pid = _end(tmp_path)
    assert isinstance(error, OutOfMemory)
    assert error.message == "the job needs more than the 64 MiB that a worker may use"
    assert error.details == {"limit": LIMIT}
    assert group(pid) == []


@pytest.mark.parametrize(
    ("held", "number", "kind", "says"),
    [
        (48, "SIGABRT", OutOfMemory, "more than the 64 MiB"),
        (48, "SIGSEGV", OutOfMemory, "more than the 64 MiB"),
        (48, "SIGKILL", WorkerLost, "signal 9"),
        (0, "SIGABRT", WorkerLost, "signal 6"),
        (0, "SIGSEGV", WorkerLost, "signal 11"),
    ],
)
def test_native_code_that_crashes_while_it_holds_much_has_got_no_more_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: int, number: str, kind: type[ExportError], says: str
) -> None:
    part = f"""
say(type="ready")
sys.stdin.readline()
held = b"x" * ({held} << 20)
time.sleep(0.5)
os.kill(os.getpid(), signal.{number})
"""
    played(tmp_path / "played", monkeypatch, part)
    error, _ = _end(tmp_path)
    assert type(error) is kind
    assert says in error.message


def test_what_a_child_holds_before_its_first_job_is_no_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = """
model = b"x" * (40 << 20)
say(type="ready")
sys.stdin.readline()
held = b"x" * (40 << 20)
time.sleep(0.5)
os._exit(7)
"""
    played(tmp_path / "played", monkeypatch, part)
    error, _ = _end(tmp_path)
    assert isinstance(error, WorkerLost)
    assert "exit code 7" in error.message


def test_a_child_that_speaks_before_it_is_ready_does_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = """
open(os.environ["PYTHONPATH"] + "/pid", "w").write(str(os.getpid()))
step = {"stage": "transform", "progress": 1, "stageProgress": 1, "message": "of no job"}
say(type="progress", progress=step)
time.sleep(300)
"""
    played(tmp_path / "played", monkeypatch, part)
    with pytest.raises(WorkerLost, match="spoke before it was ready"):
        asyncio.run(ChildProcess.start(config_of(tmp_path)))
    assert group(int((tmp_path / "played" / "pid").read_text())) == []
