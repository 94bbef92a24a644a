"""Sidecars that cannot be written or are not as they were built, and words that stand far apart."""

from __future__ import annotations

import resource
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest

from common.capsule.native import NativeWriter
from common.errors import CapsuleUnreadable, StorageFailed
from common.frames import Frame
from common.sidecar.build import SidecarBuilder
from common.sidecar.open import Sidecar
from common.sidecar.rebuild import capsule_sha256, rebuild
from common.sidecar.words import WordIndex, scores, unpack
from tests.sidecar.test_sidecar import SHA, build, ids, node, relation
from tests.test_pipeline import content


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file of this process may become larger."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- writing --------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_is_told_before_anything_is_added(tmp_path: Path) -> None:
    with pytest.raises(StorageFailed, match=r"Cannot start the sidecar x\.sqlite"):
        SidecarBuilder(tmp_path / "none" / "x.sqlite")


@pytest.mark.parametrize("pages", [20, 40])
def test_a_disk_that_gets_full_is_told_and_nothing_stays(tmp_path: Path, pages: int) -> None:
    frames = [node(f"node_{i}", snippet=f"def word{i}(): return {i}" * 20) for i in range(1_000)]
    with disk_of(pages * 4_096):
        builder = SidecarBuilder(tmp_path / "x.sqlite")
        builder.add(frames, 0, 0)
        with pytest.raises(StorageFailed, match=r"the sidecar x\.sqlite: .*(full|I/O)"):
            builder.finish(SHA)
        builder.abort()
    assert content(tmp_path) == set()


def test_a_disk_that_is_full_already_is_told_and_nothing_stays(tmp_path: Path) -> None:
    with disk_of(4_096), pytest.raises(StorageFailed, match=r"Cannot start the sidecar x\.sqlite: .*(full|I/O)"):
        SidecarBuilder(tmp_path / "x.sqlite")
    assert content(tmp_path) == set()


@pytest.mark.parametrize("frames", [[], [node("a")]])
def test_a_sidecar_that_was_given_up_is_not_completed(tmp_path: Path, frames: list[Frame]) -> None:
    builder = SidecarBuilder(tmp_path / "x.sqlite")
    if frames:
        builder.add(frames, 0, 0)
    builder.abort()
    with pytest.raises(StorageFailed, match=r"Cannot write the sidecar x\.sqlite"):
        builder.finish(SHA)
    assert content(tmp_path) == set()


def test_a_file_that_was_removed_while_it_was_built_is_told(tmp_path: Path) -> None:
    builder = SidecarBuilder(tmp_path / "x.sqlite")
    builder.add([node("a")], 0, 0)
    (tmp_path / "x.sqlite").unlink()
    with pytest.raises(StorageFailed, match=r"Cannot finish the sidecar x\.sqlite"):
        builder.finish(SHA)


@pytest.mark.parametrize("first", [0, 2, 5])
def test_frames_that_do_not_follow_those_before_are_refused(tmp_path: Path, first: int) -> None:
    builder = SidecarBuilder(tmp_path / "x.sqlite")
    builder.add([node("a")], 0, 0)
    with pytest.raises(ValueError, match=f"part 0 goes on at frame 1, not at {first}"):
        builder.add([node("b")], first, 0)
    builder.add([node("c")], 1, 0)
    builder.finish(SHA)
    with closing(Sidecar.open(tmp_path / "x.sqlite")) as sidecar:
        assert ids(sidecar, [0, 1]) == ["a", "c"]


def test_a_rebuild_to_a_place_that_takes_no_file_leaves_nothing(tmp_path: Path) -> None:
    part = NativeWriter().open(tmp_path / "c.mv2", timestamp=1, model=None, dimension=None, expected_frames=1)
    part.add([node("a")], None)
    part.finish()
    (tmp_path / "index").mkdir()
    with pytest.raises(StorageFailed, match="Cannot write the sidecar index"):
        rebuild([tmp_path / "c.mv2"], tmp_path / "index")
    assert content(tmp_path) == {"c.mv2", "index"}
    with pytest.raises(CapsuleUnreadable, match=r"Cannot read gone\.mv2: No such file"):
        capsule_sha256([tmp_path / "c.mv2", tmp_path / "gone.mv2"])


# --- reading --------------------------------------------------------------------------------------

