"""The graph in a file of LadybugDB."""

from __future__ import annotations

import random
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import ladybug
import pytest
from nexus.graph_conformance import (
    SOME_IDS,
    TELLER,
    GraphConformance,
    GraphInMemory,
    all_documents,
    holds,
    node,
    numbered_changes,
    some_change,
    told,
)

from control_plane.nexus.graph.ladybug import LadybugGraph
from control_plane.nexus.graph.port import Change, GraphRefused, GraphUnavailable, Held, Mention, Similar

TESTS = Path(__file__).parents[1]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "graph.ladybug"


@pytest.fixture
def graphs(path: Path) -> Iterator[list[LadybugGraph]]:
    """All that were opened of one file; the last one is open."""
    opened = [LadybugGraph(path)]
    opened[0].prepare()
    yield opened
    opened[-1].close()


@pytest.fixture
def graph(graphs: list[LadybugGraph]) -> LadybugGraph:
    return graphs[0]


@pytest.fixture
def reopen(graphs: list[LadybugGraph], path: Path) -> Callable[[], LadybugGraph]:
    def reopen() -> LadybugGraph:
        graphs[-1].close()
        graphs.append(LadybugGraph(path))
        graphs[-1].prepare()
        return graphs[-1]

    return reopen


class TestLadybug(GraphConformance):
    """All that a graph store must do."""


# --- how the process ends --------------------------------------------------------------------------------------------

CHANGES = """
from pathlib import Path
from control_plane.nexus.graph.ladybug import LadybugGraph
from nexus.graph_conformance import numbered_changes

graph = LadybugGraph(Path(sys.argv[1]))
graph.prepare()
for number, change in enumerate(numbered_changes(int(sys.argv[2]))):
    if number >= int(sys.argv[3]):
        print("begun", number, flush=True)
        graph.apply(change)
        print("done", number, flush=True)
        if number % 5 == 4:
            graph.close()
            graph.prepare()
"""


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """A process of its own that runs ``code``, with the modules of the tests."""
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys\nsys.path[:0] = [{str(TESTS)!r}]\n{code}", *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=TESTS.parent,
    )


def test_a_change_is_there_whole_or_not_at_all_when_its_process_is_killed(path: Path) -> None:
    """At any moment of a change, of a checkpoint, and while the file is opened or closed."""
    chance = random.Random(5)
    memory, changes, next_ = GraphInMemory(), numbered_changes(1), 0
    for _ in range(10):
        at = next_ + chance.randrange(1, 12)
        with child(CHANGES, path, 1, next_) as process:
            assert process.stdout is not None
            for line in process.stdout:
                if line == f"begun {at}\n":
                    break
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=chance.uniform(0, 0.05))
            process.kill()
            *last, _ = process.stdout.read().split("\n")  # what is after the last newline was cut off with its writer
        done = [int(line.removeprefix("done ")) for line in last if line.startswith("done ")]
        graph = LadybugGraph(path)
        graph.prepare()
        held = graph.read([TELLER])[TELLER].node
        assert held is not None
        assert held.version - (done[-1] if done else at - 1) in (0, 1)
        for _ in range(next_, held.version + 1):
            memory.apply(next(changes))
        next_ = held.version + 1
        holds(graph, memory, also=SOME_IDS)
        graph.close()


HOLD_OURS = """
from pathlib import Path
from control_plane.nexus.graph.ladybug import LadybugGraph
graph = LadybugGraph(Path(sys.argv[1]))
graph.prepare()
print("open", flush=True)
sys.stdin.read()
"""
HOLD_ANOTHERS = """
import ladybug
database = ladybug.Database(sys.argv[1], buffer_pool_size=1 << 26, max_db_size=1 << 30)
print("open", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("code", [HOLD_OURS, HOLD_ANOTHERS])
def test_a_file_that_another_process_has_open_is_refused_until_that_has_ended(path: Path, code: str) -> None:
    with child(code, path) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "open\n"
        graph = LadybugGraph(path)
        with pytest.raises(GraphUnavailable, match=rf"(?s){path}.*(in use|lock)"):
            graph.prepare()
        with pytest.raises(GraphUnavailable):
            graph.read([1])
        process.kill()
    graph.prepare()
    assert graph.read([1]) == {}
    graph.close()


def test_a_process_opens_a_file_once(graph: LadybugGraph, path: Path) -> None:
    """The database's own lock allows it, and two would overwrite each other."""
    second = LadybugGraph(path)
    with pytest.raises(GraphUnavailable, match="in use"):
        second.prepare()
    with pytest.raises(GraphUnavailable, match="in use"):
        second.clear()
    graph.apply(Change([node(1)]))
    assert all_documents(graph) == [1]


