"""A symbol's own lines, found in texts whose line numbers may have moved.

GitNexus numbers lines from 0 with an inclusive end, other clients from 1, and the web client sends compacted texts:
parts of a file, joined by a line ``...``, sometimes repeated, cut at the end. So no line number is trusted. Each part
is a run of the file's lines with one shift, and the symbols of the file vote for it: a line that declares a symbol's
name, and the symbol's start, give a shift. The shift with the most votes places every symbol of that part.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter, defaultdict
from typing import NamedTuple

from common.graph.model import Graph, Node, WarningCounter

FILE_LINES = 80
DEFAULT_LINES = 40
MIN_SNIPPET_CHARS = 80
TRUNCATED = "...[truncated]"

_JOINT = "..."
_LEAD_LINES = 12
"""Decorators, comments and modifiers that may stand between a symbol's first line and its name."""
_SEARCH_CHARS = 64_000_000
"""Characters looked through for names in one file: names beyond that stay without a snippet."""
_MAX_CANDIDATES = 64
"""Places of one name looked at in one file."""
_MAX_LINE_CHARS = 2_000
"""Longer lines (minified code) declare nothing that a snippet could show."""

_SECTION, _VALUE, _CODE = "section", "value", "code"
_KIND_OF_LABEL = {
    "Section": _SECTION,
    **dict.fromkeys(
        ("Property", "Variable", "Const", "Constant", "Static", "Field", "EnumMember", "EnumVariant", "Parameter"),
        _VALUE,
    ),
}
_COMMON_KEYWORDS = frozenset({"def", "class", "async def", "function", "export function", "func", "fn", "pub fn"})
_KEYWORD = re.compile(
    r"(?:^|[^\w.$])(?:def|defp|defmodule|defmacro|class|function\*?|func|fn|fun|sub|struct|interface|enum|trait|type|"
    r"impl|mod|module|namespace|package|object|record|protocol|extension|union|typedef|macro_rules!|macro|const|let|"
    r"var|val|static|actor|concept|contract|library|event|modifier|procedure|proc|define|table|view)"
    r"\s+(?:\([^()]*\)\s*|<[^<>]*>\s*)?(?:[\w$<>]+(?:::|\.))*[&*#]?$"
)
_KEYWORD_EXTENSIONS = frozenset({"py", "pyi", "rs", "go", "rb", "swift", "kt", "kts", "lua", "ex", "exs", "php", "jl"})
"""Languages in which a name before a parenthesis is a call unless a keyword stands before it."""
_ASSIGNED = re.compile(r"\s*(?::[^=]*)?=(?![=>])")
_OPENED = re.compile(r"\s*(?:<[^()]*>)?\s*[({:?!=]")
_TYPED = re.compile(r"[\w\s*&<>,\[\]?:.~#-]*$")
_STATEMENT = re.compile(
    r"\s*(?:(?:return|await|if|while|for|foreach|raise|throw|yield|new|assert|import|from|else|elif|not|print|del|case|"
    r"switch|with|in|and|or|delete|goto|typeof|using)\b|[@.])"
)
_COMMENT = re.compile(r"\s*(?://|#(?!define)|\*|/\*|--|<!--)")
_VALUE_KEYWORD = re.compile(r"(?:^|[^\w.$])(?:for|as|const|let|var|val|static|final|mut|readonly|\w+)\s+$")
_VALUE_OPENED = re.compile(r"\s*(?:[,)\]};]|[?!]?:(?!:)|=(?![=>])|:=|\[|in\b|of\b|$)")
_OWNER = re.compile(r"(?:^|[^\w$])(?:self|this|cls)(?:\.|->)$")
_LEAD = re.compile(r"\s*(?:[@#/*\[\])}\"'<-]|(?:template|export|public|private|protected|static|default|pub)\b|$)")
_SIGNATURE_END = re.compile(r"\n|\s{3,}")


