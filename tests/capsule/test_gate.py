"""The gate: what it passes, what it refuses, and that nothing of it is left behind."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from numpy.typing import NDArray

from common.capsule.gate import FrameProbe, Gate, GatePlan, WordProbe
from common.capsule.native import NativeWriter
from common.capsule.port import never
from common.capsule.probes import Probes
from common.errors import Canceled, GateFailed
from common.frames.model import Frame
from tests.capsule.conftest import vectors_of
from tests.capsule.test_native_writer import write
from tests.left_behind import child_pids, nothing_left

FRAMES = 160


@pytest.fixture(scope="module")
def given(example_frames: list[Frame]) -> tuple[list[Frame], NDArray[np.float32]]:
    """The frames of the example graph's beginning, and their vectors."""
    frames = example_frames[:FRAMES]
    return frames, vectors_of(frames)


@pytest.fixture(scope="module")
def sealed(given: tuple[list[Frame], NDArray[np.float32]], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Their capsule."""
    return write(tmp_path_factory.mktemp("gate") / "c.mv2", *given).read_bytes()


@pytest.fixture(scope="module")
def gate() -> Iterator[Gate]:
    with Gate() as running:
        yield running


def plan_of(path: Path, frames: list[Frame], vectors: NDArray[np.float32]) -> GatePlan:
    """The plan that the pipeline would make."""
    probes = Probes("seed", len(frames), NativeWriter())
    row = 0
    for start in range(0, len(frames), 50):
        batch = frames[start : start + 50]
        wanted = sum(frame.embed_text is not None for frame in batch)
        probes.see(batch, vectors[row : row + wanted] if wanted else None)
        row += wanted
    return probes.plan(path)


@pytest.fixture
def planned(given: tuple[list[Frame], NDArray[np.float32]], sealed: bytes, tmp_path: Path) -> GatePlan:
    """A capsule of this test's own, and its plan."""
    (tmp_path / "c.mv2").write_bytes(sealed)
    return plan_of(tmp_path / "c.mv2", *given)


@contextmanager
def own_gate() -> Iterator[tuple[Gate, int]]:
    """A gate and the id of its process, which leave nothing behind."""
    with nothing_left():
        others = child_pids()
        with Gate() as gate:
            (pid,) = set(child_pids()) - set(others)
            yield gate, pid
        gate.close()


def refused(gate: Gate, plan: GatePlan) -> str:
    """The probe that a plan fails at."""
    with pytest.raises(GateFailed) as failed:
        gate.check(plan, never)
    assert failed.value.retryable
    return str(failed.value.details["probe"])


def test_a_good_capsule_passes_with_probes_of_every_kind(gate: Gate, planned: GatePlan) -> None:
    assert len(planned.frame_probes) > 10
    assert len(planned.word_probes) > 3
    assert len(planned.vector_probes) > 3
    probes = len(planned.frame_probes) + len(planned.word_probes) + len(planned.vector_probes)
    assert gate.check(planned, never) == probes + 4
    assert gate.check(planned, never) == probes + 4


def test_a_graph_without_a_rare_name_has_a_lexical_probe_too(gate: Gate, tmp_path: Path, given: tuple) -> None:
    frames = [frame for frame in given[0] if frame.kind == "meta"]
    plan = plan_of(write(tmp_path / "c.mv2", frames), frames, np.empty((0, 256), np.float32))
    assert [probe.uri for probe in plan.word_probes] == ["mv2://meta/manifest"]
    assert gate.check(plan, never) > len(frames)


@pytest.mark.parametrize(
    ("where", "probes"),
    [
        ("payload", {"checksum", "lexical", "open", "frame:text"}),
        ("vectors", {"checksum", "vector", "open"}),
        ("time_index", {"checksum", "open"}),
        ("lexical", {"checksum", "lexical", "open", "process"}),
        ("toc", {"open"}),
    ],
)
def test_one_flipped_byte_is_refused_wherever_it_lies(
    gate: Gate, planned: GatePlan, sealed: bytes, memvid: Callable[[Path], Any], where: str, probes: set[str]
) -> None:
    stats = memvid(Path(planned.path)).stats()
    payload = 4_096 + stats["wal_bytes"]
    time_index = payload + stats["payload_bytes"]
    lexical = time_index + stats["time_index_bytes"]
    vectors = payload + stats["payload_bytes"] + stats["time_index_bytes"] + stats["lex_index_bytes"]
    toc = vectors + stats["vec_index_bytes"]
    begin, end = {
        "payload": (payload, time_index),
        "time_index": (time_index, lexical),
        "lexical": (lexical, vectors),
        "vectors": (vectors, toc),
        "toc": (toc, len(sealed) - 56),
    }[where]
    for place in np.linspace(begin, end - 1, 12).astype(int):
        damaged = bytearray(sealed)
        damaged[place] ^= 1
        Path(planned.path).write_bytes(damaged)
        assert refused(gate, planned) in probes


def test_a_wiped_lexical_index_is_refused(
    gate: Gate, planned: GatePlan, sealed: bytes, memvid: Callable[[Path], Any]
) -> None:
    stats = memvid(Path(planned.path)).stats()
    begin = 4_096 + stats["wal_bytes"] + stats["payload_bytes"] + stats["time_index_bytes"]
    length = stats["lex_index_bytes"]
    Path(planned.path).write_bytes(sealed[:begin] + bytes(length) + sealed[begin + length :])
    assert refused(gate, planned) in ("open", "lexical", "process")
    Path(planned.path).write_bytes(sealed)
    assert gate.check(planned, never) > 0


def test_a_capsule_with_fewer_frames_than_planned_is_refused(gate: Gate, planned: GatePlan) -> None:
    planned.frames += 1
    assert refused(gate, planned) == "frame_count"


def test_an_exact_writer_may_not_add_frames(gate: Gate, planned: GatePlan) -> None:
    planned.frames -= 1
    assert refused(gate, planned) == "frame_count"
    planned.exact = False
    assert gate.check(planned, never) > 0


@pytest.mark.parametrize(
    ("field", "value"),
    [("text", "another text"), ("title", "Another: title"), ("track", "nodes/Other"), ("tags", ["other"])],
)
def test_another_content_under_a_uri_is_refused_by_field(
    gate: Gate, planned: GatePlan, field: str, value: object
) -> None:
    planned.frame_probes[3] = msgspec.structs.replace(planned.frame_probes[3], **{field: value})
    assert refused(gate, planned) == f"frame:{field}"


def test_a_uri_that_is_not_there_is_refused(gate: Gate, planned: GatePlan) -> None:
    planned.frame_probes.append(FrameProbe(uri="mv2://nodes/none", title="", track="", tags=[], text=""))
    assert refused(gate, planned) == "open"


def test_a_word_that_is_not_indexed_is_refused(gate: Gate, planned: GatePlan) -> None:
    planned.word_probes.append(WordProbe(word="xylophonist", uri=planned.frame_probes[0].uri))
    assert refused(gate, planned) in ("lexical", "open")


def test_a_word_of_another_frame_is_refused(gate: Gate, planned: GatePlan) -> None:
    planned.word_probes[-1] = msgspec.structs.replace(planned.word_probes[-1], uri="mv2://meta/manifest")
    assert refused(gate, planned) == "lexical"


def test_a_vector_that_belongs_to_another_frame_is_refused(gate: Gate, planned: GatePlan) -> None:
    first = planned.vector_probes[0]
    farthest = min(planned.vector_probes, key=lambda probe: float(np.dot(probe.values, first.values)))
    first.uri, farthest.uri = farthest.uri, first.uri
    assert refused(gate, planned) == "vector"


def test_what_no_sample_shows_is_refused_too(gate: Gate, given: tuple, tmp_path: Path) -> None:
    frames, vectors = given
    none: dict[str, list] = {"frame_probes": [], "word_probes": [], "vector_probes": []}
    swapped = vectors.copy()
    swapped[[4, 9]] = swapped[[9, 4]]
    plan = plan_of(write(tmp_path / "vectors.mv2", frames, swapped), frames, vectors)
    assert refused(gate, msgspec.structs.replace(plan, **none)) == "vectors"
    other = [*frames[:20], frames[20]._replace(text=frames[20].text + " "), *frames[21:]]
    plan = plan_of(write(tmp_path / "frames.mv2", other, vectors), frames, vectors)
    assert refused(gate, msgspec.structs.replace(plan, **none)) == "frames"


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" * 4_000, b"MV2\0" + bytes(8_192), None])
def test_a_file_that_is_no_capsule_is_refused(gate: Gate, planned: GatePlan, content: bytes | None) -> None:
    if content is None:
        Path(planned.path).unlink()
    else:
        Path(planned.path).write_bytes(content)
    assert refused(gate, planned) == "open"


def test_a_cut_capsule_is_refused(gate: Gate, planned: GatePlan, sealed: bytes) -> None:
    Path(planned.path).write_bytes(sealed[: len(sealed) // 2])
    assert refused(gate, planned) == "open"


def test_a_child_that_dies_is_told_and_the_next_check_has_another(planned: GatePlan) -> None:
    with own_gate() as (gate, pid):
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(GateFailed) as failed:
            gate.check(planned, lambda: os.kill(pid, signal.SIGKILL))
        assert failed.value.details["probe"] == "process"
        assert pid not in child_pids()
        assert gate.check(planned, never) > 0


def test_a_child_that_died_between_two_checks_is_replaced(planned: GatePlan) -> None:
    with own_gate() as (gate, pid):
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        assert gate.check(planned, never) > 0


@pytest.mark.parametrize("plan_bytes", [0, 4 << 20])
def test_a_child_that_hangs_is_ended_after_its_time(planned: GatePlan, plan_bytes: int) -> None:
    planned.word_probes.append(WordProbe(word="a" * plan_bytes, uri=""))  # over 64 KiB the pipe itself is full
    with own_gate() as (gate, pid):
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(GateFailed, match=r"longer than 0\.3 s") as failed:
            gate.check(planned, never, seconds=0.3)
        assert failed.value.details["probe"] == "process"
        assert pid not in child_pids()


@pytest.mark.parametrize("calls", [1, 2, 5])
def test_a_cancel_in_mid_check_passes_through_and_ends_the_child(planned: GatePlan, calls: int) -> None:
    seen = []

    def should_stop() -> None:
        seen.append(1)
        if len(seen) >= calls:
            raise Canceled("stop")

    with own_gate() as (gate, pid):
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(Canceled):
            gate.check(planned, should_stop)
        assert pid not in child_pids()
        assert gate.check(planned, never) > 0


def test_one_process_serves_many_capsules_and_is_gone_afterwards(planned: GatePlan, sealed: bytes) -> None:
    with own_gate() as (gate, pid):
        for damage in (False, True) * 3:
            Path(planned.path).write_bytes(sealed[:-200] if damage else sealed)
            if damage:
                assert refused(gate, planned) == "open"
            else:
                assert gate.check(planned, never) > 0
        assert pid in child_pids()


def test_the_child_talks_to_nobody(planned: GatePlan) -> None:
    with own_gate() as (gate, pid):
        gate.check(planned, never)
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        assert {b"MEMVID_TELEMETRY=0", b"MEMVID_OFFLINE=1"} <= set(environment)
        opened = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()]
        assert not [name for name in opened if name.startswith("socket:")]
