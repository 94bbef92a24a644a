"""A batch whose places, graphs, slots and records are not as they should be: what it says, and what it does all the
same."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from left_behind import child_pids
from live_server import graph
from processes import on_a_terminal
from small_batch import PLAN, batch_of
from spoken import Say, spoken

from common.contract import ErrorInfo, Progress, Report, Source
from common.errors import Canceled, ExportError, GateFailed, InvalidRequest, PayloadTooLarge, StorageFailed, WorkerLost
from common.graph.model import GraphLimits
from common.storage import FileStorage, Found, StorageConfig
from control_plane.batch.__main__ import main
from control_plane.batch.board import SHOWN, table_of
from control_plane.batch.journal import JOURNAL_NAME, MAX_JOURNAL_BYTES, Journal, Record
from control_plane.batch.local import LocalSlot
from control_plane.batch.run import Summary
from control_plane.batch.slots import Kept, Slot, Work
from control_plane.batch.sources import MAX_GRAPHS, FolderSource, Graph, Payload, S3Source
from handler.protocol import ChildConfig

BATCH = [sys.executable, "-m", "control_plane.batch"]


def written(folder: Path, *names: str) -> Path:
    """A folder of small graphs."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.json").write_text(json.dumps(graph(name=name)))
    return folder


# --- records ------------------------------------------------------------------------------------------


def test_records_that_are_not_those_of_a_batch_are_refused_with_their_line(tmp_path: Path) -> None:
    storage, prefix = FileStorage([tmp_path]), tmp_path.as_uri() + "/"
    asyncio.run(_kept(Journal(storage, prefix)))
    path = tmp_path / JOURNAL_NAME
    known = Journal(storage, prefix).get("one")
    assert known is not None
    assert known.status == "completed"
    path.write_bytes(path.read_bytes() + b'{"name": "two"}\n')
    with pytest.raises(InvalidRequest, match=r"its batch.jsonl is not that of a batch, line 2: .*source"):
        Journal(storage, prefix)
    os.truncate(path, MAX_JOURNAL_BYTES + 1)
    with pytest.raises(InvalidRequest, match="more than 268,435,456 bytes"):
        Journal(storage, prefix)


async def _kept(journal: Journal) -> None:
    journal.add(Record(name="one", source="one.json", status="completed"))
    await journal.write()


def test_the_table_at_the_end_shows_what_failed_first_and_counts_what_it_does_not_show() -> None:
    records = [Record(name=f"g{n:02}", source="", status="completed") for n in range(SHOWN + 9)]
    why = ErrorInfo(code="STORAGE_FAILED", message="odd\x1b[31m words")
    lines = table_of([*records, Record(name="z", source="", status="failed", error=why)])
    assert lines[1].startswith("z ")
    assert lines[1].endswith("STORAGE_FAILED: odd\ufffd[31m words")
    assert lines[-1] == "and 10 more; --json has all of them"
    assert len(lines) == 1 + SHOWN + 1


# --- sources ------------------------------------------------------------------------------------------


def test_a_link_that_leads_nowhere_fails_alone_and_when_it_is_fetched(tmp_path: Path) -> None:
    folder = written(tmp_path / "graphs", "one")
    (folder / "gone.json").symlink_to(folder / "nowhere")
    source = FolderSource(folder, None)
    one, gone = source.graphs()
    assert (one.name, gone.name, gone.weight) == ("one", "gone", 0)
    assert source.fetch(one, tmp_path, one.weight).size == one.weight
    with pytest.raises(StorageFailed, match="No such file or directory"):
        source.fetch(gone, tmp_path, 1_000)
    with pytest.raises(PayloadTooLarge, match="more than the 10 bytes"):
        source.fetch(one, tmp_path, 10)


def test_a_folder_that_cannot_be_listed_ends_the_batch_and_does_not_make_it_smaller(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match="No such file or directory"):
        FolderSource(tmp_path / "gone", None).graphs()


class Many(FileStorage):
    """Lists more graphs than a batch takes."""

    def found(self, prefix: str, *, uploads: bool = False) -> list[Found]:
        return [Found(f"{prefix}{number}.json", 1, 0.0) for number in range(MAX_GRAPHS + 1)]


def test_more_graphs_than_a_batch_takes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="more than 100,000 graphs"):
        S3Source(Many([tmp_path]), tmp_path.as_uri() + "/", None).graphs()


# --- slots --------------------------------------------------------------------------------------------


class One:
    """A source of one graph."""

    def graphs(self) -> list[Graph]:
        return [Graph("one", "one.json", 1, Source(), "one")]

    def fetch(self, graph: Graph, folder: Path, limit: int) -> Payload:
        return Payload(folder / graph.name, 1, "0" * 64)