class Snippets:
    """Finds the snippets of one graph; a file's text is cut into lines once."""

    def __init__(self, graph: Graph, found: WarningCounter) -> None:
        self._files = graph.files
        self._found = found
        self._max_chars = max(MIN_SNIPPET_CHARS, graph.options.max_snippet_chars)
        self._symbols: dict[str, list[Node]] = defaultdict(list)
        self._placed: dict[str, tuple[str, str]] = {}
        for node in graph.nodes:
            properties = node.properties
            if not properties.get("content") and properties.get("startLine") is not None and node.label != "File":
                path = properties.get("filePath")
                if path in graph.files:
                    self._symbols[path].append(node)

    def of(self, node: Node) -> tuple[str, str]:
        """Snippet and signature (the first line of the declaration) of a node; empty strings where it has none."""
        properties = node.properties
        content = properties.get("content")
        path = properties.get("filePath")
        if content:
            if node.label == "File":
                return self._cut(self._head(content)), ""
            start = content[: self._max_chars + 1_000].lstrip()
            return self._cut(content), _SIGNATURE_END.split(start, maxsplit=1)[0]
        if not path:
            return "", ""
        if node.label == "File":
            return self._cut(self._head(self._files.get(path, ""))), ""
        if properties.get("startLine") is None:
            return "", ""
        if path in self._symbols:
            self._place(path, self._symbols.pop(path))
        placed = self._placed.pop(node.id, None)
        if placed is None:
            self._found.add("SNIPPET_NOT_FOUND", node.id)
            return "", ""
        return placed

    def _head(self, text: str) -> str:
        return "\n".join(text[: self._max_chars + 1_000].split("\n", FILE_LINES)[:FILE_LINES])

    def _cut(self, text: str) -> str:
        if len(text) > self._max_chars:
            text = text.rstrip()
            if len(text) > self._max_chars:
                return text[: self._max_chars] + TRUNCATED
        return text.rstrip()

    def _place(self, path: str, symbols: list[Node]) -> None:
        text = _Text(self._files[path], path)
        wanted = [_Symbol.of(node) for node in symbols]
        for node, place in zip(symbols, text.places(wanted), strict=True):
            if place:
                first, end, declared = place
                self._placed[node.id] = (
                    self._cut("\n".join(text.lines[first:end])),
                    text.lines[declared].strip(),
                )


class _Symbol(NamedTuple):
    name: str
    kind: str
    start: int
    length: int

    @classmethod
    def of(cls, node: Node) -> _Symbol:
        properties = node.properties
        name: str = properties["name"]
        kind = _KIND_OF_LABEL.get(node.label, _CODE)
        if kind is not _SECTION and "." in name:
            name = name.rsplit(".", 1)[1] or name
        start: int = properties["startLine"]
        end = properties.get("endLine")
        return cls(name, kind, start, max(1, end - start + 1) if end is not None else DEFAULT_LINES)


class _Place(NamedTuple):
    first: int
    end: int
    declared: int
    """The line with the name."""


