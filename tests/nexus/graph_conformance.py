"""What every graph store must do, whatever stands behind it; and a graph in memory that says what a change comes to."""

from __future__ import annotations

import itertools
import random
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import ClassVar

from control_plane.nexus.graph.port import Change, DocumentNode, GraphStore, Held, Mention, Similar

TEXTS = (
    "",
    " spaces at both ends ",
    'It\'s a "title" with `ticks`, \\backslashes\\ and {braces: $all}',
    "lines\nand\r\ntabs\t, \u2028 too",
    "emoji \U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467, 漢字, e\u0301 and é, \u202eturned",
    "NUL \0 and \x01 and \x7f",
    "\ufffd",
    "// DETACH DELETE n; %s {0} ' OR 1=1 --",
    "long " * 2_000,
)
EDGES_OF_NUMBERS = (1, 127, 128, 255, 256, 65_535, 65_536, 2**31 - 1, 2**31, 2**32, 2**53 - 1, 2**53, 2**53 + 1)
"""Ids at which something that holds numbers otherwise would go wrong."""


def node(id_: int, title: str = "Title", *, version: int = 1, **more: str) -> DocumentNode:
    """A document node of which a test says what matters."""
    texts = {
        "vector_id": f"v{id_}",
        "client": "c",
        "collection": "books",
        "domain": "general",
        "doc_type": "page",
    } | more
    return DocumentNode(id=id_, title=title, created_at=1_700_000_000_000 + id_, version=version, **texts)


class GraphInMemory:
    """What a graph holds after some changes, one by one as a change says it."""

    def __init__(self) -> None:
        self.nodes: dict[int, DocumentNode | None] = {}
        self.keys: set[str] = set()
        self.pairs: dict[tuple[int, int], float] = {}
        self.mentioned: set[Mention] = set()

    def apply(self, change: Change) -> None:
        self.nodes |= {one.id: one for one in change.documents}
        for a, b, score in change.similar:
            self.nodes = {a: None, b: None} | self.nodes
            self.pairs[a, b] = score
        for mention in change.mentions:
            self.nodes = {mention.document: None} | self.nodes
            self.keys.add(mention.entity)
            self.mentioned.add(mention)
        for pair in change.dissimilar:
            self.pairs.pop(pair, None)
        self.mentioned -= set(change.unmentioned)
        for id_ in change.removed:
            self.nodes.pop(id_, None)
            self.pairs = {pair: score for pair, score in self.pairs.items() if id_ not in pair}
            self.mentioned = {one for one in self.mentioned if one.document != id_}
        self.keys -= set(change.forgotten)
        self.mentioned = {one for one in self.mentioned if one.entity in self.keys}

    def held(self) -> dict[int, Held]:
        similar: dict[int, dict[int, float]] = {id_: {} for id_ in self.nodes}
        for (a, b), score in self.pairs.items():
            similar[a][b] = similar[b][a] = score
        return {
            id_: Held(one, similar[id_], frozenset(m.entity for m in self.mentioned if m.document == id_))
            for id_, one in self.nodes.items()
        }


def all_documents(graph: GraphStore, page: int = 1_000) -> list[int]:
    """Ids of all documents, page by page."""
    found: list[int] = []
    while some := graph.documents(found[-1] if found else -1, page):
        assert len(some) <= page
        found += some
    return found


def all_entities(graph: GraphStore, page: int = 1_000) -> list[str]:
    """Keys of all entities, page by page."""
    found: list[str] = []
    while some := graph.entities(found[-1] if found else "", page):
        assert len(some) <= page
        found += some
    return found


def told(graph: GraphStore, changes: Iterable[Change]) -> GraphInMemory:
    """Make changes in a graph and in one in memory, which is answered."""
    memory = GraphInMemory()
    for change in changes:
        graph.apply(change)
        memory.apply(change)
    return memory