class Place:
    """A slot whose runs, and what is left to do after each, end in these errors, one after the other; None: well."""

    def __init__(self, *runs: ExportError | None, keeps: tuple[ExportError | None, ...] = (None,)) -> None:
        self.label = self.device = "place"
        self.strikes = 0
        self._runs, self._keeps = list(runs or (None,)), list(keeps)

    async def ready(self) -> None:
        """It is up."""

    async def run(self, work: Work, tell: Callable[[Progress], None]) -> Callable[[], Kept]:
        _next(self._runs)
        return self._keep

    def _keep(self) -> Kept:
        _next(self._keeps)
        return Kept("one/", {}, Report())

    async def close(self) -> None:
        """Nothing to end."""


def _next(left: list[ExportError | None]) -> None:
    if (error := left.pop(0) if len(left) > 1 else left[0]) is not None:
        raise error


def run(root: Path, slot: Slot) -> Summary:
    """The summary of a batch of one graph."""
    root.mkdir(exist_ok=True)

    async def inside() -> Summary:
        batch = batch_of(One(), root, slot)
        await batch.run()
        return batch.summary()

    return asyncio.run(inside())


def test_a_graph_whose_files_turn_out_wrong_is_run_once_more(tmp_path: Path) -> None:
    wrong = StorageFailed("the files are gone")
    (record,) = run(tmp_path / "mended", Place(keeps=(wrong, None))).per_graph
    assert (record.status, record.attempts) == ("completed", 2)
    (record,) = run(tmp_path / "lost", Place(keeps=(wrong,))).per_graph
    assert (record.status, record.attempts) == ("failed", 2)
    assert record.error == ErrorInfo(code="STORAGE_FAILED", message="the files are gone")
    (record,) = run(tmp_path / "never", Place(keeps=(GateFailed("not whole"),))).per_graph
    assert (record.status, record.error and record.error.code) == ("failed", GateFailed.code)


def test_a_run_that_somebody_else_stopped_is_lost_and_not_canceled(tmp_path: Path) -> None:
    (record,) = run(tmp_path / "root", Place(Canceled("the run was stopped"))).per_graph
    assert record.error == ErrorInfo(code="WORKER_LOST", message="the run was stopped")
    assert (record.status, record.attempts) == ("failed", 2)


def test_a_disk_that_takes_no_payload_fails_the_graph_in_its_own_words(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "payloads").write_bytes(b"a file where a folder should be")
    (record,) = run(root, Place()).per_graph
    assert (record.status, record.attempts) == ("failed", 0)
    assert record.error is not None
    assert record.error.message.startswith("this machine's disk failed: ")
    assert "one: failed: this machine's disk failed" in capsys.readouterr().err


@asynccontextmanager
async def local(root: Path, parent: int) -> AsyncIterator[tuple[LocalSlot, Work]]:
    """A slot of this machine whose child belongs to ``parent``, and a graph for it."""
    path = written(root / "graphs", "one") / "one.json"
    (root / "scratch").mkdir()
    config = ChildConfig(
        parent_pid=parent,
        storage=StorageConfig(roots=[str(root)]),
        scratch=str(root / "scratch"),
        writer=None,
        memory_limit=4 << 30,
        limits=GraphLimits(),
    )
    storage, prefix = FileStorage([root]), (root / "out").as_uri() + "/"
    slot = LocalSlot(1, config, PLAN, scratch=storage, destination=storage, prefix=prefix, deadline_seconds=60)
    try:
        source = FolderSource(path.parent, None)
        (found,) = source.graphs()
        yield slot, Work(found, source.fetch(found, root, 1 << 20), None)
    finally:
        await slot.close()


def _children() -> list[int]:
    return [pid for pid in child_pids() if b"handler.child" in Path(f"/proc/{pid}/cmdline").read_bytes()]