class _Text:
    """One file's text, cut into lines and parts."""

    def __init__(self, text: str, path: str) -> None:
        self._text = text
        self.lines = text.split("\n")
        self._keywords_only = path.rsplit(".", 1)[-1].lower() in _KEYWORD_EXTENSIONS
        joints = [i for i, line in enumerate(self.lines) if line.startswith(_JOINT) and line in (_JOINT, TRUNCATED)]
        edges = [-1, *joints, len(self.lines)]
        self._parts = [(a + 1, b) for a, b in zip(edges, edges[1:], strict=False) if b > a + 1]

    def places(self, symbols: list[_Symbol]) -> list[_Place | None]:
        """Where each symbol stands, or None."""
        if len(self._parts) == 1 and (shift := self._plain_shift(symbols)) is not None:
            shifts: list[int | None] = [shift]
        else:
            shifts = self._vote(symbols)
        return [self._best(symbol, shifts) for symbol in symbols]

    def _plain_shift(self, symbols: list[_Symbol]) -> int | None:
        """0 or 1 for a whole text in which nearly all symbols stand at their line numbers, counted from there."""
        for shift in (0, 1):
            hits = sum(self._declared(symbol, symbol.start - shift, len(self.lines)) is not None for symbol in symbols)
            if hits and hits * 10 >= len(symbols) * 9:
                return shift
        return None

    def _vote(self, symbols: list[_Symbol]) -> list[int | None]:
        """The shift of each part (line number in the file = line of the text + shift), or None where it is not clear.

        Two symbols have to agree, or one class, function or heading whose name no other symbol of the file has.
        """
        starts = [0]
        for line in self.lines:
            starts.append(starts[-1] + len(line) + 1)
        firsts = [first for first, _ in self._parts]
        names = Counter(symbol.name for symbol in symbols)
        votes: list[Counter[int]] = [Counter() for _ in self._parts]
        strong: list[set[int]] = [set() for _ in self._parts]
        budget = _SEARCH_CHARS // max(1, len(self._text))
        candidates: dict[tuple[str, str], list[int]] = {}
        for symbol in symbols:
            key = (symbol.name, symbol.kind)
            if key not in candidates:
                candidates[key] = self._candidates(symbol, starts) if len(candidates) < budget else []
            seen: set[tuple[int, int]] = set()
            for line in candidates[key]:
                part = bisect_right(firsts, line) - 1
                if part < 0 or line >= self._parts[part][1]:
                    continue
                shift = symbol.start - line
                if (part, shift) in seen:
                    continue
                seen.add((part, shift))
                votes[part][shift] += 1
                if symbol.kind is not _VALUE and names[symbol.name] == 1 and len(candidates[key]) == 1:
                    strong[part].add(shift)
        return [_winner(votes[i], strong[i]) for i in range(len(self._parts))]

    def _candidates(self, symbol: _Symbol, starts: list[int]) -> list[int]:
        """Lines that declare the symbol's name."""
        found: list[int] = []
        position = self._text.find(symbol.name)
        for _ in range(_MAX_CANDIDATES):
            if position < 0:
                break
            line = bisect_right(starts, position) - 1
            if self._declares(self.lines[line], symbol):
                found.append(line)
            position = self._text.find(symbol.name, starts[line + 1])
        return found

    def _best(self, symbol: _Symbol, shifts: list[int | None]) -> _Place | None:
        """The place with the most lines among the parts that hold the symbol."""
        best: _Place | None = None
        for (first, end), shift in zip(self._parts, shifts, strict=True):
            if shift is None or not first <= symbol.start - shift < end:
                continue
            line = symbol.start - shift
            declared = self._declared(symbol, line, end)
            if declared is None:
                continue
            place = _Place(line, max(declared + 1, min(end, line + symbol.length)), declared)
            if best is None or place.end - place.first > best.end - best.first:
                best = place
        return best

    def _declared(self, symbol: _Symbol, first: int, end: int) -> int | None:
        """The line with the symbol's name: ``first``, or one below decorators, comments and modifiers."""
        if first < 0:
            return None
        for line in range(first, min(end, len(self.lines), first + min(_LEAD_LINES, symbol.length))):
            text = self.lines[line]
            if self._declares(text, symbol):
                return line
            if not _LEAD.match(text):
                return None
        return None

    def _declares(self, line: str, symbol: _Symbol) -> bool:
        name = symbol.name
        at = line.find(name)
        if at < 0 or len(line) > _MAX_LINE_CHARS:
            return False
        if symbol.kind is _SECTION:
            stripped = line.strip()
            return stripped == name or (stripped[0] == "#" and stripped.strip("# ") == name.strip("# "))
        while at >= 0:
            before, after = line[:at], line[at + len(name) :]
            at = line.find(name, at + 1)
            if before and (before[-1].isalnum() or before[-1] in "_$"):
                continue
            if after and (after[0].isalnum() or after[0] in "_$"):
                continue
            if symbol.kind is _VALUE:
                if _declares_value(line, before, after):
                    return True
            elif self._declares_code(line, before, after):
                return True
        return False

    def _declares_code(self, line: str, before: str, after: str) -> bool:
        if before.strip() in _COMMON_KEYWORDS or _KEYWORD.search(before):
            return not _COMMENT.match(line)
        if _STATEMENT.match(line) or _COMMENT.match(line):
            return False
        if _ASSIGNED.match(after):
            return not before.strip() or not self._keywords_only
        if self._keywords_only or not _OPENED.match(after) or not _TYPED.match(before) or before.endswith("."):
            return False
        last = line.rstrip()[-1]
        return last in "{(,:" or (bool(before.strip()) and before[-1] in " \t*&:~")


def _declares_value(line: str, before: str, after: str) -> bool:
    if _COMMENT.match(line) or not _VALUE_OPENED.match(after):
        return False
    if before.endswith((".", "->")):
        return bool(_OWNER.search(before))
    return True


def _winner(votes: Counter[int], strong: set[int]) -> int | None:
    if not votes:
        return None
    most = max(votes.values())
    leading = [shift for shift, count in votes.items() if count == most]
    if len(leading) > 1:
        leading = [shift for shift in leading if shift in strong] or [shift for shift in leading if shift in (0, 1)]
    if len(leading) != 1:
        return None
    return leading[0] if most > 1 or leading[0] in strong else None
