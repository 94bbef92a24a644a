"""Snippets: a symbol's own lines, or none."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

from common.frames import Frame, frame_id_of, frames
from common.graph import Graph, canonical, read_graph

AT = "2026-11-21T12:00:00.000Z"
WHOLE = """import os

LIMIT = 3


class Reader:
    def run(self):
        return read(LIMIT)

    def close(self):
        pass


class Writer:
    def run(self):
        return write(LIMIT)


@cached
def read(limit):
    value = limit
    return value


def write(limit):
    return limit
"""
SYMBOLS = [
    ("Variable", "LIMIT", 2, 2),
    ("Class", "Reader", 5, 10),
    ("Method", "Reader.run", 6, 7),
    ("Method", "Reader.close", 9, 10),
    ("Class", "Writer", 13, 15),
    ("Method", "Writer.run", 14, 15),
    ("Function", "read", 18, 21),
    ("Variable", "read.value", 20, 20),
    ("Function", "write", 24, 25),
]


def snippet_of(frame: Frame) -> str | None:
    start = frame.text.find("\nsnippet:\n")
    return None if start < 0 else frame.text[start + 10 : frame.text.rindex("\nmetadata=")]


def snippets(graph: Graph) -> dict[str, str | None]:
    made = frames(graph, generated_at=AT, layout=None)
    return {frame_id_of(frame.uri): snippet_of(frame) for frame in made if frame.kind == "node"}


def graph_of(
    text: str | None, symbols: list[tuple[str, str, int, int | None]], *, path: str = "a.py", **options: Any
) -> Graph:
    nodes: list[dict[str, Any]] = [
        {
            "id": name,
            "label": label,
            "properties": {"name": name.rsplit(".", 1)[-1], "filePath": path, "startLine": start, "endLine": end},
        }
        for label, name, start, end in symbols
    ]
    nodes.append({"id": "File", "label": "File", "properties": {"name": path, "filePath": path}})
    relation = {"id": "r", "sourceId": "File", "targetId": nodes[0]["id"], "type": "DEFINES", "confidence": 1}
    files = {} if text is None else {path: text}
    body = {"nodes": nodes, "relationships": [relation], "fileContents": files, "options": options}
    return canonical(read_graph(io.BytesIO(json.dumps(body).encode())))


def lines(text: str, first: int, last: int) -> str:
    return "\n".join(text.split("\n")[first : last + 1])


EXPECTED = {name: lines(WHOLE, start, end) for _, name, start, end in SYMBOLS}


@pytest.mark.parametrize("base", [0, 1])
def test_numbers_counted_from_0_and_from_1_give_the_same_lines(base: int) -> None:
    symbols = [(label, name, start + base, end + base) for label, name, start, end in SYMBOLS]
    found = snippets(graph_of(WHOLE, symbols))
    del found["File"]
    assert found == EXPECTED


def test_in_a_compacted_text_each_symbol_shows_its_own_lines_or_none() -> None:
    text = f"{lines(WHOLE, 0, 7)}\n...\n{lines(WHOLE, 13, 22)}\n\n...[truncated]"
    graph = graph_of(text, SYMBOLS)
    found = snippets(graph)
    whole = {name: EXPECTED[name] for name in ("LIMIT", "Reader.run", "Writer", "Writer.run", "read", "read.value")}
    assert {name: found[name] for name in whole} == whole
    assert found["Reader"] == lines(WHOLE, 5, 7)
    assert found["Reader.close"] is None
    assert found["write"] is None
    assert [(w.code, w.count) for w in graph.warnings] == [("SNIPPET_NOT_FOUND", 2)]


def test_a_repeated_part_is_used_where_the_first_one_is_cut() -> None:
    text = f"{lines(WHOLE, 0, 5)}\n...\n{lines(WHOLE, 0, 10)}"
    assert snippets(graph_of(text, SYMBOLS))["Reader"] == EXPECTED["Reader"]


def test_a_part_that_two_symbols_of_one_name_claim_shows_neither() -> None:
    text = f"import os\n...\n{lines(WHOLE, 14, 14)}\n        return 1\n"
    found = snippets(graph_of(text, [s for s in SYMBOLS if s[1] in ("Reader.run", "Writer.run")]))
    assert found["Reader.run"] is None
    assert found["Writer.run"] is None


def test_a_use_of_a_name_is_not_taken_for_its_declaration() -> None:
    text = "import os\n...\n    return read(LIMIT)\n    write(read)\n# def read\n"
    found = snippets(graph_of(text, SYMBOLS))
    assert {found[name] for _, name, _, _ in SYMBOLS} == {None}


def test_lines_past_the_end_of_the_text_are_left_out() -> None:
    found = snippets(graph_of("def f():\n    pass\n", [("Function", "f", 0, 500)]))
    assert found["f"] == "def f():\n    pass"


def test_without_an_end_a_symbol_shows_40_lines_and_a_file_80() -> None:
    text = "def f():\n" + "".join(f"    x{i} = {i}\n" for i in range(200))
    found = snippets(graph_of(text, [("Function", "f", 0, None)], maxSnippetChars=50_000))
    assert found["f"] == lines(text, 0, 39)
    assert found["File"] == lines(text, 0, 79)


@pytest.mark.parametrize(("maximum", "kept"), [(0, 80), (79, 80), (100, 100)])
def test_a_long_snippet_is_cut_visibly(maximum: int, kept: int) -> None:
    text = "def f():\n    return " + "1 + " * 500 + "1\n"
    found = snippets(graph_of(text, [("Function", "f", 0, 1)], maxSnippetChars=maximum))
    assert found["f"] == text[:kept] + "...[truncated]"


def test_a_node_s_own_content_comes_first() -> None:
    body = {
        "nodes": [
            {
                "id": "f",
                "label": "Function",
                "properties": {"name": "f", "filePath": "a.py", "startLine": 0, "content": "def f(): 1"},
            },
            {
                "id": "s",
                "label": "Section",
                "properties": {"name": "Usage", "filePath": "a.md", "startLine": 3, "content": "--- ## Usage Run it"},
            },
        ],
        "relationships": [{"id": "r", "sourceId": "f", "targetId": "s", "type": "USES"}],
        "fileContents": {"a.py": "def f(): 2\n"},
    }
    graph = canonical(read_graph(io.BytesIO(json.dumps(body).encode())))
    assert snippets(graph) == {"f": "def f(): 1", "s": "# Usage Run it"}
    assert all("content" not in json.loads(f.metadata) for f in frames(graph, generated_at=AT, layout=None))


def test_a_symbol_whose_file_has_no_text_has_no_snippet() -> None:
    graph = graph_of(None, [("Function", "f", 0, 1)])
    assert snippets(graph) == {"f": None, "File": None}
    assert [w.code for w in graph.warnings] == ["SNIPPET_NOT_FOUND"]


def test_a_heading_named_by_white_space_alone_has_no_snippet() -> None:
    section = {"id": "s", "label": "Section", "properties": {"name": " ", "filePath": "a.md", "startLine": 0}}
    relation = {"id": "r", "sourceId": "s", "targetId": "s", "type": "DEFINES", "confidence": 1}
    body = {"nodes": [section], "relationships": [relation], "fileContents": {"a.md": "   \nx y\n"}}
    graph = canonical(read_graph(io.BytesIO(json.dumps(body).encode())))
    assert snippets(graph) == {"s": None}


@pytest.mark.parametrize("text", ["...", "...\n...[truncated]"])
def test_a_text_of_which_nothing_was_kept_shows_no_symbol(text: str) -> None:
    graph = graph_of(text, [("Function", "f", 0, 1), ("Function", "...", 0, 1)])
    assert snippets(graph) == {"f": None, "...": None, "File": text}


def test_windows_line_ends_are_read() -> None:
    text = WHOLE.replace("\n", "\r\n")
    found = snippets(graph_of(text, SYMBOLS))
    assert found["Reader"] == EXPECTED["Reader"]


LANGUAGES = {
    "a.ts": (
        "export abstract class Box<T> {\n  private size = 0;\n  constructor(readonly a: T) {\n  }\n"
        "  async open(x: number): Promise<void> {\n    this.open(1);\n  }\n}\n"
        "export const make = (x: number) => new Box(x);\nexport interface Lid extends Top {\n}\ntype Id = string;\n",
        [
            ("Class", "Box", 0, 7),
            ("Property", "size", 1, 1),
            ("Constructor", "constructor", 2, 3),
            ("Method", "open", 4, 6),
            ("Function", "make", 8, 8),
            ("Interface", "Lid", 9, 10),
            ("TypeAlias", "Id", 11, 11),
        ],
    ),
    "a.go": (
        "package a\n\ntype Box struct {\n\tSize int\n}\n\nfunc (b *Box) Open(x int) error {\n\treturn nil\n}\n\n"
        "func Make() *Box {\n\treturn nil\n}\n",
        [("Struct", "Box", 2, 4), ("Method", "Open", 6, 8), ("Function", "Make", 10, 12)],
    ),
    "a.rs": (
        "#[derive(Clone)]\npub struct Box<T> {\n    size: usize,\n}\n\n"
        "impl<T> Box<T> {\n    pub async fn open(&self) {\n"
        "    }\n}\n\nmacro_rules! make {\n}\n\npub(crate) enum Kind {\n}\n",
        [("Struct", "Box", 0, 3), ("Method", "open", 6, 7), ("Macro", "make", 10, 11), ("Enum", "Kind", 13, 14)],
    ),
    "a.java": (
        "@Entity\npublic class Box<T> {\n    @Override\n    public List<String> open(int a)\n"
        "        throws Oops {\n    }\n"
        "    private final int size = 3;\n}\n",
        [("Class", "Box", 0, 7), ("Method", "open", 2, 5), ("Field", "size", 6, 6)],
    ),
    "a.c": (
        "#define LIMIT 3\nstatic int\nopen_box(struct box *b, int n)\n{\n    return open_box(b, 1);\n}\n\n"
        "struct box {\n    int size;\n};\n\nvoid shut(void) {\n}\n",
        [
            ("Macro", "LIMIT", 0, 0),
            ("Function", "shut", 11, 12),
            ("Struct", "box", 7, 9),
            ("Property", "size", 8, 8),
        ],
    ),
    "a.rb": (
        "module Boxes\n  class Box\n    def self.make(x)\n    end\n    def open?\n    end\n  end\nend\n",
        [("Module", "Boxes", 0, 7), ("Class", "Box", 1, 6), ("Method", "make", 2, 3), ("Method", "open?", 4, 5)],
    ),
    "a.php": (
        "<?php\nfinal class Box {\n  public function open(int $a): void {\n  }\n}\n",
        [("Class", "Box", 1, 4), ("Method", "open", 2, 3)],
    ),
    "a.kt": (
        "data class Box(val size: Int) {\n  fun <T> open(x: T): Int {\n  }\n}\n",
        [("Class", "Box", 0, 3), ("Method", "open", 1, 2)],
    ),
    "a.cpp": (
        "template <typename T>\nclass Box {\n};\n\nint Box::open(int a) {\n}\n",
        [("Class", "Box", 0, 2), ("Method", "open", 4, 5)],
    ),
    "a.md": (
        "# Title\n\ntext about Usage\n\n## Usage ##\n\ntext\n\nSetext\n------\n",
        [("Section", "Title", 0, 9), ("Section", "Usage", 4, 6), ("Section", "Setext", 8, 9)],
    ),
}


@pytest.mark.parametrize("path", LANGUAGES)
@pytest.mark.parametrize("moved", [0, 200])
def test_declarations_of_many_languages_are_found_also_where_lines_moved(path: str, moved: int) -> None:
    text, symbols = LANGUAGES[path]
    given = [(label, name, start + moved, end + moved) for label, name, start, end in symbols]
    compacted = f"first line\n...\n{text}" if moved else text
    found = snippets(graph_of(compacted, given, path=path))
    for _, name, start, end in symbols:
        assert found[name] == lines(text, start, end).rstrip()


def _declared_in(name: str, line: str) -> bool:
    return re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", line) is not None


def test_in_real_exports_the_first_line_declares_the_symbol(real_graphs: dict[str, Path]) -> None:
    coverage = {"runpod-python.export.json.gz": (1_110, 1_920), "litestar.export.json.gz": (7_240, 11_247)}
    for file_name, (least, symbols) in coverage.items():
        if file_name not in real_graphs:
            continue
        graph = canonical(read_graph(real_graphs[file_name]))
        found = snippets(graph)
        placed = [n for n in graph.nodes if n.properties.get("startLine") is not None and found[n.id]]
        assert len([n for n in graph.nodes if n.properties.get("startLine") is not None]) == symbols
        assert len(placed) >= least
        for node in placed:
            first = (found[node.id] or "").split("\n")[0]
            assert _declared_in(node.name, first) or (node.label == "Section" and node.name in first)
            column = re.search(r"@\d+:(\d+)(?:#\d+)?$", node.id)
            if column and node.label in ("Function", "Method", "Class"):
                assert len(first) - len(first.lstrip()) == int(column[1])


def _bare(text: str) -> str:
    """Without white space and emoji, which GitNexus does not keep."""
    return "".join(character for character in text if character.isascii() and not character.isspace())


def test_in_a_real_export_snippets_equal_the_text_that_gitnexus_keeps(real_graphs: dict[str, Path]) -> None:
    if "runpod-python.graph.json.gz" not in real_graphs:
        pytest.skip("the larger graphs are not beside this repository")
    raw = {n.id: n.properties for n in read_graph(real_graphs["runpod-python.graph.json.gz"]).nodes}
    compared = 0
    for node_id, snippet in snippets(canonical(read_graph(real_graphs["runpod-python.export.json.gz"]))).items():
        content = raw[node_id].get("content")
        if snippet and content and node_id.split(":")[0] in ("Function", "Method", "Class", "Variable", "Property"):
            ours, theirs = _bare(snippet.removesuffix("...[truncated]")), _bare(content)
            shorter = min(len(ours), len(theirs))
            assert ours[:shorter] == theirs[:shorter]
            compared += 1
    assert compared > 900


def test_a_file_of_40_mb_gives_bounded_frames_with_the_symbols_of_its_first_lines() -> None:
    text = "".join(f"def f{i}(a):\n    return a\n" for i in range(1_400_000))
    graph = graph_of(text, [("Function", f"f{i}", 2 * i, 2 * i + 1) for i in range(0, 1_400_000, 50_000)])
    found = snippets(graph)
    assert found["f50000"] == "def f50000(a):\n    return a"
    assert found["f1350000"] is None
    assert len(found["File"] or "") <= 1_400 + len("...[truncated]")
