"""The writers for machines where the crate is not built: memvid-sdk, and the memvid command."""

from __future__ import annotations

import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from common.capsule.cli import CliWriter
from common.capsule.gate import FrameProbe, Gate, GatePlan, VectorProbe, WordProbe
from common.capsule.port import CapsuleWriter, never
from common.capsule.probes import query_of
from common.capsule.reader import CapsuleReader
from common.capsule.sdk import SdkWriter
from common.errors import Canceled, GateFailed, InvalidRequest, StorageFailed, WriterFailed, WriterUnavailable
from common.frames.model import Frame
from tests.capsule.conftest import vectors_of
from tests.left_behind import child_pids, nothing_left
from tests.test_pipeline import codes, content, run, small

REPOSITORY = Path(__file__).parents[2]
TIMESTAMP = 1_767_312_000
CHUNKED = 2_400
LONG = Frame(
    "mv2://nodes/long",
    "Function: long_document",
    "nodes/Function",
    "node",
    ["source=gitnexus"],
    "Node Function\n"
    + "".join(f"    line {i}  of a long\ttext about ① thing{i}\n\n" for i in range(120))
    + 'metadata={"name":"long_document"}',
    '{"name":"long_document"}',
    "long document",
    '{"name":"long_document"}',
)


def chosen(frames: list[Frame], count: int) -> list[Frame]:
    """Meta frames, nodes and relations of a real graph, and one text that memvid-sdk cuts into chunks."""
    relations = [frame for frame in frames if frame.kind == "relation"]
    return [*frames[: count * 5 // 6], LONG, *relations[: count // 6]]


def write(writer: CapsuleWriter, path: Path, frames: list[Frame], vectors: NDArray[np.float32] | None = None) -> Path:
    """Write a file as the pipeline does."""
    part = writer.open(
        path,
        timestamp=TIMESTAMP,
        model="m" if vectors is not None else None,
        dimension=256 if vectors is not None else None,
        expected_frames=len(frames),
    )
    row = 0
    try:
        for start in range(0, len(frames), writer.batch):
            batch = frames[start : start + writer.batch]
            wanted = sum(frame.embed_text is not None for frame in batch)
            part.add(batch, vectors[row : row + wanted] if vectors is not None and wanted else None)
            row += wanted
        part.finish()
    finally:
        part.abort()
    return path


def plan_of_all(
    path: Path, writer: CapsuleWriter, frames: list[Frame], vectors: NDArray[np.float32] | None
) -> GatePlan:
    """A plan with every frame and every vector as a probe."""
    embedded = [frame for frame in frames if vectors is not None and frame.embed_text is not None]
    rows = [] if vectors is None else [row.tolist() for row in vectors]
    same = Counter(map(tuple, rows))
    return GatePlan(
        path=str(path),
        frames=len(frames),
        exact=False,
        vectors=len(rows),
        reader="cli" if writer.name == "cli" else "sdk",
        frame_probes=[
            FrameProbe(
                uri=frame.uri,
                title=frame.title,
                track=None if vectors is not None and frame.embed_text is not None else frame.track,
                tags=frame.tags,
                text=frame.text,
            )
            for frame in frames
        ],
        word_probes=[WordProbe(word=query_of(frame.text), uri=frame.uri) for frame in frames],
        vector_probes=[
            VectorProbe(values=values, uri=frame.uri)
            for frame, values in zip(embedded, rows, strict=True)
            if same[tuple(values)] == 1
        ],
    )


# --- memvid-sdk -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def by_sdk(
    example_frames: list[Frame], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Frame], NDArray[np.float32]]:
    """A file that memvid-sdk wrote, in more calls than one WAL takes, and what went in."""
    frames = chosen(example_frames, 96)
    vectors = vectors_of(frames)
    path = tmp_path_factory.mktemp("sdk") / "c.mv2"
    with nothing_left():
        write(SdkWriter(), path, frames, vectors)
    return path, frames, vectors


def test_every_frame_word_and_vector_that_memvid_sdk_wrote_passes_the_gate(
    by_sdk: tuple[Path, list[Frame], NDArray[np.float32]],
) -> None:
    path, frames, vectors = by_sdk
    plan = plan_of_all(path, SdkWriter(), frames, vectors)
    assert len(plan.vector_probes) > 60
    with Gate() as gate:
        assert gate.check(plan, never) == 2 + 2 * len(frames) + len(plan.vector_probes)