def test_a_child_that_died_between_two_graphs_is_replaced_before_the_next(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with local(tmp_path, os.getpid()) as (slot, work):
            await slot.ready()
            (first,) = _children()
            await slot.ready()
            assert _children() == [first], "one that is well stays"
            os.kill(first, signal.SIGKILL)
            async with asyncio.timeout(60):
                while Path(f"/proc/{first}").exists():
                    await asyncio.sleep(0.01)
            await asyncio.sleep(0.2)  # its pipes are read to their end
            await slot.ready()
            kept = (await slot.run(work, lambda _: None))()
            assert first not in _children()
            assert sorted(path.name for path in (tmp_path / "out" / "one").iterdir()) == sorted(kept.files)
            assert slot.strikes == 0

    asyncio.run(scenario())


def test_files_that_vanish_before_they_are_put_are_told_and_nothing_is_put(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with local(tmp_path, os.getpid()) as (slot, work):
            await slot.ready()
            keep = await slot.run(work, lambda _: None)
            (manifest,) = (tmp_path / "scratch" / "made").rglob("*.manifest.json")
            manifest.unlink()
            with pytest.raises(StorageFailed, match="gone from the scratch folder"):
                keep()
            assert not (tmp_path / "out").exists()
            assert not list((tmp_path / "scratch").rglob("*.mv2"))

    asyncio.run(scenario())


def test_a_child_that_does_not_come_up_counts_against_its_slot(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with local(tmp_path, 1) as (slot, _):  # it ends at once, as its parent is another
            for strikes in (1, 2):
                with pytest.raises(WorkerLost, match="worker 1 does not start"):
                    await slot.ready()
                assert slot.strikes == strikes
            assert _children() == []

    asyncio.run(scenario())


# --- the command --------------------------------------------------------------------------------------


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Iterator[Say]:
    with spoken(main, "scripts/batch", monkeypatch, capfd) as run:
        monkeypatch.setenv("MEMVID_EMBED_CACHE", "off")
        yield run
    gc.collect()  # a process that was not closed warns now, not in another test


@pytest.mark.parametrize(
    ("out", "more", "env", "words"),
    [
        ("file/below", [], {}, "--out: the folder cannot be made: Not a directory"),
        ("filed", [], {}, "cannot be used: File exists"),
        ("linked", [], {}, "must be a folder of this user"),
        ("s3://b/p", ["--runpod", "--devices", "cpu"], {}, "--devices does not go with --runpod"),
        (
            "s3://b/p",
            ["--runpod"],
            {"MEMVID_EXPORT_WORKER_LINKS": "true", "MEMVID_EXPORT_STORAGE_URL": "s3://bucket/p"},
            "MEMVID_EXPORT_WORKER_LINKS does not go with --runpod",
        ),
        ("s3://b/p", ["--runpod"], {"RUNPOD_ENDPOINT_ID": "one"}, "RUNPOD_API_KEY must be set for --runpod"),
    ],
)
def test_a_place_or_a_choice_that_cannot_be_is_named_and_nothing_is_run(
    say: Say,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    out: str,
    more: list[str],
    env: dict[str, str],
    words: str,
) -> None:
    (tmp_path / "file").write_bytes(b"")
    for name in ("filed", "linked", "elsewhere"):
        (tmp_path / name).mkdir()
    (tmp_path / "filed" / ".batch").write_bytes(b"")
    (tmp_path / "linked" / ".batch").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "precious").write_bytes(b"not ours")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    graphs = written(tmp_path / "graphs", "one")
    code, said, err = say(graphs, "--out", out if "://" in out else tmp_path / out, "--no-semantic", *more)
    assert (code, said) == (2, "")
    assert words in err
    assert (tmp_path / "elsewhere" / "precious").exists()
    assert not list(tmp_path.rglob("*.mv2"))


def test_a_summary_that_cannot_be_written_is_told_after_the_work_is_done_and_kept(say: Say, tmp_path: Path) -> None:
    graphs, out = written(tmp_path / "graphs", "one"), tmp_path / "out"
    (tmp_path / "summary").mkdir()
    arguments = (graphs, "--out", out, "--no-semantic", "--workers", 1)
    code, _, err = say(*arguments, "--json", tmp_path / "summary")
    assert code == 2
    assert f"--json {tmp_path / 'summary'}: Is a directory" in err
    assert len(list((out / "one").iterdir())) == 3
    code, text, _ = say(*arguments, "--json", "-")
    assert (code, json.loads(text)["skipped"]) == (0, 1)


def test_records_that_cannot_be_kept_end_the_batch_with_3_and_its_summary_is_told(say: Say, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / JOURNAL_NAME).mkdir(parents=True)
    code, text, err = say(
        written(tmp_path / "graphs", "one"), "--out", out, "--no-semantic", "--workers", 1, "--json=-"
    )
    assert code == 3
    assert err.splitlines()[-1].startswith("error: ")
    assert [error["code"] for error in json.loads(text)["errors"]] == ["STORAGE_FAILED"]


def test_on_a_terminal_what_failed_is_told_above_the_table(tmp_path: Path) -> None:
    graphs = written(tmp_path / "graphs", "one")
    (graphs / "bad.json").write_bytes(b'{"nodes": [], "relationships": []}')
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("MEMVID_", "RUNPOD_"))}
    arguments = [*BATCH, graphs, "--out", tmp_path / "out", "--no-semantic", "--workers", 1, "--json", "-"]
    stdout, drawn = on_a_terminal(arguments, {**kept, "TERM": "xterm", "COLUMNS": "160"})
    assert json.loads(stdout)["failed"] == 1
    assert b"bad: failed: " in drawn