# --- opening and closing ---------------------------------------------------------------------------------------------


def test_folders_are_made_as_needed(tmp_path: Path) -> None:
    graph = LadybugGraph(tmp_path / "a" / "b" / "graph")
    graph.prepare()
    graph.close()
    assert (tmp_path / "a" / "b" / "graph").is_file()


def test_what_cannot_be_opened_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(GraphUnavailable, match=r"file/graph cannot be opened: (File exists|Not a directory)"):
        LadybugGraph(tmp_path / "file" / "graph").prepare()
    (tmp_path / "folder").mkdir()
    graph = LadybugGraph(tmp_path / "folder")
    with pytest.raises(GraphRefused, match="folder"):
        graph.prepare()
    with pytest.raises(GraphUnavailable, match="folder cannot be removed: Is a directory"):
        graph.clear()
    graph.close()


def _no_database(data: bytes) -> bytes:
    return b"# Notes\n\nThese are my notes.\n" * 400


def _half(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _a_few_bytes(data: bytes) -> bytes:
    return data[:10]


def _another_version(data: bytes) -> bytes:
    return data[:4] + bytes([data[4] + 1]) + data[5:]


@pytest.mark.parametrize("damage", [_no_database, _half, _a_few_bytes, _another_version])
def test_a_damaged_file_is_refused_as_it_is_and_cleared(
    graph: LadybugGraph, path: Path, damage: Callable[[bytes], bytes]
) -> None:
    change = Change([node(i, "x" * 500) for i in range(1, 200)], [Similar(i, i + 1, 0.8) for i in range(1, 199)])
    memory = told(graph, [change])
    graph.close()
    data = damage(path.read_bytes())
    path.write_bytes(data)
    for _ in range(2):
        with pytest.raises(GraphRefused, match=rf"{path} is damaged, or of another version than {ladybug.version}"):
            graph.prepare()
        with pytest.raises(GraphRefused):
            graph.apply(change)
        with pytest.raises(GraphUnavailable):
            graph.read([1])
    assert path.read_bytes() == data
    graph.clear()
    assert all_documents(graph) == []
    graph.apply(change)
    holds(graph, memory)


def test_a_log_without_its_file_is_refused_and_cleared(graph: LadybugGraph, path: Path) -> None:
    graph.apply(Change([node(1)]))
    log = path.with_name(path.name + ".wal")
    data = log.read_bytes()
    graph.close()
    path.unlink()
    log.write_bytes(data)
    with pytest.raises(GraphRefused, match=f"{path} is damaged"):
        graph.prepare()
    graph.clear()
    assert all_documents(graph) == []


def test_a_log_that_ends_in_the_middle_of_a_change_has_those_before(graph: LadybugGraph, path: Path) -> None:
    log = path.with_name(path.name + ".wal")
    graph.apply(Change([node(1)]))
    before = log.stat().st_size
    graph.apply(Change([node(2, "x" * 5_000)]))
    data, kept = path.read_bytes(), log.read_bytes()
    graph.close()
    for end in (before, before + 1, before + 100, before + 2_500, len(kept) - 1, len(kept)):
        path.write_bytes(data)
        log.write_bytes(kept[:end])
        graph.prepare()
        assert all_documents(graph) == ([1, 2] if end == len(kept) else [1])
        graph.apply(Change([node(3)]))
        graph.close()
        graph.prepare()
        assert all_documents(graph) == ([1, 2, 3] if end == len(kept) else [1, 3])
        graph.close()


def test_nothing_is_answered_once_it_is_closed(graph: LadybugGraph) -> None:
    graph.apply(Change([node(1)]))
    graph.close()
    graph.close()
    for call in (lambda: graph.apply(Change([node(2)])), lambda: graph.read([1]), graph.probe):
        with pytest.raises(GraphUnavailable, match="is not open"):
            call()
    graph.prepare()
    assert all_documents(graph) == [1]


def test_closing_waits_for_those_who_read(graph: LadybugGraph) -> None:
    graph.apply(Change([node(i) for i in range(1, 301)], [Similar(1, i, 0.8) for i in range(2, 301)]))
    whole = graph.read(range(1, 301))
    started, answers = threading.Barrier(4), list[bool]()

    def read() -> None:
        started.wait()
        with suppress(GraphUnavailable):
            while True:
                answers.append(graph.read(range(1, 301)) == whole)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    started.wait()
    while len(answers) < 3:
        assert graph.probe()
    graph.close()
    for reader in readers:
        reader.join()
    assert set(answers) == {True}
    graph.prepare()
    assert graph.read([1]) == {1: whole[1]}


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        Change([node(1, "new"), node(2), node(3, "half a character: \ud83d")]),
        Change([node(1, "new"), node(2**63)]),
        Change([node(1, "new")], [Similar(1, 2, 0.8)], [Mention(1, "name:\udcff")]),
    ],
)
def test_what_cannot_be_held_is_refused_with_all_of_its_change(graph: LadybugGraph, change: Change) -> None:
    memory = told(graph, [Change([node(1, "old")])])
    with pytest.raises(GraphRefused, match="cannot hold"):
        graph.apply(change)
    holds(graph, memory, also=[2, 3])
    graph.apply(Change([node(2)]))
    assert all_documents(graph) == [1, 2]