def test_the_gate_refuses_such_a_file_too(by_sdk: tuple[Path, list[Frame], NDArray[np.float32]]) -> None:
    path, frames, vectors = by_sdk
    with Gate() as gate:
        plan = plan_of_all(path, SdkWriter(), frames, vectors)
        place = frames.index(LONG)
        plan.frame_probes[place].text = LONG.text.replace("thing77", "thing78")
        with pytest.raises(GateFailed) as failed:
            gate.check(plan, never)
        assert failed.value.details["probe"] == "frame:text"
        plan = plan_of_all(path, SdkWriter(), frames, vectors)
        plan.frames += 20
        with pytest.raises(GateFailed) as failed:
            gate.check(plan, never)
        assert failed.value.details["probe"] == "frame_count"


def test_the_reader_gives_frames_by_position_past_the_chunks(
    by_sdk: tuple[Path, list[Frame], NDArray[np.float32]],
) -> None:
    path, frames, _ = by_sdk
    with CapsuleReader(path) as reader:
        read = [frame for batch in reader.all_frames() for frame in batch]
    assert [(frame.uri, frame.title, frame.tags, frame.kind) for frame in read] == [
        (frame.uri, frame.title, frame.tags, frame.kind) for frame in frames
    ]
    for ours, theirs in zip(frames, read, strict=True):
        assert theirs.track == ("" if ours.embed_text is not None else ours.track)
        if len(ours.text) < CHUNKED:
            assert (theirs.text, theirs.metadata) == (ours.text, ours.metadata)


def test_an_export_falls_back_to_memvid_sdk_and_says_so(tmp_path: Path) -> None:
    def missing() -> CapsuleWriter:
        raise WriterUnavailable("the native writer is not built here")

    with nothing_left(), Gate() as gate:
        result = run(small(4), tmp_path, gate, vectors=True, writers={"native": missing, "sdk": SdkWriter})
    assert result.report.writer == result.manifest.writer == "sdk"
    assert codes(result)["WRITER_FALLBACK"] == 1
    assert "1,000 times" in next(w.example for w in result.report.warnings if w.code == "WRITER_FALLBACK")
    assert (result.report.capsule.frames, result.report.capsule.vectors) == (13, 4)
    assert content(tmp_path) == {result.capsule_paths[0].name, result.sidecar_path.name, result.manifest_path.name}


def one_child(before: list[int]) -> int:
    (pid,) = set(child_pids()) - set(before)
    return pid


def test_a_hung_memvid_sdk_is_ended_after_its_time(tmp_path: Path) -> None:
    frames = [LONG._replace(uri=f"mv2://nodes/{i}", embed_text=None) for i in range(2)]
    with nothing_left():
        before = child_pids()
        part = SdkWriter(seconds_per_frame=0.1, seconds_per_call=0.2).open(
            tmp_path / "c.mv2", timestamp=TIMESTAMP, model=None, dimension=None, expected_frames=2
        )
        os.kill(one_child(before), signal.SIGSTOP)
        with pytest.raises(WriterFailed, match=r"longer than 0\.4 s"):
            part.add(frames, None)
        assert child_pids() == before
        part.abort()


def test_a_memvid_sdk_that_dies_is_told(tmp_path: Path) -> None:
    with nothing_left():
        before = child_pids()
        part = SdkWriter().open(tmp_path / "c.mv2", timestamp=TIMESTAMP, model=None, dimension=None, expected_frames=1)
        os.kill(one_child(before), signal.SIGKILL)
        with pytest.raises(WriterFailed, match="no answer"):
            part.add([LONG._replace(embed_text=None)], None)
        part.abort()


def test_a_cancel_ends_memvid_sdk_in_mid_put(tmp_path: Path) -> None:
    def stop() -> None:
        raise Canceled("stop")

    with nothing_left():
        part = SdkWriter().open(
            tmp_path / "c.mv2",
            timestamp=TIMESTAMP,
            model=None,
            dimension=None,
            expected_frames=1,
            should_stop=stop,
        )
        with pytest.raises(Canceled):
            part.add([LONG._replace(embed_text=None)] * 50, None)
        part.abort()


def test_a_folder_that_is_not_there_is_told_by_memvid_sdk(tmp_path: Path) -> None:
    with nothing_left(), pytest.raises((WriterFailed, StorageFailed), match=r"c\.mv2"):
        write(SdkWriter(), tmp_path / "none" / "c.mv2", [LONG._replace(embed_text=None)])


# --- the memvid command ---------------------------------------------------------------------------------------