def holds(graph: GraphStore, memory: GraphInMemory, also: Sequence[int] = ()) -> None:
    """A graph holds what one in memory does: no less, no more."""
    assert all_documents(graph) == sorted(memory.nodes)
    assert all_entities(graph) == sorted(memory.keys)
    assert graph.read([*memory.nodes, *also]) == memory.held()


class GraphConformance:
    """The cases. A module of an adapter has a class ``Test…`` that inherits them, and these fixtures:

    - ``graph``: a graph that was prepared and is empty;
    - ``reopen``: a function that ends the process or the connection behind that graph, and answers it as it is after it
      has begun anew. It may be called more than once.
    """

    large: ClassVar[tuple[int, int]] = (2_000, 20_000)
    """Documents and pairs of the large change."""
    random_changes: ClassVar[int] = 90
    """A multiple of 30."""

    def test_an_empty_graph_holds_nothing(self, graph: GraphStore) -> None:
        assert graph.read([]) == {}
        assert graph.read([1, 2, 3]) == {}
        assert graph.documents(-1, 10) == []
        assert graph.entities("", 10) == []

    def test_it_says_what_answers(self, graph: GraphStore) -> None:
        assert any(sign.isdigit() for sign in graph.probe())

    def test_preparing_again_changes_nothing(self, graph: GraphStore) -> None:
        memory = told(graph, [Change([node(1), node(2)], [Similar(1, 2, 0.9)], [Mention(1, "name:Ada")])])
        graph.prepare()
        holds(graph, memory)

    def test_a_change_of_nothing_changes_nothing(self, graph: GraphStore) -> None:
        memory = told(graph, [Change([node(1)]), Change()])
        holds(graph, memory)

    def test_a_change_is_held(self, graph: GraphStore) -> None:
        graph.apply(
            Change(
                [node(1, "One"), node(2, "Two"), node(3, "Three")],
                [Similar(1, 2, 0.912345), Similar(1, 3, 0.75)],
                [Mention(1, "name:Ada Lovelace"), Mention(1, "path:src/a.py"), Mention(3, "name:Ada Lovelace")],
            )
        )
        assert graph.read([3, 1, 2, 4]) == {
            1: Held(node(1, "One"), {2: 0.912345, 3: 0.75}, frozenset({"name:Ada Lovelace", "path:src/a.py"})),
            2: Held(node(2, "Two"), {1: 0.912345}, frozenset()),
            3: Held(node(3, "Three"), {1: 0.75}, frozenset({"name:Ada Lovelace"})),
        }

    def test_a_change_made_twice_is_a_change_made_once(self, graph: GraphStore) -> None:
        first = Change([node(i) for i in range(1, 6)], [Similar(1, 2, 0.8), Similar(2, 3, 0.8)], [Mention(4, "name:A")])
        second = Change(
            [node(1, "New", version=2), node(6)],
            [Similar(1, 2, 0.9), Similar(5, 9, 0.8)],
            [Mention(1, "name:B")],
            [(2, 3), (7, 8)],
            [Mention(4, "name:A"), Mention(4, "name:C"), Mention(77, "name:C")],
            [3, 88],
            ["name:A", "name:Z"],
        )
        memory = told(graph, [first, second])
        graph.apply(second)
        holds(graph, memory, also=[3, 7, 8, 77, 88])

    def test_a_change_goes_over_a_half_of_itself(self, graph: GraphStore) -> None:
        change = Change(
            [node(1), node(2)], [Similar(1, 2, 0.8), Similar(1, 3, 0.8)], [Mention(1, "name:A"), Mention(2, "name:B")]
        )
        half = Change([node(2)], [Similar(1, 3, 0.8)], [Mention(2, "name:B")])
        holds(graph, told(graph, [half, change]))

    def test_what_is_to_go_goes_after_what_is_to_be(self, graph: GraphStore) -> None:
        """All of it within one change, in the order of its fields."""
        change = Change(
            [node(1), node(2), node(3), node(4)],
            [Similar(1, 2, 0.8), Similar(1, 3, 0.8), Similar(2, 5, 0.8), Similar(6, 7, 0.8)],
            [
                Mention(1, "name:A"),
                Mention(1, "name:B"),
                Mention(2, "name:C"),
                Mention(3, "name:D"),
                Mention(8, "name:E"),
            ],
            [(1, 2), (6, 7)],
            [Mention(1, "name:B"), Mention(8, "name:E")],
            [3],
            ["name:C"],
        )
        memory = told(graph, [change])
        holds(graph, memory, also=[3])
        assert memory.held() == {
            1: Held(node(1), {}, frozenset({"name:A"})),
            2: Held(node(2), {5: 0.8}, frozenset()),
            4: Held(node(4), {}, frozenset()),
            5: Held(None, {2: 0.8}, frozenset()),
            6: Held(None, {}, frozenset()),
            7: Held(None, {}, frozenset()),
            8: Held(None, {}, frozenset()),
        }
        assert all_entities(graph) == ["name:A", "name:B", "name:D", "name:E"]

    def test_the_last_of_several_counts(self, graph: GraphStore) -> None:
        graph.apply(Change([node(1, "Old"), node(2), node(1, "New")], [Similar(1, 2, 0.8), Similar(1, 2, 0.9)]))
        assert graph.read([1]) == {1: Held(node(1, "New"), {2: 0.9}, frozenset())}

    def test_an_end_that_is_not_there_is_bare_until_it_is_filled(self, graph: GraphStore) -> None:
        graph.apply(Change([node(2)], [Similar(1, 2, 0.8), Similar(2, 3, 0.9)], [Mention(4, "name:A")]))
        assert graph.read([1, 2, 3, 4]) == {
            1: Held(None, {2: 0.8}, frozenset()),
            2: Held(node(2), {1: 0.8, 3: 0.9}, frozenset()),
            3: Held(None, {2: 0.9}, frozenset()),
            4: Held(None, {}, frozenset({"name:A"})),
        }
        assert all_documents(graph) == [1, 2, 3, 4]
        graph.apply(Change([node(1), node(4)], [Similar(3, 4, 0.75)]))
        assert graph.read([1, 3, 4]) == {
            1: Held(node(1), {2: 0.8}, frozenset()),
            3: Held(None, {2: 0.9, 4: 0.75}, frozenset()),
            4: Held(node(4), {3: 0.75}, frozenset({"name:A"})),
        }

    def test_ends_that_are_there_stay_as_they_are(self, graph: GraphStore) -> None:
        graph.apply(Change([node(1, "One"), node(2, "Two")]))
        graph.apply(Change(similar=[Similar(1, 2, 0.8)], mentions=[Mention(2, "name:A")]))
        assert graph.read([1, 2]) == {
            1: Held(node(1, "One"), {2: 0.8}, frozenset()),
            2: Held(node(2, "Two"), {1: 0.8}, frozenset({"name:A"})),
        }

    def test_ending_what_is_not_there_makes_nothing(self, graph: GraphStore) -> None:
        graph.apply(Change([node(1)], dissimilar=[(1, 2), (3, 4)], unmentioned=[Mention(5, "name:A")]))
        graph.apply(Change(unmentioned=[Mention(1, "name:B")], removed=[6], forgotten=["name:C"]))
        assert all_documents(graph) == [1]
        assert all_entities(graph) == []

    def test_a_score_changes_for_both_ends(self, graph: GraphStore, reopen: Callable[[], GraphStore]) -> None:
        """Also when it is written with fewer digits, and with more again."""
        pairs = [(1, 2), (1, 3), (2, 3)]
        for scores in ([0.876543, 0.9, 0.75], [0.8, 0.912345, 0.75], [0.812345, 0.9, 1.0]):
            graph.apply(Change(similar=[Similar(a, b, score) for (a, b), score in zip(pairs, scores, strict=True)]))
            graph = reopen()
            held = graph.read([1, 2, 3])
            assert [held[a].similar[b] for a, b in pairs] == scores
            assert [held[b].similar[a] for a, b in pairs] == scores

    def test_a_pair_that_has_ended_is_gone_for_both_ends(self, graph: GraphStore) -> None:
        graph.apply(Change([node(1), node(2), node(3)], [Similar(1, 2, 0.8), Similar(1, 3, 0.8), Similar(2, 3, 0.8)]))
        graph.apply(Change(dissimilar=[(1, 2)]))
        held = graph.read([1, 2, 3])
        assert {id_: one.similar for id_, one in held.items()} == {1: {3: 0.8}, 2: {3: 0.8}, 3: {1: 0.8, 2: 0.8}}
        graph.apply(Change(similar=[Similar(1, 2, 0.95)]))
        held = graph.read([1, 2])
        assert held[1].similar[2] == held[2].similar[1] == 0.95

    def test_a_pair_goes_and_comes_many_times(self, graph: GraphStore, reopen: Callable[[], GraphStore]) -> None:
        memory = GraphInMemory()
        for turn in range(12):
            for change in (
                Change([node(1, f"{turn}")], [Similar(1, 2, round(0.8 + turn / 100, 6))]),
                Change(dissimilar=[(1, 2)]),
            ):
                graph.apply(change)
                memory.apply(change)
                assert graph.read([1, 2]) == memory.held()
        graph = reopen()
        graph.apply(Change(similar=[Similar(1, 2, 0.99)]))
        assert graph.read([2])[2].similar == {1: 0.99}

    def test_a_removed_document_takes_all_its_edges_with_it(self, graph: GraphStore) -> None:
        graph.apply(
            Change(
                [node(i) for i in range(1, 5)],
                [Similar(1, 3, 0.8), Similar(2, 3, 0.8), Similar(3, 4, 0.8), Similar(1, 2, 0.8)],
                [Mention(3, "name:A"), Mention(3, "name:B"), Mention(1, "name:A")],
            )
        )
        graph.apply(Change(removed=[3]))
        assert graph.read([1, 2, 3, 4]) == {
            1: Held(node(1), {2: 0.8}, frozenset({"name:A"})),
            2: Held(node(2), {1: 0.8}, frozenset()),
            4: Held(node(4), {}, frozenset()),
        }
        assert all_entities(graph) == ["name:A", "name:B"]

    def test_a_document_that_comes_again_has_only_its_new_edges(
        self, graph: GraphStore, reopen: Callable[[], GraphStore]
    ) -> None:
        first = Change([node(1), node(2), node(3)], [Similar(1, 2, 0.8), Similar(2, 3, 0.8)], [Mention(2, "name:A")])
        again = Change([node(2, "Again", version=2)], [Similar(2, 3, 0.9)], [Mention(2, "name:B")])
        memory = told(graph, [first, Change(removed=[2]), again, Change(removed=[2, 3]), again])
        holds(graph, memory)
        holds(reopen(), memory)

    def test_texts_become_shorter_and_longer(self, graph: GraphStore, reopen: Callable[[], GraphStore]) -> None:
        others = [node(2, "left alone"), node(3, "left alone too")]
        graph.apply(Change([node(1, "x" * 300), *others], [Similar(1, 2, 0.876543)], [Mention(1, "name:A")]))
        for version, size in enumerate((1, 0, 5_000, 17, 4_096), 2):
            graph.apply(Change([node(1, "y" * size, version=version, domain="d" * (size % 7), doc_type="")]))
            graph = reopen()
            held = graph.read([1, 2, 3])
            assert held[1].node == node(1, "y" * size, version=version, domain="d" * (size % 7), doc_type="")
            assert [held[2].node, held[3].node] == others
            assert held[1].similar == {2: 0.876543}
            assert held[1].mentions == {"name:A"}

    def test_texts_are_held_exactly(self, graph: GraphStore, reopen: Callable[[], GraphStore]) -> None:
        nodes = [node(i, text, vector_id=f"{i}{text}"[:200], domain=text[:60]) for i, text in enumerate(TEXTS, 1)]
        graph.apply(Change(nodes))
        assert [graph.read([one.id])[one.id].node for one in nodes] == nodes
        assert [one.node for one in reopen().read([one.id for one in nodes]).values()] == nodes

    def test_numbers_are_held_exactly(self, graph: GraphStore, reopen: Callable[[], GraphStore]) -> None:
        nodes = [node(i, version=i)._replace(created_at=i) for i in EDGES_OF_NUMBERS]
        pairs = [Similar(a, b, 0.75) for a, b in itertools.pairwise(EDGES_OF_NUMBERS)]
        memory = told(graph, [Change(nodes, pairs, [Mention(i, f"name:{i}") for i in EDGES_OF_NUMBERS])])
        holds(graph, memory)
        holds(reopen(), memory)

    def test_changes_of_small_and_of_large_ids_do_not_mix(self, graph: GraphStore) -> None:
        """One change after the other, with numbers of other sizes in each."""
        changes = [
            Change([node(a), node(b)], [Similar(a, b, 0.8)], [Mention(b, f"name:{a}")])
            for a, b in zip(EDGES_OF_NUMBERS, EDGES_OF_NUMBERS[3:], strict=False)
        ]
        holds(graph, told(graph, changes))

    def test_an_entity_is_shared_and_forgotten(self, graph: GraphStore) -> None:
        graph.apply(Change([node(1), node(2)], mentions=[Mention(i, e) for i in (1, 2) for e in ("name:A", "name:B")]))
        graph.apply(Change(unmentioned=[Mention(1, "name:A")]))
        assert {i: one.mentions for i, one in graph.read([1, 2]).items()} == {1: {"name:B"}, 2: {"name:A", "name:B"}}
        graph.apply(Change(forgotten=["name:B"]))
        assert {i: one.mentions for i, one in graph.read([1, 2]).items()} == {1: set(), 2: {"name:A"}}
        assert all_entities(graph) == ["name:A"]
        graph.apply(Change(mentions=[Mention(1, "name:B")]))
        assert {i: one.mentions for i, one in graph.read([1, 2]).items()} == {1: {"name:B"}, 2: {"name:A"}}

    def test_a_mention_goes_and_comes_again(self, graph: GraphStore, reopen: Callable[[], GraphStore]) -> None:
        memory = told(graph, [Change([node(1)], mentions=[Mention(1, "name:A"), Mention(1, "name:B")])])
        for _ in range(3):
            for change in (
                Change(unmentioned=[Mention(1, "name:A")]),
                Change(mentions=[Mention(1, "name:A")], unmentioned=[Mention(1, "name:B")]),
                Change(mentions=[Mention(1, "name:B")]),
            ):
                graph.apply(change)
                memory.apply(change)
                holds(graph, memory)
        holds(reopen(), memory)

    def test_keys_of_entities_are_held_exactly(self, graph: GraphStore, reopen: Callable[[], GraphStore]) -> None:
        keys = {f"path:{text[:150]}" for text in TEXTS} | {
            "identifier:a_b",
            "identifier:a_B",
            "url:https://a/b?c=d&e#f",
        }
        memory = told(graph, [Change([node(1)], mentions=[Mention(1, key) for key in sorted(keys)])])
        holds(graph, memory)
        gone = sorted(keys)[::2]
        change = Change(unmentioned=[Mention(1, key) for key in gone], forgotten=gone[::2])
        graph.apply(change)
        memory.apply(change)
        holds(graph, memory)
        holds(reopen(), memory)

    def test_documents_come_page_by_page_in_order(self, graph: GraphStore) -> None:
        ids = sorted({*EDGES_OF_NUMBERS, *range(1_000, 1_050), *range(2**53 - 30, 2**53 + 30)})
        filled = random.Random(1).sample(ids, len(ids) // 2)
        graph.apply(Change([node(i) for i in filled], [Similar(a, b, 0.8) for a, b in itertools.pairwise(ids)]))
        assert all_documents(graph, 7) == ids
        assert graph.documents(2**53, 3) == [2**53 + 1, 2**53 + 2, 2**53 + 3]
        assert graph.documents(2**53 - 1, 1) == [2**53]
        assert graph.documents(0, 1) == [1]
        assert graph.documents(ids[-1], 5) == []

    def test_entities_come_page_by_page_in_the_order_of_code_points(self, graph: GraphStore) -> None:
        keys = ["a:", "a:0", "a:A", "a:Z", "a:a", "a:aa", "a:a b", "a:é", "a:漢", "a:\uffff", "a:\U0001f600", "b:"]
        keys += [f"name:{i:03}" for i in range(40)]
        graph.apply(Change(mentions=[Mention(1, key) for key in random.Random(2).sample(keys, len(keys))]))
        assert all_entities(graph, 5) == sorted(keys)
        assert graph.entities("a:a", 2) == ["a:a b", "a:aa"]
        assert graph.entities("a:\uffff", 1) == ["a:\U0001f600"]
        assert graph.entities("zzz", 1) == []

    def test_reading_asks_for_any_number_of_documents(self, graph: GraphStore) -> None:
        graph.apply(Change([node(i) for i in range(1, 600)], [Similar(i, i + 1, 0.8) for i in range(1, 599)]))
        held = graph.read(range(300, 3_000))
        assert sorted(held) == list(range(300, 600))
        assert held[450].similar == {449: 0.8, 451: 0.8}
        assert graph.read([450, 450, 7_000, 450]) == {450: held[450]}

    def test_clearing_leaves_nothing_and_all_can_come_again(
        self, graph: GraphStore, reopen: Callable[[], GraphStore]
    ) -> None:
        change = Change([node(1), node(2)], [Similar(1, 2, 0.8)], [Mention(1, "name:A")])
        told(graph, [change])
        for _ in range(2):
            graph.clear()
            assert (all_documents(graph), all_entities(graph), graph.read([1, 2])) == ([], [], {})
        graph = reopen()
        assert all_documents(graph) == []
        memory = told(graph, [change._replace(similar=[Similar(1, 2, 0.9)])])
        holds(graph, memory)
        holds(reopen(), memory)

    def test_a_large_change_is_held(self, graph: GraphStore, reopen: Callable[[], GraphStore]) -> None:
        documents, pairs = self.large
        chance = random.Random(3)
        chosen: dict[tuple[int, int], float] = {}
        while len(chosen) < pairs:
            a, b = sorted(chance.sample(range(1, documents + 1), 2))
            chosen[a, b] = round(chance.uniform(0.75, 1), 6)
        change = Change(
            [node(i, f"Title {i}") for i in range(1, documents + 1)],
            [Similar(a, b, score) for (a, b), score in chosen.items()],
            [Mention(i, f"name:{chance.randrange(documents // 4)}") for i in range(1, documents + 1)],
        )
        memory = told(graph, [change])
        holds(reopen(), memory)

    def test_random_changes_come_to_what_they_say(self, graph: GraphStore, reopen: Callable[[], GraphStore]) -> None:
        chance, memory = random.Random(1), GraphInMemory()
        for turn in range(1, self.random_changes + 1):
            change = some_change(chance, memory)
            graph.apply(change)
            memory.apply(change)
            if chance.random() < 0.1:
                graph.apply(change)
            if turn % 30 == 0:
                graph = reopen()
                holds(graph, memory, also=SOME_IDS)

    def test_what_was_told_is_there_after_a_new_start(
        self, graph: GraphStore, reopen: Callable[[], GraphStore]
    ) -> None:
        memory = GraphInMemory()
        for turn in range(4):
            change = Change(
                [node(i, f"Turn {turn}", version=turn) for i in range(turn, 20, 2)],
                [Similar(i, i + 1 + turn, round(0.75 + turn / 100, 6)) for i in range(20)],
                [Mention(i, f"name:{i % (turn + 2)}") for i in range(1, 20)],
                [(i, i + turn) for i in range(1, 20, 3) if turn],
                removed=[turn * 5 + 1],
            )
            graph.apply(change)
            memory.apply(change)
            graph = reopen()
            holds(graph, memory)

    def test_reads_come_beside_changes(self, graph: GraphStore) -> None:
        """They never fail, and answer nothing that was never told."""
        rounds = 20
        titles = [f"Turn {turn}" for turn in range(rounds)]
        scores = {round(0.75 + turn / 100, 6) for turn in range(rounds)}
        graph.apply(Change([node(i, titles[0]) for i in range(1, 11)], [Similar(1, i, 0.75) for i in range(2, 11)]))
        over, problems = threading.Event(), list[str]()

        def read() -> None:
            while not over.is_set():
                try:
                    held = graph.read(range(1, 11))
                    documents = graph.documents(-1, 100)
                except Exception as error:  # noqa: BLE001 - a test says what it was
                    problems.append(repr(error))
                    return
                nodes = [one.node for one in held.values()]
                if any(one is None or one.title not in titles for one in nodes) or documents != list(range(1, 11)):
                    problems.append(f"{nodes} {documents}")
                if not {score for one in held.values() for score in one.similar.values()} <= scores:
                    problems.append(f"{held}")

        readers = [threading.Thread(target=read) for _ in range(2)]
        for reader in readers:
            reader.start()
        try:
            for turn in range(1, rounds):
                graph.apply(
                    Change(
                        [node(i, titles[turn], version=turn) for i in range(1, 11)],
                        [Similar(1, i, round(0.75 + turn / 100, 6)) for i in range(2, 11)],
                    )
                )
        finally:
            over.set()
            for reader in readers:
                reader.join()
        assert problems == []
        assert graph.read([1])[1] == Held(
            node(1, titles[-1], version=rounds - 1),
            dict.fromkeys(range(2, 11), round(0.75 + (rounds - 1) / 100, 6)),
            frozenset(),
        )


SOME_IDS = [base + i for base in (1, 120, 32_760, 65_530, 2**31 - 4, 2**32 - 4, 2**53 - 4) for i in range(8)]
_SOME_KEYS = [f"name:{i}" for i in range(12)] + ["path:é/\U0001f600'\"\\`", "url:https://x/\0y", "identifier:$a"]


def some_change(chance: random.Random, memory: GraphInMemory) -> Change:
    """Any change, large or small, of some documents, much of it about what ``memory`` has."""
    many = 6 if chance.random() < 0.1 else 1

    def times(most: int) -> range:
        return range(chance.randrange(most) * many)

    def pair() -> tuple[int, int]:
        a, b = sorted(chance.sample(SOME_IDS, 2))
        return a, b

    def mention() -> Mention:
        return Mention(chance.choice(SOME_IDS), chance.choice(_SOME_KEYS))

    def known(found: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        return chance.sample(found, min(len(found), chance.randrange(4)))

    return Change(
        [node(chance.choice(SOME_IDS), chance.choice(TEXTS)[:500], version=chance.randrange(2**40)) for _ in times(8)],
        [Similar(*pair(), round(chance.uniform(0.75, 1), 6)) for _ in times(16)],
        [mention() for _ in times(8)],
        [*known(sorted(memory.pairs)), *(pair() for _ in times(3))],
        [*chance.sample(sorted(memory.mentioned), min(len(memory.mentioned), chance.randrange(3))), mention()],
        [chance.choice(SOME_IDS) for _ in times(3)],
        [chance.choice(_SOME_KEYS) for _ in times(2)] if chance.random() < 0.3 else [],
    )


TELLER = 7_000


def numbered_changes(seed: int) -> Iterator[Change]:
    """Changes without an end, the same for a seed; ``TELLER`` has the number of the last one as its version."""
    chance, memory = random.Random(seed), GraphInMemory()
    for number in itertools.count():
        change = some_change(chance, memory)
        more = [node(8_000 + chance.randrange(100), "x" * chance.randrange(2_000)) for _ in range(chance.randrange(40))]
        change = change._replace(documents=[*change.documents, *more, node(TELLER, version=number)])
        memory.apply(change)
        yield change