def test_a_change_that_is_too_large_is_refused_and_its_parts_are_not(path: Path) -> None:
    graph = LadybugGraph(path, buffer_pool=32 << 20)
    graph.prepare()
    nodes = [node(i, "x" * 10_000) for i in range(1, 601)]
    with pytest.raises(
        GraphRefused, match=r"too large: it takes \d+ MiB of memory, and a quarter of 32 MiB is allowed"
    ):
        graph.apply(Change(nodes))
    assert all_documents(graph) == []
    memory = told(graph, [Change(nodes[start : start + 100]) for start in range(0, 600, 100)])
    holds(graph, memory)
    graph.close()


def test_a_graph_with_next_to_no_memory_refuses_and_loses_nothing(path: Path) -> None:
    graph = LadybugGraph(path, buffer_pool=8 << 20)
    graph.prepare()
    memory, chance, refused = GraphInMemory(), random.Random(1), 0
    for _ in range(40):
        change = some_change(chance, memory)
        try:
            graph.apply(change)
            memory.apply(change)
        except (GraphRefused, GraphUnavailable):
            refused += 1
    assert refused
    graph.close()
    graph = LadybugGraph(path)
    graph.prepare()
    holds(graph, memory, also=SOME_IDS)
    graph.close()


# --- what is bounded -------------------------------------------------------------------------------------------------


def test_many_changes_need_no_more_memory(path: Path) -> None:
    """What they leave until a checkpoint would pass this memory long before the log asks for one."""
    graph = LadybugGraph(path, buffer_pool=24 << 20)
    graph.prepare()
    memory = told(graph, [Change([node(i) for i in range(1, 101)], [Similar(1, i, 0.75) for i in range(2, 101)])])
    for turn in range(500):
        change = Change([node(1 + turn % 100, f"Turn {turn}", version=turn, domain=f"d{turn % 3}")])
        graph.apply(change)
        memory.apply(change)
    holds(graph, memory)
    graph.close()


def test_the_log_does_not_grow_for_ever(graph: LadybugGraph, path: Path) -> None:
    log, largest, written = path.with_name(path.name + ".wal"), 0, 0
    for turn in range(24):
        nodes = [node(i, f"{turn}" * 10_000, version=turn) for i in range(1, 101)]
        graph.apply(Change(nodes))
        written += sum(len(one.title) for one in nodes)
        largest = max(largest, log.stat().st_size if log.exists() else 0)
    assert largest < 20 << 20 < written
    assert path.stat().st_size < written