@pytest.fixture
def memvid_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command of npm's memvid-cli 2.0.151, from PATH or from where scripts/test installs it."""
    installed = REPOSITORY / ".cache" / "npm" / "node_modules" / ".bin"
    if shutil.which("memvid") is None:
        monkeypatch.setenv("PATH", f"{os.environ['PATH']}{os.pathsep}{installed}")
    assert shutil.which("memvid"), f"memvid-cli is neither on PATH nor in {installed}; scripts/test installs it"


@pytest.mark.usefixtures("memvid_command")
def test_an_export_through_the_memvid_command_is_read_back_by_it(tmp_path: Path) -> None:
    with nothing_left(), Gate() as gate:
        result = run(small(5), tmp_path, gate, writer="cli")
    assert result.report.writer == "cli"
    assert result.report.capsule.frames == 15
    assert result.manifest.readers == "the memvid command that wrote it"
    assert content(tmp_path) == {result.capsule_paths[0].name, result.sidecar_path.name, result.manifest_path.name}


@pytest.mark.usefixtures("memvid_command")
def test_every_word_that_the_memvid_command_wrote_is_found(example_frames: list[Frame], tmp_path: Path) -> None:
    frames = [*example_frames[:12], LONG]
    path = write(CliWriter(), tmp_path / "c.mv2", frames)
    plan = plan_of_all(path, CliWriter(), frames, None)
    with Gate() as gate:
        assert gate.check(plan, never) == 2 + 2 * len(frames)
        plan.word_probes[3].uri = "mv2://nodes/none"
        with pytest.raises(GateFailed) as failed:
            gate.check(plan, never)
    assert failed.value.details["probe"] == "lexical"


@pytest.mark.usefixtures("memvid_command")
def test_the_gate_refuses_another_text_of_the_memvid_command(tmp_path: Path) -> None:
    frames = [LONG._replace(uri="mv2://nodes/a", text="Node Function\nhello", embed_text=None)]
    path = write(CliWriter(), tmp_path / "c.mv2", frames)
    plan = plan_of_all(path, CliWriter(), frames, None)
    plan.frame_probes[0].text = "Node Function\nbye"
    with Gate() as gate, pytest.raises(GateFailed) as failed:
        gate.check(plan, never)
    assert failed.value.details["probe"] == "frame:text"


@pytest.mark.usefixtures("memvid_command")
@pytest.mark.parametrize("more", [{"writer": "cli"}, {"writers": {"cli": CliWriter}}])
def test_vectors_with_the_memvid_command_are_refused_before_anything_is_written(
    tmp_path: Path, more: dict[str, Any]
) -> None:
    with nothing_left(), Gate() as gate, pytest.raises(InvalidRequest, match="takes no vectors") as refused:
        run(small(5), tmp_path, gate, vectors=True, **more)
    assert refused.value.details["field"] == "options.semanticEnabled"
    assert content(tmp_path) == set()


@pytest.mark.usefixtures("memvid_command")
def test_a_cancel_ends_the_memvid_command(tmp_path: Path) -> None:
    def stop() -> None:
        raise Canceled("stop")

    with nothing_left(), pytest.raises(Canceled):
        CliWriter().open(
            tmp_path / "c.mv2",
            timestamp=TIMESTAMP,
            model=None,
            dimension=None,
            expected_frames=1,
            should_stop=stop,
        ).add([LONG._replace(embed_text=None)] * 30, None)


def test_a_memvid_command_that_says_nothing_of_a_capsule_has_not_verified_it(
    example_frames: list[Frame], tmp_path: Path, scripted_memvid: Callable[[str], None]
) -> None:
    scripted_memvid("exit 0")
    plan = plan_of_all(tmp_path / "c.mv2", CliWriter(), example_frames[:3], None)
    with Gate() as gate, pytest.raises(GateFailed) as failed:
        gate.check(plan, never)
    assert failed.value.details["probe"] == "verify"


def test_without_the_memvid_command_the_writer_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(WriterUnavailable, match="memvid-cli"):
        CliWriter()


def test_a_failing_memvid_command_is_a_writer_that_failed(
    tmp_path: Path, scripted_memvid: Callable[[str], None]
) -> None:
    scripted_memvid("echo 'no licence' >&2\nexit 3")
    with nothing_left(), pytest.raises(WriterFailed, match="no licence"):
        CliWriter().open(tmp_path / "c.mv2", timestamp=TIMESTAMP, model=None, dimension=None, expected_frames=1)
    with nothing_left(), Gate() as gate, pytest.raises(WriterFailed, match="no licence"):
        run(small(5), tmp_path / "out", gate, writer="cli")
    assert content(tmp_path / "out") == set()
