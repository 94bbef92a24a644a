"""Writers, the reader and memvid-sdk's process where a part of them is missing, or what they are given is of no use."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import msgspec
import numpy as np
import pytest

from common.capsule.cli import CliWriter
from common.capsule.native import NativeWriter
from common.capsule.probes import Probes
from common.capsule.reader import CapsuleReader, properties
from common.capsule.sdk import SdkAnswer, SdkWriter
from common.errors import CapsuleUnreadable, WriterFailed
from common.frames.model import Frame

LINE = '{"name":"first"}'
FRAME = Frame(
    "mv2://nodes/a", "Function: first", "t", "node", ["x"], f"Node Function\nmetadata={LINE}", LINE, "first", LINE
)


# --- what is not installed ------------------------------------------------------------------------


def without(module: str, code: str) -> str:
    """What a Python says in which a module cannot be imported."""
    script = f"import sys\nsys.modules[{module!r}] = None\n{code}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, timeout=120)
    return done.stderr.strip().rpartition("\n")[2]


@pytest.mark.parametrize(
    ("module", "code", "told"),
    [
        (
            "memvid_export_native",
            "from common.capsule.native import NativeWriter; NativeWriter()",
            "WriterUnavailable: the native writer is not built here; install the extra `native`",
        ),
        (
            "memvid_export_native",
            "from pathlib import Path; from common.capsule.reader import CapsuleReader; CapsuleReader(Path('c.mv2'))",
            "CapsuleUnreadable: reading capsules needs the native crate; install the extra `native`",
        ),
        (
            "memvid_sdk",
            "from common.capsule.sdk import SdkWriter; SdkWriter()",
            "WriterUnavailable: memvid-sdk is not installed",
        ),
    ],
)
def test_what_is_not_installed_is_named(module: str, code: str, told: str) -> None:
    assert without(module, code).endswith(told)


def test_the_memvid_command_is_not_asked_for_vectors(
    tmp_path: Path, scripted_memvid: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    scripted_memvid("touch ran")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WriterFailed, match="takes no vectors of ours"):
        CliWriter().open(tmp_path / "c.mv2", timestamp=1, model="m", dimension=4, expected_frames=1)
    assert {path.name for path in tmp_path.iterdir()} == {"bin"}


# --- memvid-sdk's process -------------------------------------------------------------------------


class Child:
    """The process by hand, so that it comes to its own end."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._in: IO[bytes] = process.stdin
        self._out: IO[bytes] = process.stdout

    def ask(self, *documents: tuple[Any, list[float] | None]) -> SdkAnswer:
        """What it says to frames with their vectors; to none, which finishes the file."""
        message = msgspec.msgpack.encode((1, list(documents)))
        self._in.write(struct.pack("<I", len(message)) + message)
        self._in.flush()
        (length,) = struct.unpack("<I", self._out.read(4))
        return msgspec.msgpack.decode(self._out.read(length), type=SdkAnswer)


@contextmanager
def child(path: Path, *, vectors: bool, blocks: str = "unlimited") -> Iterator[Child]:
    """The process that writes a file, none of which may have more than so many blocks of 1 KiB."""
    command = f'ulimit -f {blocks}; exec "$0" -m common.capsule.sdk_child "$@"'
    arguments = ["bash", "-c", command, sys.executable, str(path), "1" if vectors else "0"]
    process = subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    with process:
        yield Child(process)
        assert process.stdin is not None
        process.stdin.close()
        assert process.wait(timeout=60) == 0


def test_frames_with_vectors_wait_for_each_other_and_are_all_there_in_the_end(
    tmp_path: Path, memvid: Callable[[Path], Any]
) -> None:
    path = tmp_path / "c.mv2"
    text = " ".join(f"word{i}" for i in range(250))  # eight of them are more than one call takes
    frames = [FRAME._replace(uri=f"mv2://nodes/{i}", text=f"{text}\nmetadata={LINE}") for i in range(10)]
    rows = np.eye(16, dtype=np.float32)[: len(frames)]
    with child(path, vectors=True) as writer:
        for start in (0, 5):
            some = [(frame, row.tolist()) for frame, row in zip(frames[start:][:5], rows[start:], strict=False)]
            assert writer.ask(*some).outcome == "ok"
        assert writer.ask((FRAME, None)).outcome == "ok"
        assert writer.ask() == SdkAnswer("ok")
    with CapsuleReader(path) as reader:
        assert [frame.uri for frame in reader.frames(0, 100)] == [*(frame.uri for frame in frames), FRAME.uri]
    memory = memvid(path)
    for frame, row in zip(frames, rows, strict=True):
        found = memory.find("", k=1, mode="sem", query_embedding=row.tolist(), snippet_chars=80)["hits"]
        assert [hit["uri"] for hit in found] == [frame.uri]


def test_a_full_disk_is_told_as_one_and_the_process_goes_on(tmp_path: Path) -> None:
    with child(tmp_path / "c.mv2", vectors=False, blocks="200") as writer:
        text = " ".join(f"word{i}" for i in range(40_000))
        answers = [writer.ask((FRAME._replace(uri=f"mv2://nodes/{i}", text=text), None)) for i in range(3)]
        answers.append(writer.ask())
    assert answers[-1].outcome in ("storage", "failed")
    assert answers[-1].message


# --- the reader -----------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", ["{", "[]", "", '{"name": "\\ud800"}'])
def test_metadata_of_a_frame_that_is_no_object_is_refused(metadata: str) -> None:
    with pytest.raises(CapsuleUnreadable, match="the metadata of a frame is malformed"):
        properties(FRAME._replace(metadata=metadata))


def test_a_part_without_frames_has_no_probes() -> None:
    probes = Probes("seed", 0, NativeWriter())
    probes.see([], None)
    plan = probes.plan(Path("c.mv2"))
    assert (plan.frames, plan.vectors, plan.frame_probes, plan.vector_probes) == (0, 0, [], [])


def test_memvid_sdk_that_cannot_write_there_is_told_by_its_file(tmp_path: Path) -> None:
    part = SdkWriter().open(tmp_path / "none" / "c.mv2", timestamp=1, model=None, dimension=None, expected_frames=1)
    with pytest.raises(WriterFailed, match=r"^c\.mv2: memvid-sdk"):
        part.add([FRAME], None)
    part.abort()