def test_a_file_that_is_as_large_as_it_may_be_takes_no_more_and_loses_nothing(path: Path) -> None:
    graph = LadybugGraph(path, largest_file=8 << 20)
    graph.prepare()
    memory, chance, problem = GraphInMemory(), random.Random(1), ""
    while not problem:
        first = len(memory.nodes)
        change = Change([node(first + i, chance.randbytes(4_000).hex()) for i in range(1, 61)])
        try:
            graph.apply(change)
        except GraphUnavailable as error:
            problem = error.message
        else:
            memory.apply(change)
    assert any(why in problem for why in ("Maximum database size of 8388608 bytes", "memory of 256 MiB is full")), (
        problem
    )
    with pytest.raises(GraphUnavailable):
        graph.apply(change)
    graph.close()
    graph = LadybugGraph(path)
    graph.prepare()
    holds(graph, memory)
    graph.close()


FULL_DISK = """
import random, resource, signal
from pathlib import Path
from control_plane.nexus.graph.ladybug import LadybugGraph
from control_plane.nexus.graph.port import Change, GraphUnavailable
from nexus.graph_conformance import SOME_IDS, GraphInMemory, holds, node, some_change

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
path, chance, memory, failed = Path(sys.argv[1]), random.Random(int(sys.argv[2])), GraphInMemory(), 0


def allow(size):
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


graph = LadybugGraph(path)
graph.prepare()
for turn in range(8):
    for full in (False, True, False):
        change = some_change(chance, memory)
        texts = [node(7_000 + chance.randrange(99), "x" * chance.randrange(3_000)) for _ in range(chance.randrange(60))]
        change = change._replace(documents=[*change.documents, *texts])
        largest = max(file.stat().st_size for file in path.parent.iterdir())
        if full:
            allow(chance.randrange(largest + 20_000))
            for _ in range(2):
                try:
                    graph.apply(change) if turn % 4 else graph.clear()
                    memory = memory if turn % 4 else GraphInMemory()
                except GraphUnavailable:
                    failed += 1
            allow(resource.RLIM_INFINITY)
            memory = memory if turn % 4 else GraphInMemory()
            if not turn % 4:
                graph.clear()
        graph.apply(change)
        memory.apply(change)
    holds(graph, memory, also=SOME_IDS)
graph.close()
graph.prepare()
holds(graph, memory, also=SOME_IDS)
graph.apply(Change([node(1)]))
allow(0)
try:
    graph.apply(Change([node(1), node(2, "x" * 100_000)]))
except GraphUnavailable:
    failed += 1
graph.close()
print(failed)
"""


@pytest.mark.parametrize("seed", [1, 2])
def test_a_full_disk_loses_nothing_and_ends_no_process(path: Path, seed: int) -> None:
    """It is full at some moments, of a change, a checkpoint and a clearing, and for good when the process ends."""
    with child(FULL_DISK, path, seed) as process:
        answer, _ = process.communicate()
    assert process.returncode == 0
    assert int(answer) > 3
    graph = LadybugGraph(path)
    graph.prepare()
    assert 1 in all_documents(graph)
    graph.close()


def test_a_bare_node_is_seen_as_such_by_others(graph: LadybugGraph, path: Path) -> None:
    """The file is an ordinary one of LadybugDB: who reads it elsewhere finds these names."""
    graph.apply(Change([node(1, "One")], [Similar(1, 2, 0.8)], [Mention(1, "name:Ada")]))
    assert graph.read([2]) == {2: Held(None, {1: 0.8}, frozenset())}
    graph.close()
    with (
        ladybug.Database(path, buffer_pool_size=1 << 26, max_db_size=1 << 30, read_only=True) as database,
        ladybug.Connection(database) as connection,
    ):
        similar = connection.execute(
            "MATCH (a:Document)-[s:SIMILAR_TO]->(b:Document) RETURN a.title, s.score, b.id, b.title"
        )
        mentions = connection.execute("MATCH (d:Document)-[:MENTIONS]->(e:Entity) RETURN d.vector_id, e.id")
        assert isinstance(similar, ladybug.QueryResult)
        assert isinstance(mentions, ladybug.QueryResult)
        assert similar.get_all() == [["One", 0.8, 2, None]]
        assert mentions.get_all() == [["v1", "name:Ada"]]