HARMS = {
    "another table": ("CREATE TABLE more (x)", "it has other tables"),
    "parts with a gap": ("UPDATE parts SET first = 1", "its parts do not follow each other"),
    "parts of no number of frames": ("UPDATE parts SET frames = 'two'", "its parts do not follow each other"),
    "bytes for a name": ("UPDATE nodes SET name = x'00'", "a row of nodes is malformed"),
    "a label that is none": ("UPDATE nodes SET label = 77", "a row of nodes is malformed"),
    "a place outside the capsule": ("UPDATE nodes SET id = 99 WHERE id = 0", "a row of nodes is malformed"),
    "a kind that is none": ("UPDATE labels SET kind = 'other'", "a row of labels is malformed"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_row_that_no_build_gives_is_damage(tmp_path: Path, harm: str) -> None:
    path = build(tmp_path / "x.sqlite", [node("a"), node("b"), relation("a", "CALLS", "b")])
    with closing(Sidecar.open(path)) as sidecar:
        sidecar.check()
    with closing(sqlite3.connect(path)) as db, db:
        db.execute("PRAGMA writable_schema = ON")
        db.execute(HARMS[harm][0])
    with closing(Sidecar.open(path)) as sidecar, pytest.raises(CapsuleUnreadable) as refused:
        sidecar.check()
    assert refused.value.message == f"The sidecar x.sqlite is damaged: {HARMS[harm][1]}"


def damage(path: Path) -> str | None:
    """What a look at every row says."""
    try:
        with closing(Sidecar.open(path)) as sidecar:
            sidecar.check()
    except CapsuleUnreadable as error:
        return error.message
    return None


def test_a_page_that_was_wiped_is_damage(tmp_path: Path) -> None:
    path = build(tmp_path / "x.sqlite", [node(f"node_{i}", filePath=f"src/{i}.py") for i in range(500)])
    content = path.read_bytes()
    told = []
    for start in range(8 * 4_096, len(content), 4_096):
        path.write_bytes(content[:start] + bytes(4_096) + content[start + 4_096 :])
        told.append(damage(path))
    assert sum(message is not None for message in told) > len(told) / 2
    assert all(message is None or "x.sqlite is damaged" in message for message in told)


@pytest.mark.parametrize("change", ["UPDATE meta SET value = '9' WHERE key = 'schema_version'", "DELETE FROM meta"])
def test_a_sidecar_of_another_schema_is_refused(tmp_path: Path, change: str) -> None:
    path = build(tmp_path / "x.sqlite", [node("a")])
    with closing(sqlite3.connect(path)) as db, db:
        db.execute(change)
    with pytest.raises(CapsuleUnreadable, match="not a sidecar of schema"):
        Sidecar.open(path)


@pytest.mark.parametrize("part", [-1, 1, 7])
def test_a_part_that_is_not_there_has_no_positions(tmp_path: Path, part: int) -> None:
    with closing(Sidecar.open(build(tmp_path / "x.sqlite", [node("a")]))) as sidecar:
        assert sidecar.position(0, 0) == 0
        with pytest.raises(CapsuleUnreadable, match=f"knows no part {part}"):
            sidecar.position(part, 0)


def test_nothing_is_joined_by_a_type_that_there_is_not(tmp_path: Path) -> None:
    path = build(tmp_path / "x.sqlite", [node("a"), node("b"), relation("a", "CALLS", "b", confidence=0.5)])
    with closing(Sidecar.open(path)) as sidecar:
        [(target, confidence)] = sidecar.joined(0, "out", "CALLS", limit=9, offset=0)
        assert (target.id, confidence) == ("b", 0.5)
        assert sidecar.joined(0, "out", "NO_SUCH_TYPE", limit=9, offset=0) == []
        assert sidecar.joined(0, "in", "CALLS", limit=9, offset=0) == []


# --- words ----------------------------------------------------------------------------------------


def test_a_node_is_found_by_its_description_and_its_keywords(tmp_path: Path) -> None:
    given = [
        node("a", description="settles invoices", keywords=["ledger", 7, "billing"]),
        node("b", description=3, keywords="ledger"),
        node("c", keywords=["archive"]),
    ]
    with closing(Sidecar.open(build(tmp_path / "x.sqlite", given))) as sidecar:
        found = {word: [at for at, _ in sidecar.match([word], limit=9)] for word in ("invoic", "billing", "ledger")}
        assert found == {"invoic": [0], "billing": [0], "ledger": [0]}
        assert [at for at, _ in sidecar.match(["archiv"], limit=9)] == [2]


def test_a_word_of_nodes_far_apart_keeps_its_places() -> None:
    places = [3, 65_538, 65_539, 400_000]
    index = WordIndex()
    for place in places:
        index.add_text(place, "body", "rare")
    index.add_text(7, "body", "other")
    rows = {word: (holders, packed) for word, holders, packed in index.rows()}
    assert rows["rare"][0] == len(places)
    positions, impacts = unpack(rows["rare"][1])
    assert positions[impacts > 0].tolist() == places
    found = scores([("rare", *rows["rare"])], 5, 400_001)
    assert found.nonzero()[0].tolist() == places
    assert unpack(rows["other"][1]).positions.tolist() == [7]
